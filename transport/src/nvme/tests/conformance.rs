//! What hosts must not send, over loopback sockets: each is answered as the specification says, and a host beside it
//! goes on. The same fields are tried in memory by `protocol::nvme_tcp`; here they come in arbitrary pieces.

use super::*;
use protocol::nvme_tcp::Fatal;
use protocol::nvme_tcp::pdu::{self, Data};
use protocol::nvme_tcp::wire::{FABRICS, QUEUE_ENTRIES_MAX, flag, kind};
use std::collections::BTreeSet;

/// How far a host is when it misbehaves.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Stage {
    /// The connection is open.
    Open,
    /// ICReq is answered.
    Ready,
    /// The admin queue of an enabled controller that has an IO queue.
    Admin,
    /// An IO queue without digests.
    Io,
    /// An IO queue with both digests.
    Digests,
    /// A write of 8 KiB of which all is asked for.
    Asked,
}

/// What it gets.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Gets {
    /// A termination: fatal error status, and what goes with it.
    End(u16, u32),
    /// A termination for a digest, with the one that came.
    EndByDigest,
    /// A status; the queue goes on.
    Status(Status),
    /// A status, and the offset of the field of Connect that is wrong.
    Parameter(u32),
}

struct Case {
    name: String,
    stage: Stage,
    bytes: Box<dyn Fn(Option<Data>) -> Vec<u8> + Send>,
    gets: Gets,
}

fn patched(mut bytes: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

fn ic_req() -> Vec<u8> {
    let mut bytes = Vec::new();
    Codec::default().ic_req(Digests::default(), 0, 0, &mut bytes);
    bytes
}

fn capsule(stage: Stage, sqe: &Sqe, inline: &[u8]) -> Vec<u8> {
    let digests = Digests::from_bits(if stage == Stage::Digests { 3 } else { 0 });
    let mut bytes = Vec::new();
    Codec { digests, h2c_max: 0 }.command(sqe, inline, &mut bytes);
    bytes
}

fn write_inline(stage: Stage) -> Vec<u8> {
    capsule(stage, &command(io::WRITE, 0, 512, true), &[6; 512])
}

/// H2CData with these fields, and as much data as they tell.
fn h2c(fields: Data, flags: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    pdu::data(kind::H2C_DATA, flags, fields, Digests::default(), 4, &mut bytes);
    bytes.resize(bytes.len() + fields.length as usize, 0);
    bytes
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, stage, gets, bytes: Box<dyn Fn(Option<Data>) -> Vec<u8> + Send>| {
        cases.push(Case { name, stage, bytes, gets });
    };
    let mut fixed = |name: &str, stage, gets, bytes: Vec<u8>| {
        add(name.to_owned(), stage, gets, Box::new(move |_| bytes.clone()));
    };
    use fes::*;
    // ICReq, field by field.
    for bad in [1u8, 3, 5, 7, 8, 9, 0x7f, 0xff] {
        fixed("ICReq: type", Stage::Open, Gets::End(HEADER_FIELD, 0), patched(ic_req(), 0, &[bad]));
    }
    for other in [kind::COMMAND, kind::H2C_DATA] {
        fixed("before ICReq", Stage::Open, Gets::End(SEQUENCE, 0), patched(ic_req(), 0, &[other]));
    }
    for hlen in [0u8, 127, 129, 255] {
        fixed("ICReq: HLEN", Stage::Open, Gets::End(HEADER_FIELD, 2), patched(ic_req(), 2, &[hlen]));
    }
    for plen in [0u32, 8, 127, 129, u32::MAX] {
        let bytes = patched(ic_req(), 4, &plen.to_le_bytes());
        fixed("ICReq: PLEN", Stage::Open, Gets::End(HEADER_FIELD, 4), bytes);
    }
    for pfv in [1u16, 0x100, u16::MAX] {
        let bytes = patched(ic_req(), 8, &pfv.to_le_bytes());
        fixed("ICReq: PFV", Stage::Open, Gets::End(UNSUPPORTED, 8), bytes);
    }
    for hpda in [32u8, 255] {
        fixed("ICReq: HPDA", Stage::Open, Gets::End(HEADER_FIELD, 10), patched(ic_req(), 10, &[hpda]));
    }
    for stage in [Stage::Admin, Stage::Io, Stage::Digests] {
        fixed("ICReq late", stage, Gets::End(SEQUENCE, 0), ic_req());
    }
    fixed("ICReq twice", Stage::Ready, Gets::End(SEQUENCE, 0), ic_req());
    fixed("ICReq on a queue", Stage::Io, Gets::End(SEQUENCE, 0), ic_req());
    // Command capsules, field by field.
    for stage in [Stage::Ready, Stage::Io] {
        for bad in [1u8, 3, 5, 7, 8, 9, 0xff] {
            let bytes = patched(write_inline(stage), 0, &[bad]);
            fixed("capsule: type", stage, Gets::End(HEADER_FIELD, 0), bytes);
        }
        for hlen in [0u8, 24, 71, 73, 255] {
            let bytes = patched(write_inline(stage), 2, &[hlen]);
            fixed("capsule: HLEN", stage, Gets::End(HEADER_FIELD, 2), bytes);
        }
        for plen in [0u32, 8, 71] {
            let bytes = patched(write_inline(stage), 4, &plen.to_le_bytes());
            fixed("capsule: PLEN", stage, Gets::End(HEADER_FIELD, 4), bytes);
        }
        for pdo in [0u8, 8, 71, 73, 74, 75] {
            let bytes = patched(write_inline(stage), 3, &[pdo]);
            fixed("capsule: PDO", stage, Gets::End(HEADER_FIELD, 3), bytes);
        }
        for flags in [flag::HDGST, flag::DDGST, flag::HDGST | flag::DDGST] {
            let bytes = patched(write_inline(stage), 1, &[flags]);
            fixed("capsule: FLAGS", stage, Gets::End(HEADER_FIELD, 1), bytes);
        }
        let bytes = patched(write_inline(stage), 4, &u32::MAX.to_le_bytes());
        fixed("capsule: oversize", stage, Gets::End(LIMIT, 0), bytes);
        // The data would begin at 76, where the PDU ends.
        let bytes = patched(write_inline(stage), 3, &[76, 76, 0, 0, 0]);
        fixed("capsule: PDO at the end", stage, Gets::End(HEADER_FIELD, 4), bytes);
        let bytes = patched(write_inline(stage), 3, &[80, 76, 0, 0, 0]);
        fixed("capsule: PDO beyond the end", stage, Gets::End(HEADER_FIELD, 3), bytes);
    }
    let long = capsule(Stage::Io, &command(io::WRITE, 0, 17 << 10, true), &vec![0; 17 << 10]);
    let long_admin = capsule(Stage::Admin, &command(io::WRITE, 0, 9 << 10, true), &vec![0; 9 << 10]);
    fixed("more than an admin capsule takes", Stage::Admin, Gets::End(LIMIT, 0), long_admin);
    fixed("more than IOCCSZ", Stage::Io, Gets::End(LIMIT, 0), long);
    fixed("a response from a host", Stage::Io, Gets::End(HEADER_FIELD, 0), {
        let mut bytes = Vec::new();
        let cqe = Cqe { result: 0, sqhd: 0, cid: 0, status: Status::SUCCESS };
        pdu::response(cqe, Digests::default(), &mut bytes);
        bytes
    });
    // Digests.
    for flags in [0, flag::HDGST, flag::DDGST] {
        let bytes = patched(write_inline(Stage::Digests), 1, &[flags]);
        fixed("digests: FLAGS", Stage::Digests, Gets::End(HEADER_FIELD, 1), bytes);
    }
    for at in [8, 20, 72, 75] {
        let mut bytes = write_inline(Stage::Digests);
        bytes[at] ^= 0x10;
        fixed("header digest", Stage::Digests, Gets::EndByDigest, bytes);
    }
    for at in [76, 300, 76 + 511, 76 + 512] {
        let mut bytes = write_inline(Stage::Digests);
        bytes[at] ^= 1;
        fixed("data digest", Stage::Digests, Gets::Status(Status::TRANSIENT_TRANSPORT), bytes);
    }
    // H2CData that nobody asked for, and then unlike what was asked for.
    let stray = Data { cid: 7, ttag: 0x100, offset: 0, length: 512 };
    for stage in [Stage::Ready, Stage::Io] {
        fixed("H2CData unasked", stage, Gets::End(HEADER_FIELD, 10), h2c(stray, flag::LAST));
    }
    type Change = fn(Data) -> Data;
    let changes: [(&str, Change, u8, Gets); 12] = [
        ("TTAG 0", |d| Data { ttag: 0, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 10)),
        ("TTAG of nobody", |d| Data { ttag: d.ttag ^ 1, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 10)),
        ("TTAG of before", |d| Data { ttag: d.ttag - 0x100, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 10)),
        ("TTAG", |d| Data { ttag: u16::MAX, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 10)),
        ("CCCID", |d| Data { cid: d.cid + 1, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 8)),
        (
            "DATAO out of order",
            |d| Data { offset: 4096, length: 4096, ..d },
            flag::LAST,
            Gets::End(SEQUENCE, 0),
        ),
        ("DATAO wraps", |d| Data { offset: u32::MAX, length: 512, ..d }, flag::LAST, Gets::End(SEQUENCE, 0)),
        ("beyond the R2T", |d| Data { length: 8196, ..d }, flag::LAST, Gets::End(OUT_OF_RANGE, 0)),
        ("DATAL 0", |d| Data { length: 0, ..d }, 0, Gets::End(HEADER_FIELD, 16)),
        ("LAST missing", |d| d, 0, Gets::End(HEADER_FIELD, 1)),
        ("LAST early", |d| Data { length: 4096, ..d }, flag::LAST, Gets::End(HEADER_FIELD, 1)),
        ("digest flags", |d| d, flag::LAST | flag::DDGST, Gets::End(HEADER_FIELD, 1)),
    ];
    for (name, change, flags, gets) in changes {
        let bytes = move |asked: Option<Data>| h2c(change(asked.expect("it was asked for")), flags);
        add(format!("H2CData: {name}"), Stage::Asked, gets, Box::new(bytes));
    }
    for (name, at, value, gets) in [
        ("type of a controller's", 0, 7u32, Gets::End(HEADER_FIELD, 0)),
        ("HLEN", 2, 0, Gets::End(HEADER_FIELD, 2)),
        ("HLEN", 2, 23, Gets::End(HEADER_FIELD, 2)),
        ("HLEN", 2, 25, Gets::End(HEADER_FIELD, 2)),
        ("HLEN", 2, 255, Gets::End(HEADER_FIELD, 2)),
        ("PDO", 3, 0, Gets::End(HEADER_FIELD, 3)),
        ("PDO", 3, 8, Gets::End(HEADER_FIELD, 3)),
        ("PDO", 3, 26, Gets::End(HEADER_FIELD, 3)),
        ("PLEN", 4, 0, Gets::End(HEADER_FIELD, 4)),
        ("PLEN", 4, 20, Gets::End(HEADER_FIELD, 4)),
        ("PLEN", 4, 24, Gets::End(HEADER_FIELD, 16)),
        ("PLEN", 4, u32::MAX, Gets::End(HEADER_FIELD, 16)),
        ("DATAL unlike PLEN", 16, 4096, Gets::End(HEADER_FIELD, 16)),
    ] {
        let bytes = move |asked: Option<Data>| {
            let bytes = h2c(asked.expect("it was asked for"), flag::LAST);
            let width = if at < 4 { 1 } else { 4 };
            patched(bytes, at, &value.to_le_bytes()[..width])
        };
        add(format!("H2CData: {name}"), Stage::Asked, gets, Box::new(bytes));
    }
    connects(&mut add);
    // Commands at the wrong time, and in the wrong form.
    let mut refused = |name: &str, stage, status: Status, sqe: Sqe, inline: &[u8]| {
        let bytes = capsule(stage, &sqe, inline);
        add(name.to_owned(), stage, Gets::Status(status.dnr()), Box::new(move |_| bytes.clone()));
    };
    let end = VOLUME_BYTES;
    let read = |offset, bytes| command(io::READ, offset, bytes, false);
    refused("Read before Connect", Stage::Ready, Status::SEQUENCE, read(0, 512), &[]);
    refused(
        "Keep Alive before Connect",
        Stage::Ready,
        Status::SEQUENCE,
        Sqe::new(admin::KEEP_ALIVE, 1, 0),
        &[],
    );
    refused(
        "Property Get before Connect",
        Stage::Ready,
        Status::SEQUENCE,
        Sqe::property_get(1, 0, true),
        &[],
    );
    let connect = connect_data([3; 16], u16::MAX, &subsystem(), "nqn.host");
    refused("Connect twice", Stage::Io, Status::SEQUENCE, Sqe::connect(1, 1, 32, 0), &connect);
    refused("unknown opcode", Stage::Io, Status::INVALID_OPCODE, Sqe::new(0x7e, 1, 1), &[]);
    refused("Fabrics on an IO queue", Stage::Io, Status::INVALID_OPCODE, Sqe::new(FABRICS, 1, 0x55), &[]);
    refused("admin on an IO queue", Stage::Io, Status::INVALID_OPCODE, Sqe::new(admin::IDENTIFY, 1, 1), &[]);
    let mut flush = Sqe::new(io::FLUSH, 7, NSID);
    refused("an id in use", Stage::Asked, Status::ID_CONFLICT, flush, &[]);
    refused("an id in use", Stage::Asked, Status::ID_CONFLICT, command(io::WRITE, 0, 512, true), &[6; 512]);
    flush.0[1] = 0x80;
    refused("SGL segments", Stage::Io, Status::INVALID_FIELD, flush, &[]);
    for nsid in [0, 2, u32::MAX] {
        refused("namespace", Stage::Io, Status::INVALID_NAMESPACE, read(0, 512).with(1, nsid), &[]);
    }
    refused("past the end", Stage::Io, Status::LBA_RANGE, read(end, 512), &[]);
    refused("across the end", Stage::Io, Status::LBA_RANGE, read(end - 512, 1024), &[]);
    refused("an LBA that wraps", Stage::Io, Status::LBA_RANGE, read(0, 512).with_range(u64::MAX, 1), &[]);
    let large = read(0, 512).with_range(0, 2049).with_data(2049 * 512, false);
    refused("above MDTS", Stage::Io, Status::INVALID_FIELD, large, &[]);
    refused(
        "a length unlike the blocks",
        Stage::Io,
        Status::SGL_LENGTH,
        read(0, 512).with_data(1024, false),
        &[],
    );
    let mut odd = read(0, 512);
    odd.0[39] = 0;
    refused("SGL type", Stage::Io, Status::SGL_TYPE, odd, &[]);
    let offset = command(io::WRITE, 0, 512, true).with(6, 4);
    refused("an offset in the capsule", Stage::Io, Status::SGL_OFFSET, offset, &[6; 512]);
    let more = command(io::WRITE, 0, 1024, true);
    refused("less data than told", Stage::Io, Status::SGL_LENGTH, more, &[6; 512]);
    for flags in [0, 1 << 6 | 1, 1 << 6 | 2] {
        let mut sqe = read(0, 512);
        sqe.0[1] = flags;
        refused("PRPs, or fused", Stage::Io, Status::INVALID_FIELD, sqe, &[]);
    }
    let ranges = Sqe::new(io::DSM, 1, NSID).with(10, 1).with(11, 4).with_data(16, true);
    refused("fewer ranges than told", Stage::Io, Status::SGL_LENGTH, ranges, &[0; 16]);
    admin_commands(&mut refused);
    let aers = (20..25).flat_map(|cid| capsule(Stage::Admin, &Sqe::new(admin::ASYNC_EVENT, cid, 0), &[]));
    let aers: Vec<u8> = aers.collect();
    add(
        "one Async Event Request too many".into(),
        Stage::Admin,
        Gets::Status(Status::AER_LIMIT.dnr()),
        Box::new(move |_| aers.clone()),
    );
    cases
}

type Refuse<'a> = &'a mut dyn FnMut(&str, Stage, Status, Sqe, &[u8]);
type Add<'a> = &'a mut dyn FnMut(String, Stage, Gets, Box<dyn Fn(Option<Data>) -> Vec<u8> + Send>);

/// Connect, each of its fields wrong.
fn connects(add: Add<'_>) {
    let mut refused = |name: &str, stage, gets, sqe: Sqe, data: &[u8]| {
        let bytes = capsule(stage, &sqe, data);
        add(format!("Connect: {name}"), stage, gets, Box::new(move |_| bytes.clone()));
    };
    let good = connect_data([3; 16], u16::MAX, &subsystem(), "nqn.host");
    let admin = Sqe::connect(1, 0, 32, 0);
    let status = |status: Status| Gets::Status(status.dnr());
    for stage in [Stage::Admin, Stage::Io] {
        refused("twice", stage, status(Status::SEQUENCE), Sqe::connect(1, 1, 32, 0), &good);
    }
    for bytes in [512u32, 1020] {
        let (sqe, data) = (admin.with_data(bytes, true), &good[..bytes as usize]);
        refused("not all of its data", Stage::Ready, status(Status::SGL_LENGTH), sqe, data);
    }
    refused("no data", Stage::Ready, status(Status::SGL_LENGTH), admin.with_data(0, true), &[]);
    refused(
        "data to be asked for",
        Stage::Ready,
        status(Status::SGL_LENGTH),
        admin.with_data(1024, false),
        &[],
    );
    let field = |at: usize, value: u16| {
        let mut sqe = admin;
        sqe.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
        sqe
    };
    refused("RECFMT", Stage::Ready, status(Status::CONNECT_FORMAT), field(40, 1), &good);
    for sqsize in [0, QUEUE_ENTRIES_MAX, u16::MAX] {
        refused("SQSIZE", Stage::Ready, Gets::Parameter(44), field(44, sqsize), &good);
    }
    // Of a controller that is not there; of any.
    for qid in [1, u16::MAX] {
        refused("an IO queue first", Stage::Ready, Gets::Parameter(1 << 16 | 16), field(42, qid), &good);
    }
    let mut data = |name: &str, at: usize, value: &[u8], sqe: Sqe| {
        let data = patched(good.clone(), at, value);
        refused(name, Stage::Ready, Gets::Parameter(1 << 16 | at as u32), sqe, &data);
    };
    data("no controller of that id", 16, &[0x77, 0x77], field(42, 1));
    data("an id for an admin queue", 16, &[1, 0], admin);
    for at in [256, 512] {
        let field = if at == 256 { "SUBNQN" } else { "HOSTNQN" };
        data(&format!("{field} empty"), at, &[0; 256], admin);
        data(&format!("{field} without its end"), at, &[b'a'; 256], admin);
        data(&format!("{field} of 224 bytes"), at, &[&[b'a'; 224][..], &[0]].concat(), admin);
        data(&format!("{field} is no text"), at, &[0xff, 0], admin);
    }
    data("SUBNQN of nobody", 256, b"nqn.nobody\0", admin);
}

/// Commands of the admin queue in the wrong form.
fn admin_commands(refused: Refuse<'_>) {
    let mut refused = |name: &str, status: Status, sqe: Sqe| refused(name, Stage::Admin, status, sqe, &[]);
    for opcode in [0x00, 0x01, 0x04, 0x05, 0x0d, 0x10, 0x11, 0x14, 0x15, 0x1a, 0x80, 0x84, 0xc0, 0xff] {
        refused("admin: unknown opcode", Status::INVALID_OPCODE, Sqe::new(opcode, 1, 0));
    }
    for fctype in [0x05, 0x06, 0x08, 0x55, 0xff] {
        let mut sqe = Sqe::new(FABRICS, 1, 0);
        sqe.0[4] = fctype;
        refused("admin: unknown type of Fabrics command", Status::INVALID_OPCODE, sqe);
    }
    for flags in [0, 1 << 6 | 1, 1 << 6 | 2, 0x80] {
        let mut sqe = Sqe::new(admin::KEEP_ALIVE, 1, 0);
        sqe.0[1] = flags;
        refused("admin: PRPs, fused, or segments", Status::INVALID_FIELD, sqe);
    }
    let get = |offset, long| Sqe::property_get(1, offset, long);
    for sqe in [
        get(property::CAP, false),
        get(property::CC, true),
        get(0x10, false),
        get(0x28, true),
        get(u32::MAX, false),
    ] {
        refused("Property Get", Status::INVALID_FIELD, sqe);
    }
    for sqe in [
        Sqe::property_set(1, property::CAP, 1),
        Sqe::property_set(1, property::CSTS, 0),
        Sqe::property_set(1, property::CC, 1).with(10, 1),
    ] {
        refused("Property Set", Status::INVALID_FIELD, sqe);
    }
    let identify = |cns: u32, nsid| Sqe::new(admin::IDENTIFY, 1, nsid).with_data(4096, false).with(10, cns);
    for cns in [0x0a, 0x10, 0x55, 0xff] {
        refused("Identify: CNS", Status::INVALID_FIELD, identify(cns, 0));
    }
    for cns in [0x05, 0x06, 0x07] {
        refused("Identify: CSI", Status::INVALID_FIELD, identify(cns, NSID).with(11, 2 << 24));
    }
    for (cns, nsid) in
        [(0, 0), (0, 2), (3, 2), (3, u32::MAX), (5, 2), (8, 0), (2, u32::MAX), (7, u32::MAX - 1)]
    {
        refused("Identify: namespace", Status::INVALID_NAMESPACE, identify(cns, nsid));
    }
    for bytes in [0, 1, 4095] {
        refused("Identify: length", Status::SGL_LENGTH, identify(1, 0).with_data(bytes, false));
    }
    refused("Identify: SGL type", Status::SGL_TYPE, identify(1, 0).with_data(4096, true));
    let log = |page: u32, bytes: u32| {
        Sqe::new(admin::GET_LOG_PAGE, 1, 0).with_data(bytes, false).with(10, (bytes / 4 - 1) << 16 | page)
    };
    for page in [0x06, 0x0b, 0x70, 0x71, 0x80, 0xff] {
        refused("Get Log Page: unknown", Status::INVALID_LOG_PAGE, log(page, 512));
    }
    refused("Get Log Page: odd offset", Status::INVALID_FIELD, log(2, 512).with(12, 2));
    refused("Get Log Page: offset beyond the end", Status::INVALID_FIELD, log(2, 512).with(12, 516));
    refused("Get Log Page: offset far beyond", Status::INVALID_FIELD, log(2, 512).with(13, u32::MAX));
    refused("Get Log Page: above MDTS", Status::INVALID_FIELD, log(2, 512).with(11, 0xffff));
    refused("Get Log Page: more than it has room for", Status::SGL_LENGTH, log(2, 512).with_data(508, false));
    let set = |feature: u32, value| Sqe::new(admin::SET_FEATURES, 1, 0).with(10, feature).with(11, value);
    let get = |feature: u32| Sqe::new(admin::GET_FEATURES, 1, 0).with(10, feature);
    for unknown in [0x00, 0x03, 0x06, 0x0c, 0x0d, 0x80, 0xff] {
        refused("Set Features: unknown", Status::INVALID_FIELD, set(unknown, 1));
        refused("Get Features: unknown", Status::INVALID_FIELD, get(unknown));
    }
    refused("Set Features: to be saved", Status::NOT_SAVEABLE, set(1 << 31 | 0x0f, 1));
    refused("Set Features: queues while there are some", Status::SEQUENCE, set(0x07, 1 << 16 | 1));
    refused("Set Features: 65,536 queues", Status::INVALID_FIELD, set(0x07, 0xffff));
    refused("Set Features: the host's id", Status::SEQUENCE, set(0x81, 1));
    refused("Set Features: power", Status::INVALID_FIELD, set(0x02, 1));
    for select in [1, 2, 3, 7] {
        refused("Get Features: saved and default values", Status::INVALID_FIELD, get(select << 8 | 0x0f));
    }
    refused("Get Features: the host's id, short", Status::INVALID_FIELD, get(0x81));
    let host_id = get(0x81).with(11, 1).with_data(8, false);
    refused("Get Features: no room", Status::SGL_LENGTH, host_id);
}

/// A queue at the stage, and what it was asked for; its admin queue lives as long.
fn reach(addr: SocketAddr, stage: Stage) -> (Option<Queue>, Queue, Option<Data>) {
    match stage {
        Stage::Open => {
            let wire = TcpStream::connect(addr).unwrap();
            wire.set_nodelay(true).unwrap();
            wire.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            (None, Queue { wire, codec: Codec::default(), input: Vec::new() }, None)
        }
        Stage::Ready => (None, Queue::open(addr, 0, 0, 0), None),
        Stage::Admin => {
            let (admin, io) = attach(addr, 0, 0, 0, true);
            (Some(io), admin, None)
        }
        Stage::Io | Stage::Digests | Stage::Asked => {
            let digests = if stage == Stage::Digests { 3 } else { 0 };
            let (admin, mut queue) = attach(addr, digests, 0, 0, true);
            let mut asked = None;
            if stage == Stage::Asked {
                queue.send(&command(io::WRITE, 4096, 8192, false), &[]);
                let HostEvent::R2t(r2t) = queue.event() else { panic!("data is asked for") };
                asked = Some(r2t);
            }
            (Some(admin), queue, asked)
        }
    }
}

/// Sends in pieces of any length; the other side may have closed before all of it went.
fn send_in_pieces(wire: &mut TcpStream, mut bytes: &[u8], random: &mut Random) {
    while !bytes.is_empty() {
        let (some, rest) = bytes.split_at((1 + random.below(200) as usize).min(bytes.len()));
        if wire.write_all(some).is_err() {
            return;
        }
        if random.below(3) == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
        bytes = rest;
    }
}

#[test]
fn every_malformed_pdu_and_command_is_answered_as_specified_and_the_others_go_on() {
    let cases = cases();
    let count = cases.len();
    let refused = |case: &&Case| matches!(case.gets, Gets::Status(_) | Gets::Parameter(_));
    let ends = count - cases.iter().filter(refused).count();
    let seen = serve(Manner::default(), move |addr| {
        let (_admin, mut good) = attach(addr, 3, 0, 0, true);
        let mut random = Random(4);
        let mut statuses = BTreeSet::new();
        let model = vec![9; 16 << 10];
        good.run(&command(io::WRITE, 1 << 20, 16 << 10, false), &[], &model, 4096);
        for case in cases {
            let (_admin, mut bad, asked) = reach(addr, case.stage);
            send_in_pieces(&mut bad.wire, &(case.bytes)(asked), &mut random);
            let name = &case.name;
            match (case.gets, bad.event()) {
                (Gets::End(fes, info), event) => {
                    assert_eq!(event, HostEvent::Terminated { fes, info }, "{name} at {:?}", case.stage);
                }
                (Gets::EndByDigest, event) => {
                    let told = matches!(event, HostEvent::Terminated { fes: fes::HEADER_DIGEST, .. });
                    assert!(told, "{name}: {event:?}");
                }
                (Gets::Status(status), HostEvent::Response(cqe)) => {
                    assert_eq!(cqe.status, status, "{name} at {:?}", case.stage);
                    statuses.insert(status.code());
                    goes_on(&mut bad, case.stage, asked);
                }
                (Gets::Parameter(at), HostEvent::Response(cqe)) => {
                    let told = (cqe.status, cqe.result);
                    assert_eq!(told, (Status::CONNECT_PARAMETER.dnr(), at.into()), "{name}");
                    statuses.insert(cqe.status.code());
                    goes_on(&mut bad, case.stage, asked);
                }
                (gets, event) => panic!("{name}: {event:?} instead of {gets:?}"),
            }
            assert!(good.ok(&command(io::READ, 1 << 20, 16 << 10, false)).1 == model, "after {name}");
        }
        let known = STATUSES.iter().map(|status| status.code()).collect();
        assert_eq!(statuses, known, "every status that a host can bring about was seen");
    });
    let broken = |reason: &&NvmeCloseReason| matches!(reason, NvmeCloseReason::Violation(_));
    assert_eq!(seen.closed.iter().filter(broken).count(), ends);
    eprintln!(
        "{count} cases of conformance over loopback sockets: {ends} end the connection, the others get one of {} \
         statuses",
        STATUSES.len()
    );
}

/// What a host gets for what it sends. Others tell how IO went; see `a_piece_that_fails` and its kin.
const STATUSES: [Status; 15] = [
    Status::INVALID_OPCODE,
    Status::INVALID_FIELD,
    Status::ID_CONFLICT,
    Status::INVALID_NAMESPACE,
    Status::SEQUENCE,
    Status::SGL_LENGTH,
    Status::SGL_TYPE,
    Status::SGL_OFFSET,
    Status::TRANSIENT_TRANSPORT,
    Status::LBA_RANGE,
    Status::AER_LIMIT,
    Status::INVALID_LOG_PAGE,
    Status::NOT_SAVEABLE,
    Status::CONNECT_FORMAT,
    Status::CONNECT_PARAMETER,
];

/// A queue whose command was refused takes the next one.
fn goes_on(queue: &mut Queue, stage: Stage, asked: Option<Data>) {
    match (stage, asked) {
        (Stage::Asked, Some(r2t)) => {
            let mut bytes = Vec::new();
            queue.codec.h2c_data(r2t, &[5; 8192], u32::MAX, &mut bytes);
            queue.wire.write_all(&bytes).unwrap();
            assert!(matches!(queue.event(), HostEvent::Response(cqe) if cqe.status.is_ok()));
        }
        (Stage::Io | Stage::Digests | Stage::Asked, _) => drop(queue.ok(&command(io::READ, 0, 4096, false))),
        (Stage::Admin, _) => drop(queue.ok(&Sqe::new(admin::KEEP_ALIVE, 99, 0))),
        (Stage::Open | Stage::Ready, _) => drop(queue.connect(0, u16::MAX, true)),
    }
}

/// Whatever is left of the connection: true if it is closed without another word.
fn is_cut(mut queue: Queue) -> bool {
    queue.input.is_empty() && queue.wire.read(&mut [0; 16]).unwrap_or(0) == 0
}

#[test]
fn a_flood_of_terminations_is_answered_by_closing_and_nothing_else() {
    const EACH: usize = 250;
    let stages = [Stage::Open, Stage::Ready, Stage::Admin, Stage::Io];
    let seen = serve(Manner::default(), move |addr| {
        let (_admin, mut good) = attach(addr, 0, 0, 0, true);
        for round in 0..EACH {
            for stage in stages {
                let (_other, mut bad, _) = reach(addr, stage);
                let mut bytes = Vec::new();
                let fatal = Fatal { fes: (round % 8) as u16, info: 0, what: "" };
                pdu::terminate(kind::H2C_TERM, fatal, &vec![7; round % 129], &mut bytes);
                bad.wire.write_all(&bytes).unwrap();
                assert!(is_cut(bad), "{stage:?} in round {round}");
            }
            good.ok(&command(io::READ, 0, 4096, false));
        }
    });
    let told =
        |reason: &&NvmeCloseReason| matches!(reason, NvmeCloseReason::Violation(Violation::Terminated(_)));
    assert_eq!(seen.closed.iter().filter(told).count(), EACH * stages.len());
}

#[test]
fn a_transfer_of_one_queue_takes_no_data_of_another_and_a_finished_one_takes_none() {
    serve(Manner::default(), |addr| {
        let (_admin, mut mine, asked) = reach(addr, Stage::Asked);
        let asked = asked.expect("it was asked for");
        let (_other_admin, mut other) = attach(addr, 0, 0, 0, true);
        other.wire.write_all(&h2c(asked, flag::LAST)).unwrap();
        assert_eq!(other.event(), HostEvent::Terminated { fes: fes::HEADER_FIELD, info: 10 });
        goes_on(&mut mine, Stage::Asked, Some(asked));
        mine.wire.write_all(&h2c(asked, flag::LAST)).unwrap();
        assert_eq!(mine.event(), HostEvent::Terminated { fes: fes::HEADER_FIELD, info: 10 });
    });
}

#[test]
fn a_controller_that_is_reset_amid_io_lets_its_io_queues_go_and_comes_back() {
    serve(Manner::shuffled(), |addr| {
        let (_good_admin, mut good) = attach(addr, 0, 0, 0, true);
        for round in 0..20u16 {
            let mut admin = Queue::open(addr, 0, 0, 0);
            let id = admin.connect(0, u16::MAX, true);
            for _ in 0..3 {
                admin.ok(&Sqe::property_set(1, property::CC, CC_ENABLE));
                let mut io = Queue::open(addr, 0, 0, 0);
                io.connect(1, id, true);
                let mut bytes = Vec::new();
                for cid in 0..32u16 {
                    let mut sqe = command(io::WRITE, usize::from(cid) << 16, 8192, true);
                    sqe.0[2..4].copy_from_slice(&cid.to_le_bytes());
                    io.codec.command(&sqe, &[3; 8192], &mut bytes);
                }
                // Some of it, up to the middle of a command.
                io.wire.write_all(&bytes[..bytes.len() - usize::from(round) * 997]).unwrap();
                admin.ok(&Sqe::property_set(1, property::CC, CC_ENABLE & !1));
                assert_eq!(admin.ok(&Sqe::property_get(1, property::CSTS, false)).0, 0);
                while io.wire.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
                good.ok(&command(io::READ, 0, 4096, false));
            }
        }
    });
}

#[test]
fn only_the_host_that_said_nothing_for_its_own_time_is_let_go() {
    serve(Manner::default(), |addr| {
        let open = |kato_ms| {
            let mut admin = Queue::open(addr, 0, 0, 0);
            let data = connect_data([3; 16], u16::MAX, &subsystem(), "nqn.host");
            let (cqe, _) = admin.run(&Sqe::connect(0, 0, 32, kato_ms), &data, &[], u32::MAX);
            admin.ok(&Sqe::property_set(1, property::CC, CC_ENABLE));
            let mut io = Queue::open(addr, 0, 0, 0);
            io.connect(1, cqe.result as u16, true);
            (admin, io)
        };
        let (silent, speaking, without) = (open(100), open(60_000), open(0));
        assert!(is_cut(silent.1) && is_cut(silent.0), "both of its queues");
        for (mut admin, mut io) in [speaking, without] {
            admin.ok(&Sqe::new(admin::KEEP_ALIVE, 1, 0));
            io.ok(&command(io::READ, 0, 4096, false));
        }
    });
}

#[test]
fn a_thousand_connections_are_served_at_once() {
    let seen = serve(Manner::default(), |addr| {
        // 200 controllers with five queues each: fewer than a subsystem's 255.
        let mut hosts = Vec::new();
        for _ in 0..200 {
            let mut admin = Queue::open(addr, 0, 0, 0);
            let id = admin.connect(0, u16::MAX, true);
            admin.ok(&Sqe::property_set(1, property::CC, CC_ENABLE));
            let queue = |qid| {
                let mut io = Queue::open(addr, 0, 0, 0);
                io.connect(qid, id, true);
                io
            };
            hosts.push((admin, (1..5).map(queue).collect::<Vec<_>>()));
        }
        for round in 0..2u8 {
            for (at, (_, queues)) in hosts.iter_mut().enumerate() {
                let offset = at * 8192;
                let data = vec![at as u8 ^ round; 4096];
                let (cqe, _) = queues[0].run(&command(io::WRITE, offset, 4096, true), &data, &[], 0);
                assert_eq!(cqe.status, Status::SUCCESS);
                for queue in &mut queues[1..] {
                    assert!(queue.ok(&command(io::READ, offset, 4096, false)).1 == data, "host {at}");
                }
            }
        }
    });
    assert_eq!(seen.conns_max, 1000);
}

#[test]
fn headers_that_drip_in_mean_the_same_and_hold_up_nobody() {
    serve(Manner::default(), |addr| {
        let drips: Vec<_> = (0..8u64)
            .map(|seed| {
                std::thread::spawn(move || {
                    let (_, mut slow, _) = reach(addr, Stage::Open);
                    let data = connect_data([3; 16], u16::MAX, &subsystem(), "nqn.host");
                    let mut bytes = ic_req();
                    slow.codec.command(&Sqe::connect(0, 0, 32, 0), &data[..], &mut bytes);
                    let headers = 128 + 72;
                    for byte in &bytes[..headers] {
                        slow.wire.write_all(&[*byte]).unwrap();
                        std::thread::sleep(Duration::from_micros(500 + seed * 100));
                    }
                    assert!(matches!(slow.event(), HostEvent::Ready(_)));
                    slow.wire.write_all(&bytes[headers..]).unwrap();
                    assert!(matches!(slow.event(), HostEvent::Response(cqe) if cqe.status.is_ok()));
                })
            })
            .collect();
        let (_admin, mut good) = attach(addr, 0, 0, 0, true);
        while !drips.iter().all(std::thread::JoinHandle::is_finished) {
            good.ok(&command(io::READ, 0, 4096, false));
        }
        drips.into_iter().for_each(|drip| drip.join().unwrap());
    });
}

/// Hosts that tell lengths and send nothing of it, that stop in the middle, that ask and do not take.
#[test]
fn hosts_that_lie_stall_and_flood_hold_no_more_than_their_budget_and_an_honest_one_goes_on() {
    const HOSTS: usize = 12;
    let budget = 1 << 20;
    let limits = NvmeLimits { bytes_max: budget, arena_reserve_blocks: 1024, ..Manner::default().limits };
    // All budgets together are more than the arena has; half of it is out of their reach.
    let manner =
        Manner { limits, temper: Temper { arena_bytes: 8 << 20, ..Temper::default() }, ..Manner::default() };
    let seen = serve(manner, |addr| {
        let (_admin, mut good) = attach(addr, 0, 0, 0, true);
        let mut bad: Vec<_> = (0..HOSTS).map(|_| attach(addr, 0, 0, 3, true)).collect();
        for (at, (_, io)) in bad.iter_mut().enumerate() {
            io.wire.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            let mut bytes = Vec::new();
            for cid in 0..100u16 {
                let (opcode, inline) = match at % 3 {
                    // Lies: 1 MiB each, of which nothing comes.
                    0 => (io::WRITE, 0),
                    // Asks for 1 MiB each and takes nothing.
                    1 => (io::READ, 0),
                    // Floods with capsules and does not look at the answers.
                    _ => (io::WRITE, 16 << 10),
                };
                let length = if inline > 0 { inline } else { 1 << 20 };
                let mut sqe = command(opcode, usize::from(cid % 16) << 20, length, inline > 0);
                sqe.0[2..4].copy_from_slice(&cid.to_le_bytes());
                io.codec.command(&sqe, &vec![1; inline], &mut bytes);
            }
            if at % 3 == 2 {
                // And stops in the middle of the last one.
                bytes.truncate(bytes.len() - 5000);
            }
            // Whoever is not read from any more has no choice.
            let _ = io.wire.write_all(&bytes);
        }
        for round in 0..50u8 {
            let data = vec![round; 256 << 10];
            let (cqe, _) = good.run(&command(io::WRITE, 20 << 20, 256 << 10, false), &[], &data, 1 << 17);
            assert_eq!(cqe.status, Status::SUCCESS);
            assert!(good.ok(&command(io::READ, 20 << 20, 256 << 10, false)).1 == data);
        }
    });
    assert!(seen.bytes_max <= budget + HEADERS, "{}", seen.bytes_max);
    eprintln!("of a budget of {budget} bytes each, the greediest of {HOSTS} hosts held {}", seen.bytes_max);
}
