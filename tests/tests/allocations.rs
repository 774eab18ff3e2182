//! What the data path of a core takes from the heap, counted: nothing for a read.
//!
//! One core as the daemon builds it, over the kernel's ring and files in memory, with a host on loopback. Counted
//! is what the core's own thread allocates while it turns: sockets, protocol, routing, shard, store, reactor. A
//! second brings a few dozen allocations that have nothing to do with IO (the standing that is published, housekeeping),
//! so a handful in 100,000 is what nothing looks like.

use protocol::map::{
    ClusterMap, CopysetEntry, ExportEntry, ExportProtocol, Session, TargetEntry, VolumeEntry,
};
use protocol::types::{BLOCK_BYTES, CopysetId, ShardAddr, Span, TargetId, VolumeId};
use reactor::host::{CoreLoop, Turn};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, Reactor};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use target_daemon::assemble::{ShardPlan, build_core, format_shard};
use target_daemon::control::{ToShard, shard_ports};
use target_daemon::core_loop::{Core, Port};

/// IOs that are counted.
const IOS: u64 = 100_000;
/// Sent at once, then all are waited for.
const DEPTH: u64 = 32;
/// Blocks that are read and written: 32 MiB, in two chunks.
const BLOCKS: u64 = 8192;
const READ: u16 = 0;
const WRITE: u16 = 1;

fn map() -> ClusterMap {
    let me = ShardAddr { target: TargetId(1), shard: 0 };
    let mut map = ClusterMap { cluster: [7; 16], generation: 1, ..ClusterMap::default() };
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    map.targets.insert(me.target, TargetEntry { peers: vec![nowhere], nvme: None, draining: false });
    map.copysets.insert(CopysetId(1), CopysetEntry { members: vec![me], epoch: 0 });
    let volume = VolumeEntry {
        name: "v".into(),
        bytes: BLOCKS * BLOCK_BYTES as u64,
        block_bytes: BLOCK_BYTES as u32,
        copysets: vec![CopysetId(1)],
        deleted: false,
        session: Session::default(),
    };
    map.volumes.insert(VolumeId(1), volume);
    let export =
        ExportEntry { volume: VolumeId(1), protocol: ExportProtocol::Nbd, allowed_hosts: Default::default() };
    map.exports.push(export);
    map
}

/// A core that keeps the only replica of a volume in memory, and where hosts reach it.
fn core() -> (Core<Ring>, SocketAddr) {
    let config = RingConfig { arena_bytes: 32 << 20, memory_files: true, ..RingConfig::default() };
    let mut ring = Ring::new(config).expect("a ring");
    let layout = chunkstore::Layout {
        segment_bytes: 8 << 20,
        slots_max: 16,
        ram_blocks_max: 3072,
        ..chunkstore::Layout::default()
    };
    let plan = ShardPlan {
        dir: PathBuf::from("/nowhere"),
        me: ShardAddr { target: TargetId(1), shard: 0 },
        disk: [1; 16],
        layout,
        election_timeout: Span::ms(100),
        heartbeat: Span::ms(20),
        hibernate_after: Span::ms(60_000),
        io_timeout: None,
        catch_up_bytes_s: 64 << 20,
    };
    format_shard(&mut ring, &plan).expect("formatted");
    let waker = ring.waker();
    let (ends, mut ports) = shard_ports(vec![Box::new(move || waker.wake())]);
    let port = ports.pop().expect("one shard, one port");
    let mut address = None;
    let listen = |ring: &mut Ring| {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = ring.listen(local).expect("a port");
        if let Ok(Addr::Tcp(at)) = ring.listener_addr(listener) {
            address = Some(at);
        }
        Ok(vec![(Port::Nbd, listener)])
    };
    let stop = Arc::new(AtomicBool::new(false));
    let core = build_core(ring, &plan, port, Vec::new(), stop, listen).expect("a core");
    let _ = ends.shards()[0].send(ToShard::Map(Arc::new(map())));
    // The control side outlives the core.
    std::mem::forget(ends);
    (core, address.expect("a TCP listener has an address"))
}

/// An NBD client of the simplest kind.
struct Host {
    socket: TcpStream,
    out: Vec<u8>,
    back: Vec<u8>,
    draw: u64,
}

impl Host {
    fn attach(address: SocketAddr) -> Self {
        let mut socket = TcpStream::connect(address).expect("accepted");
        socket.set_nodelay(true).expect("a TCP socket");
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.push(b'v');
        socket.write_all(&hello).expect("heard");
        let mut export = [0; 10];
        socket.read_exact(&mut export).expect("an export");
        Self { socket, out: Vec::new(), back: Vec::new(), draw: 9 }
    }

    /// One round of requests of a kind, at blocks that `pick` names.
    fn round(&mut self, kind: u16, mut pick: impl FnMut(u64) -> u64) {
        self.out.clear();
        for nth in 0..DEPTH {
            self.draw = self.draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = pick(self.draw >> 33);
            self.out.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
            self.out.extend_from_slice(&0_u16.to_be_bytes());
            self.out.extend_from_slice(&kind.to_be_bytes());
            self.out.extend_from_slice(&nth.to_be_bytes());
            self.out.extend_from_slice(&(block * BLOCK_BYTES as u64).to_be_bytes());
            self.out.extend_from_slice(&(BLOCK_BYTES as u32).to_be_bytes());
            if kind == WRITE {
                self.out.resize(self.out.len() + BLOCK_BYTES, block as u8 | 1);
            }
        }
        self.socket.write_all(&self.out).expect("taken");
        let answer = if kind == READ { 16 + BLOCK_BYTES } else { 16 };
        self.back.resize(answer * DEPTH as usize, 0);
        self.socket.read_exact(&mut self.back).expect("answered");
        for reply in self.back.chunks(answer) {
            assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "an answer without error");
        }
    }
}

/// Turns a core while a host works; tells what the core's thread allocated meanwhile.
fn count(core: &mut Core<Ring>, host: Host, work: fn(&mut Host)) -> (Host, u64) {
    let done = Arc::new(AtomicBool::new(false));
    let waker = core.waker();
    let told = done.clone();
    let working = thread::spawn(move || {
        let mut host = host;
        work(&mut host);
        told.store(true, Ordering::Release);
        waker.wake();
        host
    });
    let counted = allocation_counter::measure(|| {
        while !done.load(Ordering::Acquire) {
            assert!(matches!(core.turn(), Turn::Continue), "the core goes on");
        }
    });
    (working.join().expect("the host is content"), counted.count_total)
}

#[test]
fn a_read_takes_nothing_from_the_heap() {
    let (mut core, address) = core();
    let attaching = thread::spawn(move || Host::attach(address));
    while !attaching.is_finished() {
        core.turn();
    }
    let host = attaching.join().expect("attached");
    let fill = |host: &mut Host| {
        let mut next = 0;
        for _ in 0..BLOCKS / DEPTH {
            host.round(WRITE, |_| {
                next += 1;
                next - 1
            });
        }
        // Everything that grows has its size.
        (0..200).for_each(|_| host.round(READ, |draw| draw % BLOCKS));
        (0..200).for_each(|_| host.round(WRITE, |draw| draw % BLOCKS));
    };
    let (host, _) = count(&mut core, host, fill);
    let (host, reads) =
        count(&mut core, host, |host| (0..IOS / DEPTH).for_each(|_| host.round(READ, |draw| draw % BLOCKS)));
    let (_, writes) =
        count(&mut core, host, |host| (0..IOS / DEPTH).for_each(|_| host.round(WRITE, |draw| draw % BLOCKS)));
    println!("{IOS} reads: {reads} allocations; {IOS} writes: {writes} allocations");
    assert!(reads < IOS / 50, "{reads} allocations in {IOS} reads");
    // 1.66 a write at this depth: the log's header and pieces, an Append's entries, nodes of the overlay's trees.
    assert!(writes < 2 * IOS, "{writes} allocations in {IOS} writes");
}
