//! What the data path of a core takes from the heap, counted: nothing for a read, nothing for a write.
//!
//! Cores as the daemon builds them, one alone, three replicas of each other, and two shards of one target of which one has
//! the host and the other the data, over the kernel's ring and files in memory, with a host on loopback. Counted is what each core's own thread allocates while it turns: sockets, protocol,
//! routing, shard, store, reactor. A second brings a few dozen allocations that have nothing to do with IO (the standing
//! that is published, housekeeping), a round of the flusher or a checkpoint some more, so a few hundred in
//! 100,000 is what nothing looks like. A message of several entries to a peer takes one allocation: seldom on an idle
//! machine, for one write in sixteen beside other work, when replicas lag and entries gather.

use protocol::map::{ClusterMap, CopysetEntry, ExportEntry, ExportProtocol, Session, VolumeEntry};
use protocol::types::{BLOCK_BYTES, CopysetId, ShardAddr, Span, TargetId, VolumeId};
use reactor::host::{CoreLoop, Turn};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, Reactor, Waker};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use target_daemon::assemble::{ShardPlan, build_core, format_shard};
use target_daemon::control::{ControlEnds, ToShard, shard_ports};
use target_daemon::core_loop::{Core, Port};
use target_daemon::siblings::{SiblingEnd, mesh};

/// IOs that are counted.
const IOS: u64 = 100_000;
/// Sent at once, then all are waited for.
const DEPTH: u64 = 32;
/// Blocks that are read and written: 32 MiB, in two chunks.
const BLOCKS: u64 = 8192;
const READ: u16 = 0;
const WRITE: u16 = 1;

/// Where one core is reached.
struct Addresses {
    peers: SocketAddr,
    hosts: SocketAddr,
}

const fn at(target: u32, shard: u16) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard }
}

/// Cores, the first of which has the host, and of them those that have the data.
struct Setup {
    name: &'static str,
    cores: &'static [ShardAddr],
    members: &'static [ShardAddr],
}

const ALONE: Setup = Setup { name: "one core", cores: &[at(1, 0)], members: &[at(1, 0)] };
const REPLICAS: Setup = Setup {
    name: "three replicas",
    cores: &[at(1, 0), at(2, 0), at(3, 0)],
    members: &[at(1, 0), at(2, 0), at(3, 0)],
};
const SHARDS: Setup = Setup { name: "another shard", cores: &[at(1, 0), at(1, 1)], members: &[at(1, 1)] };

/// A volume whose only copyset has these members.
fn map(cores: &[(ShardAddr, Addresses)], members: Vec<ShardAddr>) -> ClusterMap {
    let mut map = ClusterMap { cluster: [7; 16], generation: 1, ..ClusterMap::default() };
    for (core, reached) in cores {
        map.targets.entry(core.target).or_default().peers.push(reached.peers);
    }
    map.copysets.insert(CopysetId(1), CopysetEntry { members, epoch: 0 });
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

/// A core of a target that keeps everything in memory, the control side's end of it, and where it is reached.
fn core(me: ShardAddr, waker: Waker, siblings: Vec<SiblingEnd>) -> (Core<Ring>, ControlEnds, Addresses) {
    let config = RingConfig { arena_bytes: 32 << 20, memory_files: true, ..RingConfig::default() };
    let mut ring = Ring::woken_by(config, waker).expect("a ring");
    let layout = chunkstore::Layout {
        segment_bytes: 8 << 20,
        slots_max: 16,
        ram_blocks_max: 3072,
        ..chunkstore::Layout::default()
    };
    let plan = ShardPlan {
        dir: PathBuf::from("/nowhere"),
        me,
        disk: [me.target.0 as u8; 16],
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
    let mut addresses = Vec::new();
    let listen = |ring: &mut Ring| {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut open = |port| {
            let listener = ring.listen(local).expect("a port");
            let Ok(Addr::Tcp(at)) = ring.listener_addr(listener) else { panic!("TCP has addresses") };
            addresses.push(at);
            (port, listener)
        };
        Ok(vec![open(Port::Peer), open(Port::Nbd)])
    };
    let stop = Arc::new(AtomicBool::new(false));
    let core = build_core(ring, &plan, port, siblings, stop, listen).expect("a core");
    (core, ends, Addresses { peers: addresses[0], hosts: addresses[1] })
}

/// Cores that turn on a thread each, and count what they allocate in each phase.
struct Cluster {
    hosts: SocketAddr,
    phase: Arc<AtomicUsize>,
    wakers: Vec<Waker>,
    threads: Vec<JoinHandle<Vec<u64>>>,
    /// Outlives the cores.
    _ends: Vec<ControlEnds>,
}

/// Phases of a test: attach and warm up, read, write.
const PHASES: usize = 3;

impl Cluster {
    fn start(setup: &Setup) -> Self {
        let phase = Arc::new(AtomicUsize::new(0));
        let (mut threads, mut ends, mut cores) = (vec![], vec![], vec![]);
        let wakers: Vec<_> = setup.cores.iter().map(|_| Waker::new().expect("an eventfd")).collect();
        let of_one_target = setup.cores.iter().all(|core| core.target == setup.cores[0].target);
        let mut siblings = if of_one_target { mesh(&wakers) } else { vec![] }.into_iter();
        for (me, waker) in setup.cores.iter().copied().zip(wakers.clone()) {
            let (tell, told) = std::sync::mpsc::channel();
            let (phase, siblings) = (phase.clone(), siblings.next().unwrap_or_default());
            threads.push(thread::spawn(move || {
                let (mut core, ends, addresses) = core(me, waker, siblings);
                tell.send((ends, addresses)).expect("the test waits");
                let turns = |now| {
                    while phase.load(Ordering::Acquire) == now {
                        assert!(matches!(core.turn(), Turn::Continue), "the core goes on");
                    }
                };
                let mut count = turns;
                (0..PHASES).map(|now| allocation_counter::measure(|| count(now)).count_total).collect()
            }));
            let (end, addresses) = told.recv().expect("a core");
            ends.push(end);
            cores.push((me, addresses));
        }
        let map = Arc::new(map(&cores, setup.members.into()));
        for end in &ends {
            let _ = end.shards()[0].send(ToShard::Map(map.clone()));
        }
        Self { hosts: cores[0].1.hosts, phase, wakers, threads, _ends: ends }
    }

    fn next_phase(&self) {
        self.phase.fetch_add(1, Ordering::Release);
        self.wakers.iter().for_each(Waker::wake);
    }

    /// What each core allocated, phase by phase.
    fn counts(self) -> Vec<Vec<u64>> {
        self.threads.into_iter().map(|core| core.join().expect("a core that ends well")).collect()
    }
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

/// What each core allocates for reads, and for writes.
fn counted(setup: &Setup) -> Vec<(u64, u64)> {
    let cluster = Cluster::start(setup);
    let mut host = Host::attach(cluster.hosts);
    let mut next = 0;
    for _ in 0..BLOCKS / DEPTH {
        host.round(WRITE, |_| {
            next += 1;
            next - 1
        });
    }
    // Everything that grows has its size.
    (0..200).for_each(|_| host.round(READ, |draw| draw % BLOCKS));
    (0..1000).for_each(|_| host.round(WRITE, |draw| draw % BLOCKS));
    for kind in [READ, WRITE] {
        cluster.next_phase();
        (0..IOS / DEPTH).for_each(|_| host.round(kind, |draw| draw % BLOCKS));
    }
    cluster.next_phase();
    let counts = cluster.counts();
    println!("{}, allocations in {IOS} reads and {IOS} writes: {counts:?}", setup.name);
    counts.into_iter().map(|of_core| (of_core[1], of_core[2])).collect()
}

#[test]
fn neither_a_read_nor_a_write_takes_anything_from_the_heap() {
    for (setup, writes_max) in [(ALONE, IOS / 50), (REPLICAS, IOS / 4), (SHARDS, IOS / 50)] {
        for (reads, writes) in counted(&setup) {
            assert!(reads < IOS / 100, "{}: {reads} allocations in {IOS} reads", setup.name);
            assert!(writes < writes_max, "{}: {writes} allocations in {IOS} writes", setup.name);
        }
    }
}
