//! Numbers and layouts of NVMe over TCP, little-endian throughout.
//!
//! ```text
//! PDU     0 type | 1 flags | 2 hlen | 3 pdo | 4 plen (4) | rest of the header, to hlen
//!         [header digest (4)] [padding to pdo] [data] [data digest (4)]
//! SQE     0 opcode | 1 flags | 2 cid (2) | 4 nsid (4) | ... | 24 SGL (16) | 40 cdw10 .. 60 cdw15
//! SGL     0 address (8) | 8 length (4) | 15 type
//! CQE     0 result (8) | 8 sqhd (2) | 10 sqid (2) | 12 cid (2) | 14 status << 1 (2)
//! ```

/// Types of PDUs.
pub mod kind {
    /// Host: the first PDU.
    pub const IC_REQ: u8 = 0;
    /// Controller: its answer.
    pub const IC_RESP: u8 = 1;
    /// Host: gives up.
    pub const H2C_TERM: u8 = 2;
    /// Controller: gives up.
    pub const C2H_TERM: u8 = 3;
    /// Host: a command.
    pub const COMMAND: u8 = 4;
    /// Controller: a completion.
    pub const RESPONSE: u8 = 5;
    /// Host: data that was asked for.
    pub const H2C_DATA: u8 = 6;
    /// Controller: data of a read.
    pub const C2H_DATA: u8 = 7;
    /// Controller: asks for data.
    pub const R2T: u8 = 9;
}

/// Flags of PDUs.
pub mod flag {
    /// A header digest is there.
    pub const HDGST: u8 = 1;
    /// A data digest is there.
    pub const DDGST: u8 = 2;
    /// The last data PDU of its transfer.
    pub const LAST: u8 = 4;
    /// The command succeeded and no response follows.
    pub const SUCCESS: u8 = 8;
}

/// Fatal error status: why a side gave up.
pub mod fes {
    /// A field of a header is wrong; the information is its offset.
    pub const HEADER_FIELD: u16 = 1;
    /// A PDU that may not come now.
    pub const SEQUENCE: u16 = 2;
    /// The header digest does not fit; the information is the digest that came.
    pub const HEADER_DIGEST: u16 = 3;
    /// Data outside of what was asked for.
    pub const OUT_OF_RANGE: u16 = 4;
    /// More data than allowed in a PDU.
    pub const LIMIT: u16 = 5;
    /// A parameter that is not supported; the information is its offset.
    pub const UNSUPPORTED: u16 = 6;
}

/// Opcodes of the admin queue.
pub mod admin {
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT: u8 = 0x0c;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// Opcodes of IO queues.
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DSM: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
}

/// The opcode of all Fabrics commands.
pub const FABRICS: u8 = 0x7f;
/// Types of Fabrics commands.
pub mod fctype {
    /// Property Set.
    pub const PROPERTY_SET: u8 = 0;
    /// Connect.
    pub const CONNECT: u8 = 1;
    /// Property Get.
    pub const PROPERTY_GET: u8 = 4;
}

/// Properties of a controller, by offset.
pub mod property {
    /// Capabilities, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// Version.
    pub const VS: u32 = 0x08;
    /// Configuration.
    pub const CC: u32 = 0x14;
    /// Status.
    pub const CSTS: u32 = 0x1c;
}

/// Log pages.
pub mod log {
    /// Which there are.
    pub const SUPPORTED: u8 = 0x00;
    /// Errors.
    pub const ERROR: u8 = 0x01;
    /// Health.
    pub const SMART: u8 = 0x02;
    /// Firmware slots.
    pub const FIRMWARE: u8 = 0x03;
    /// Namespaces that changed.
    pub const CHANGED_NS: u8 = 0x04;
    /// Commands supported and their effects.
    pub const EFFECTS: u8 = 0x05;
    /// States of paths.
    pub const ANA: u8 = 0x0c;
    /// What there is to connect to.
    pub const DISCOVERY: u8 = 0x70;
    /// Hosts that the discovery service knows.
    pub const HOST_DISCOVERY: u8 = 0x71;
}

/// Features.
pub mod feature {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER: u8 = 0x02;
    /// Temperature Threshold.
    pub const TEMPERATURE: u8 = 0x04;
    /// Error Recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile Write Cache.
    pub const WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const QUEUES: u8 = 0x07;
    /// Write Atomicity Normal.
    pub const ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT: u8 = 0x0b;
    /// Keep Alive Timer.
    pub const KEEP_ALIVE: u8 = 0x0f;
    /// Host Behavior Support.
    pub const HOST_BEHAVIOR: u8 = 0x16;
    /// Host Identifier.
    pub const HOST_ID: u8 = 0x81;
}

/// SGL descriptor: data in the capsule, by offset.
pub const SGL_IN_CAPSULE: u8 = 0x01;
/// SGL descriptor: data by the transport's own means.
pub const SGL_TRANSPORT: u8 = 0x5a;

/// Bytes of the common header.
pub const COMMON_BYTES: usize = 8;
/// Bytes of ICReq and ICResp.
pub const IC_BYTES: usize = 128;
/// Bytes of a submission queue entry.
pub const SQE_BYTES: usize = 64;
/// Bytes of a command capsule's header.
pub const COMMAND_BYTES: usize = COMMON_BYTES + SQE_BYTES;
/// Bytes of the header of data, R2T, response and termination PDUs.
pub const SHORT_BYTES: usize = 24;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 4;
/// Most bytes of the offending header that a termination tells.
pub const TERM_DATA_BYTES_MAX: usize = 128;
/// The most that must be seen in one piece to make progress: the longest header with padding.
pub const FEED_BYTES_MAX: usize = 256;

/// Most data in a capsule of the admin queue; fixed by the transport's specification.
pub const ADMIN_CAPSULE_DATA_MAX: u32 = 8 << 10;
/// Most data in a capsule of an IO queue.
pub const IO_CAPSULE_DATA_MAX: u32 = 16 << 10;
/// MDTS: 2^8 pages of 4 KiB.
pub const MDTS: u8 = 8;
/// The longest transfer of a command: 1 MiB.
pub const TRANSFER_BYTES_MAX: u32 = 4096 << MDTS;
/// Most data of one H2CData PDU, and of one R2T.
pub const H2C_DATA_MAX: u32 = TRANSFER_BYTES_MAX;
/// Entries of the largest queue. One of them stays free, so that 128 would not do for 128 commands.
pub const QUEUE_ENTRIES_MAX: u16 = 256;
/// Most IO queues of a controller.
pub const IO_QUEUES_MAX: u16 = 128;
/// Bytes of the data of Connect.
pub const CONNECT_DATA_BYTES: usize = 1024;
/// Most bytes of a name (NQN), its terminating zero left out.
pub const NQN_BYTES_MAX: usize = 223;
/// The name of every discovery subsystem.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Of no namespace in particular.
pub const NSID_ALL: u32 = u32::MAX;

/// A status: its type in bits 8 to 10, its code in bits 0 to 7, "do not retry" in bit 14.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status(pub u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($code);)*
            fn name(self) -> Option<&'static str> {
                match self.0 & 0x7ff { $($code => Some(stringify!($name)),)* _ => None }
            }
        }
    };
}

statuses! {
    /// It worked.
    SUCCESS = 0x000;
    /// Unknown opcode.
    INVALID_OPCODE = 0x001;
    /// A field makes no sense.
    INVALID_FIELD = 0x002;
    /// The id is in use.
    ID_CONFLICT = 0x003;
    /// Something broke here.
    INTERNAL = 0x006;
    /// Aborted as asked.
    ABORTED = 0x007;
    /// No such namespace.
    INVALID_NAMESPACE = 0x00b;
    /// Not in this state.
    SEQUENCE = 0x00c;
    /// The SGL's length does not fit.
    SGL_LENGTH = 0x00f;
    /// No such type of SGL here.
    SGL_TYPE = 0x011;
    /// The SGL's offset does not fit.
    SGL_OFFSET = 0x016;
    /// The data was damaged on its way; try again.
    TRANSIENT_TRANSPORT = 0x022;
    /// Past the end.
    LBA_RANGE = 0x080;
    /// No space left.
    CAPACITY = 0x081;
    /// Not now.
    NOT_READY = 0x082;
    /// Another host has it for itself.
    RESERVATION_CONFLICT = 0x083;
    /// Too many Asynchronous Event Requests.
    AER_LIMIT = 0x105;
    /// No such log page.
    INVALID_LOG_PAGE = 0x109;
    /// The feature cannot be saved.
    NOT_SAVEABLE = 0x10d;
    /// The feature cannot be changed.
    NOT_CHANGEABLE = 0x10e;
    /// Connect: unknown record format.
    CONNECT_FORMAT = 0x180;
    /// Connect: no controller is free.
    CONNECT_BUSY = 0x181;
    /// Connect: a parameter is wrong; the result says which.
    CONNECT_PARAMETER = 0x182;
    /// Connect: this host may not.
    CONNECT_HOST = 0x184;
    /// What was stored could not be read.
    UNRECOVERED_READ = 0x281;
    /// The data differs.
    COMPARE_FAILURE = 0x285;
    /// This path failed; another may do.
    PATH_INTERNAL = 0x300;
    /// Not through this path.
    ANA_INACCESSIBLE = 0x302;
}

impl Status {
    /// The same, and trying again is of no use.
    pub const fn dnr(self) -> Self {
        Self(self.0 | 0x4000)
    }
    /// Without "do not retry".
    pub const fn code(self) -> u16 {
        self.0 & 0x7ff
    }
    /// Whether it worked.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
}

impl core::fmt::Debug for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let dnr = if self.0 & 0x4000 != 0 { "+DNR" } else { "" };
        match self.name() {
            Some(name) => write!(f, "{name}{dnr}"),
            None => write!(f, "{:#05x}{dnr}", self.code()),
        }
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A submission queue entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sqe(pub [u8; SQE_BYTES]);

/// The SGL descriptor of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sgl {
    /// Address or offset.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Type and subtype.
    pub kind: u8,
}

impl Sqe {
    /// What to do.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }
    /// Fused operation and the use of SGLs.
    pub fn flags(&self) -> u8 {
        self.0[1]
    }
    /// The command's id.
    pub fn cid(&self) -> u16 {
        u16_at(&self.0, 2)
    }
    /// The type of a Fabrics command.
    pub fn fctype(&self) -> u8 {
        self.0[4]
    }
    /// The namespace.
    pub fn nsid(&self) -> u32 {
        u32_at(&self.0, 4)
    }
    /// Command dword `n`, 0 to 15.
    pub fn cdw(&self, n: usize) -> u32 {
        u32_at(&self.0, n * 4)
    }
    /// Where the data is.
    pub fn sgl(&self) -> Sgl {
        Sgl { address: u64_at(&self.0, 24), length: u32_at(&self.0, 32), kind: self.0[39] }
    }
    /// Whether data goes from the host to the controller.
    pub fn is_data_out(&self) -> bool {
        self.direction() == 1
    }
    /// Whether data goes from the controller to the host.
    pub fn is_data_in(&self) -> bool {
        self.direction() == 2
    }
    /// The specification puts the direction into the lowest two bits of opcodes.
    fn direction(&self) -> u8 {
        let code = if self.opcode() == FABRICS { self.fctype() } else { self.opcode() };
        code & 3
    }
}

impl core::fmt::Debug for Sqe {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Sqe(opcode {:#04x}, cid {}, nsid {:#x}", self.opcode(), self.cid(), self.nsid())?;
        (10..16).try_for_each(|n| write!(f, ", {:#x}", self.cdw(n)))?;
        write!(f, ")")
    }
}
