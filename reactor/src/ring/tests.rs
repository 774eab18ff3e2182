//! The ring against the real kernel: files, loopback, Unix sockets.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::api::{Create, IoBuf, IoList, Output, Socket};
use crate::arena::BufMut;
use crate::clock::thread_cpu;
use protocol::types::Span;

/// A ring whose completions are waited for by token.
struct Rig {
    ring: Ring,
    done: HashMap<u64, Completion>,
    next_token: u64,
}

impl Rig {
    fn new() -> Self {
        Self::with(RingConfig { arena_bytes: 4 << 20, ..RingConfig::default() })
    }

    fn with(config: RingConfig) -> Self {
        Self { ring: Ring::new(config).unwrap(), done: HashMap::new(), next_token: 0 }
    }

    fn submit(&mut self, op: Op) -> u64 {
        self.next_token += 1;
        self.ring.submit(self.next_token, op);
        self.next_token
    }

    /// Turns until the token has completed; panics after 10 s.
    fn wait(&mut self, token: u64) -> Completion {
        let deadline = self.ring.now() + Span::ms(10_000);
        loop {
            if let Some(completion) = self.done.remove(&token) {
                return completion;
            }
            assert!(self.ring.now() < deadline, "op {token} never completed");
            self.turn(deadline);
        }
    }

    fn turn(&mut self, deadline: Time) {
        let mut completions = Vec::new();
        self.ring.turn(Some(deadline), &mut completions);
        for completion in completions {
            let twice = self.done.insert(completion.token, completion);
            assert!(twice.is_none(), "an op completed twice");
        }
    }

    fn run(&mut self, op: Op) -> Completion {
        let token = self.submit(op);
        self.wait(token)
    }

    fn ok(&mut self, op: Op) -> Output {
        self.run(op).result.unwrap()
    }

    fn buf(&self, blocks: usize, byte: u8) -> BufMut {
        let mut buf = self.ring.arena().alloc(blocks).unwrap();
        buf.fill(byte);
        buf
    }

    fn pair(&mut self, listener: Listener) -> (Socket, Socket) {
        let addr = self.ring.listener_addr(listener).unwrap();
        let accept = self.submit(Op::Accept { listener });
        let Output::Connected { socket: near } = self.ok(Op::Connect { addr }) else { panic!() };
        let Ok(Output::Accepted { socket: far, .. }) = self.wait(accept).result else { panic!() };
        (near, far)
    }

    fn tcp_pair(&mut self) -> (Socket, Socket) {
        let listener = self.ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let pair = self.pair(listener);
        self.ok(Op::CloseListener { listener });
        pair
    }

    fn assert_clean(&self) {
        assert_eq!(self.ring.stats().in_flight, 0);
        assert_eq!(self.ring.stats().sockets, 0);
        assert_eq!(self.ring.free_slots.len(), self.ring.slots.len());
        assert_eq!(self.ring.arena().used_blocks(), 0);
    }
}

fn temp_file(rig: &mut Rig, direct: bool) -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let options = OpenOptions { create: Create::New, direct, read_only: false };
    let file = rig.ring.open(&dir.path().join("f"), options).unwrap();
    (dir, file)
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn write_then_read(rig: &mut Rig, direct: bool) {
    let (_dir, file) = temp_file(rig, direct);
    assert_eq!(rig.ok(Op::Allocate { file, offset: 0, bytes: 1 << 20 }), Output::Allocated);
    let shared = rig.buf(4, 7).freeze();
    let mut bufs = IoList::new();
    bufs.push(IoBuf::part(shared.clone(), 4096..12288));
    bufs.push(IoBuf::zeroes(8192));
    bufs.push(IoBuf::whole(shared.clone()));
    let written = rig.run(Op::WriteAt { file, offset: 4096, bufs, dsync: true });
    assert_eq!(written.result, Ok(Output::Written));
    assert_eq!(written.bufs.len(), 3, "buffers come back");
    assert_eq!(rig.ok(Op::Sync { file }), Output::Synced);
    drop((written, shared));
    let buf = rig.buf(32, 0xee);
    let read = rig.run(Op::ReadAt { file, offset: 0, buf, bytes: 40960 });
    assert_eq!(read.result, Ok(Output::Read(40960)));
    let buf = read.buf.unwrap();
    for (block, byte) in [0, 7, 7, 0, 0, 7, 7, 7, 7, 0].into_iter().enumerate() {
        assert!(buf[block * 4096..][..4096].iter().all(|b| *b == byte), "block {block}");
    }
    assert_eq!(buf[40960], 0xee, "nothing past the asked bytes is touched");
    drop(buf);
    rig.assert_clean();
}

#[test]
fn what_was_written_is_read_buffered_and_direct() {
    write_then_read(&mut Rig::new(), false);
    write_then_read(&mut Rig::new(), true);
}

#[test]
fn what_was_written_is_read_through_registered_memory() {
    let config = RingConfig { arena_bytes: 4 << 20, register_arena: true, ..RingConfig::default() };
    let mut rig = Rig::with(config);
    let (_dir, file) = temp_file(&mut rig, true);
    let one = |byte| IoBuf::whole(rig.buf(32, byte).freeze());
    let lists = [
        IoList::from_iter([one(9)]),
        IoList::from_iter([one(1), one(2), one(3)]),
        // Zeroes are not part of the arena.
        IoList::from_iter([one(4), IoBuf::zeroes(131_072), one(5)]),
    ];
    let mut at = 0;
    for bufs in lists {
        let bytes = crate::api::list_len(&bufs) as u64;
        assert_eq!(rig.ok(Op::WriteAt { file, offset: at, bufs, dsync: true }), Output::Written);
        at += bytes;
    }
    for (nth, byte) in [9, 1, 2, 3, 4, 0, 5].into_iter().enumerate() {
        let (buf, offset) = (rig.buf(32, 7), nth as u64 * 131_072);
        let read = rig.run(Op::ReadAt { file, offset, buf, bytes: 131_072 });
        assert!(read.buf.unwrap().iter().all(|found| *found == byte), "{nth}");
    }
    rig.assert_clean();
}

#[test]
fn a_file_is_read_and_written_through_its_place_in_the_table_and_beyond_it() {
    let mut rig = Rig::new();
    assert!(rig.ring.registered_files.has(1), "this kernel registers files");
    let dir = tempfile::tempdir().unwrap();
    for places in [1024, 1] {
        rig.ring.registered_files.places = places;
        let path = |name: u8| dir.path().join(format!("{places}-{name}"));
        let open = |rig: &mut Rig, name| rig.ring.open(&path(name), OpenOptions::NEW).unwrap();
        let (first, second) = (open(&mut rig, 1), open(&mut rig, 2));
        rig.ring.close_file(first);
        let third = open(&mut rig, 3);
        assert_eq!(third.index, first.index, "the place is used again");
        for (file, byte) in [(second, 2), (third, 3)] {
            let bufs = IoList::from_iter([IoBuf::whole(rig.buf(1, byte).freeze())]);
            assert_eq!(rig.ok(Op::WriteAt { file, offset: 0, bufs, dsync: true }), Output::Written);
            assert_eq!(rig.ok(Op::Sync { file }), Output::Synced);
            let buf = rig.buf(1, 0);
            let read = rig.run(Op::ReadAt { file, offset: 0, buf, bytes: 4096 });
            assert!(read.buf.unwrap().iter().all(|found| *found == byte), "{places} places, file {byte}");
            rig.ring.close_file(file);
        }
        assert_eq!([1, 2, 3].map(|name| std::fs::read(path(name)).unwrap().len()), [0, 4096, 4096]);
    }
    rig.assert_clean();
}

#[test]
fn a_read_past_the_end_is_short_and_not_an_error() {
    let mut rig = Rig::new();
    let (_dir, file) = temp_file(&mut rig, false);
    rig.ring.write_blocking(file, 0, &[5; 5000]).unwrap();
    let buf = rig.buf(2, 0);
    let read = rig.run(Op::ReadAt { file, offset: 4096, buf, bytes: 8192 });
    assert_eq!(read.result, Ok(Output::Read(904)));
    let buf = read.buf.unwrap();
    assert_eq!(rig.ok(Op::ReadAt { file, offset: 1 << 30, buf, bytes: 8192 }), Output::Read(0));
}

#[test]
fn a_write_of_more_pieces_than_one_call_takes_is_whole() {
    let mut rig = Rig::new();
    let (_dir, file) = temp_file(&mut rig, false);
    let bufs: IoList = (0..2500u32).map(|i| IoBuf::copy(&i.to_le_bytes())).collect();
    assert_eq!(rig.ok(Op::WriteAt { file, offset: 10, bufs, dsync: true }), Output::Written);
    let mut back = vec![0; 10_010];
    assert_eq!(rig.ring.read_blocking(file, 0, &mut back).unwrap(), 10_010);
    for i in 0..2500u32 {
        assert_eq!(back[10 + 4 * i as usize..][..4], i.to_le_bytes());
    }
}

#[test]
fn failed_file_ops_give_their_buffers_back() {
    let mut rig = Rig::new();
    let (_dir, file) = temp_file(&mut rig, false);
    rig.ring.close_file(file);
    let buf = rig.buf(1, 0);
    let read = rig.run(Op::ReadAt { file, offset: 0, buf, bytes: 4096 });
    assert_eq!(read.result.unwrap_err().errno, libc::EBADF);
    let bufs = IoList::from_iter([IoBuf::whole(read.buf.unwrap().freeze())]);
    let write = rig.run(Op::WriteAt { file, offset: 0, bufs, dsync: false });
    assert_eq!((write.result.unwrap_err().errno, write.bufs.len()), (libc::EBADF, 1));
    let full = rig
        .ring
        .open(std::path::Path::new("/dev/full"), OpenOptions { direct: false, ..OpenOptions::EXISTING });
    let write = rig.run(Op::WriteAt { file: full.unwrap(), offset: 0, bufs: write.bufs, dsync: false });
    assert_eq!((write.result.unwrap_err().errno, write.bufs.len()), (libc::ENOSPC, 1));
}

#[test]
fn bytes_pass_both_kinds_of_socket_in_order_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::new();
    let unix = rig.ring.listen_unix(&dir.path().join("s")).unwrap();
    for (near, far) in [rig.tcp_pair(), rig.pair(unix)] {
        pump(&mut rig, near, far);
        rig.ok(Op::Close { socket: near });
        let buf = rig.buf(1, 0);
        assert_eq!(rig.ok(Op::Recv { socket: far, buf, from: 0, to: 1 }), Output::Received(0));
        rig.ok(Op::Close { socket: far });
    }
    rig.ok(Op::CloseListener { listener: unix });
    rig.assert_clean();
}

/// Queues 40 sends of 128 KiB and more at once, far above what socket buffers hold, and checks
/// every byte on the other side.
fn pump(rig: &mut Rig, near: Socket, far: Socket) {
    let mut sent = 0usize;
    let mut tokens = Vec::new();
    for i in 0..20u8 {
        let head = IoBuf::copy(&[i; 33]);
        let body = IoBuf::whole(rig.buf(32, i).freeze());
        sent += head.len() + body.len();
        tokens.push(rig.submit(Op::Send { socket: near, bufs: IoList::from_iter([head, body]) }));
    }
    let mut got = 0usize;
    let mut buf = rig.buf(16, 0);
    while got < sent {
        let recv = rig.run(Op::Recv { socket: far, buf, from: 100, to: 65536 });
        let Ok(Output::Received(count)) = recv.result else { panic!("{:?}", recv.result) };
        buf = recv.buf.unwrap();
        for (i, byte) in buf[100..100 + count as usize].iter().enumerate() {
            assert_eq!(usize::from(*byte), (got + i) / (33 + 131_072), "byte {}", got + i);
        }
        got += count as usize;
    }
    for token in tokens {
        assert_eq!(rig.wait(token).result, Ok(Output::Sent));
    }
}

#[test]
fn a_close_ends_every_outstanding_op_exactly_once() {
    let mut rig = Rig::new();
    let (near, far) = rig.tcp_pair();
    let buf = rig.buf(1, 0);
    let recv = rig.submit(Op::Recv { socket: near, buf, from: 0, to: 4096 });
    let sends: Vec<_> = (0..30)
        .map(|_| {
            let bufs = IoList::from_iter([IoBuf::zeroes(131_072), IoBuf::zeroes(131_072)]);
            rig.submit(Op::Send { socket: near, bufs })
        })
        .collect();
    // Let them reach the kernel and stall on full socket buffers.
    let soon = rig.ring.now() + Span::ms(20);
    while rig.ring.now() < soon {
        rig.turn(soon);
    }
    let close = rig.submit(Op::Close { socket: near });
    assert_eq!(rig.wait(close).result, Ok(Output::Closed));
    let recv = rig.done.remove(&recv).expect("ops end before their close does");
    assert!(recv.result.unwrap_err().is_cancelled());
    drop(recv.buf.expect("the buffer comes back"));
    let ends: Vec<_> = sends.iter().map(|token| rig.done.remove(token).unwrap().result).collect();
    assert!(ends.iter().any(Result::is_err), "the buffers cannot hold 7.5 MiB");
    let late = rig.run(Op::Send { socket: near, bufs: IoList::new() });
    assert_eq!(late.result.unwrap_err().errno, libc::EBADF);
    rig.ok(Op::Close { socket: far });
    rig.assert_clean();
}

#[test]
fn closing_a_listener_ends_its_accepts() {
    let mut rig = Rig::new();
    let listener = rig.ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let accepts = [rig.submit(Op::Accept { listener }), rig.submit(Op::Accept { listener })];
    let now = rig.ring.now();
    rig.turn(now);
    rig.ok(Op::CloseListener { listener });
    for token in accepts {
        assert!(rig.wait(token).result.unwrap_err().is_cancelled());
    }
    rig.assert_clean();
}

#[test]
fn connecting_to_nobody_fails_with_the_address() {
    let mut rig = Rig::new();
    let listener = rig.ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = rig.ring.listener_addr(listener).unwrap();
    rig.ok(Op::CloseListener { listener });
    let error = rig.run(Op::Connect { addr: addr.clone() }).result.unwrap_err();
    assert_eq!(error.errno, libc::ECONNREFUSED);
    assert!(error.to_string().contains(&addr.to_string()));
    let gone = rig.run(Op::Connect { addr: Addr::Unix(PathBuf::from("/nonexistent/s")) });
    assert_eq!(gone.result.unwrap_err().errno, libc::ENOENT);
    rig.assert_clean();
}

#[test]
fn thousands_of_connections_leak_no_descriptor_and_no_slot() {
    let mut rig = Rig::new();
    let listener = rig.ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let (near, far) = rig.pair(listener);
    for socket in [near, far] {
        rig.ok(Op::Close { socket });
    }
    let slots = rig.ring.slots.len();
    let before = open_fds();
    for round in 0..2000 {
        let (near, far) = rig.pair(listener);
        let buf = rig.buf(1, 0);
        let recv = rig.submit(Op::Recv { socket: near, buf, from: 0, to: 1 });
        let (first, second) = if round % 2 == 0 { (near, far) } else { (far, near) };
        rig.ok(Op::Close { socket: first });
        rig.ok(Op::Close { socket: second });
        drop(rig.wait(recv));
    }
    rig.ok(Op::CloseListener { listener });
    rig.assert_clean();
    assert!(rig.ring.slots.len() <= slots + 2, "{} slots", rig.ring.slots.len());
    // Other tests of this process open files too, but not thousands.
    assert!(open_fds() < before + 500);
}

#[test]
fn a_unix_path_left_by_the_dead_is_taken_over_and_one_in_use_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut rig = Rig::new();
    let old = rig.ring.listen_unix(&path).unwrap();
    assert_eq!(rig.ring.listen_unix(&path).unwrap_err().errno, libc::EADDRINUSE);
    rig.ok(Op::CloseListener { listener: old });
    let new = rig.ring.listen_unix(&path).unwrap();
    assert_eq!(rig.ring.listener_addr(new).unwrap(), Addr::Unix(path.clone()));
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "precious").unwrap();
    assert!(rig.ring.listen_unix(&plain).is_err());
    assert_eq!(std::fs::read(&plain).unwrap(), b"precious");
}

#[test]
fn an_adopted_listener_accepts_though_it_came_non_blocking() {
    let std_listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    std_listener.set_nonblocking(true).unwrap();
    let mut rig = Rig::new();
    let listener = rig.ring.adopt_listener(std_listener.into()).unwrap();
    let (near, far) = rig.pair(listener);
    pump(&mut rig, far, near);
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(rig.ring.adopt_listener(file.into()).is_err());
}

#[test]
fn a_socket_is_given_to_another_ring_but_not_while_it_is_used() {
    let (mut rig, mut other) = (Rig::new(), Rig::new());
    let (near, far) = rig.tcp_pair();
    let buf = rig.buf(1, 0);
    let reading = rig.submit(Op::Recv { socket: far, buf, from: 0, to: 4096 });
    rig.turn(Time(0));
    assert_eq!(rig.ring.give_away(far).unwrap_err().errno, libc::EBUSY);
    let bufs = std::iter::once(IoBuf::copy(b"hello")).collect();
    assert_eq!(rig.ok(Op::Send { socket: near, bufs }), Output::Sent);
    assert_eq!(rig.wait(reading).result, Ok(Output::Received(5)));

    let given = rig.ring.give_away(far).unwrap();
    assert_eq!(rig.ring.give_away(far).unwrap_err().errno, libc::EBADF);
    let there = other.ring.adopt_socket(given).unwrap();
    let bufs = std::iter::once(IoBuf::copy(b"from there")).collect();
    assert_eq!(other.ok(Op::Send { socket: there, bufs }), Output::Sent);
    let buf = rig.buf(1, 0);
    let got = rig.run(Op::Recv { socket: near, buf, from: 0, to: 4096 });
    assert_eq!((got.result, &got.buf.unwrap()[..10]), (Ok(Output::Received(10)), &b"from there"[..]));
    rig.ok(Op::Close { socket: near });
    other.ok(Op::Close { socket: there });
    rig.assert_clean();
    other.assert_clean();
}

#[test]
fn no_socket_is_paced_by_what_was_sent_before() {
    let listener = net::listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let near = net::new_socket(&Addr::Tcp("127.0.0.1:1".parse().unwrap())).unwrap();
    near.connect(&listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    for socket in [&listener, &near, &far] {
        assert!(!socket.tcp_congestion().unwrap().starts_with(b"bbr"));
    }
    // Where the system's default is another one, the same with sockets that were given BBR.
    if near.set_tcp_congestion(b"bbr").is_err() {
        return eprintln!("no BBR here");
    }
    net::leave_pacer(&near);
    assert!(!near.tcp_congestion().unwrap().starts_with(b"bbr"));
}

#[test]
fn a_wake_from_another_thread_ends_a_sleep() {
    let mut rig = Rig::new();
    let waker = rig.ring.waker();
    for pause_ms in [0, 1, 20, 20] {
        let waker = waker.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(pause_ms));
            waker.wake();
        });
        let start = Instant::now();
        rig.ring.turn(Some(rig.ring.now() + Span::ms(10_000)), &mut Vec::new());
        assert!(start.elapsed() < Duration::from_secs(5), "the wake was lost");
        thread.join().unwrap();
    }
}

#[test]
fn no_post_is_ever_slept_over() {
    let mut rig = Rig::new();
    let (mut sender, mut receiver) = crate::mailbox::mailbox::<u32>(8, rig.ring.waker());
    let thread = std::thread::spawn(move || {
        for i in 0..50_000 {
            let mut message = i;
            while let Err(back) = sender.post(message) {
                message = back;
                std::thread::yield_now();
            }
        }
    });
    let mut expected = 0;
    while expected < 50_000 {
        let start = Instant::now();
        rig.ring.turn(Some(rig.ring.now() + Span::ms(5_000)), &mut Vec::new());
        assert!(start.elapsed() < Duration::from_secs(4), "slept over message {expected}");
        while let Some(message) = receiver.take() {
            assert_eq!(message, expected);
            expected += 1;
        }
    }
    thread.join().unwrap();
}

#[test]
fn an_idle_ring_sleeps_until_its_deadline_and_burns_nothing() {
    let mut rig = Rig::new();
    let cpu = thread_cpu();
    let start = Instant::now();
    for _ in 0..20 {
        rig.ring.turn(Some(rig.ring.now() + Span::ms(10)), &mut Vec::new());
    }
    let (wall, cpu) = (start.elapsed(), Duration::from_nanos(thread_cpu().0 - cpu.0));
    assert!(wall >= Duration::from_millis(195), "woke early: {wall:?}");
    assert!(cpu < wall / 20, "{cpu:?} of CPU in {wall:?} asleep");
}

#[test]
fn more_completions_than_the_queue_holds_are_not_lost() {
    let mut rig = Rig::with(RingConfig { arena_bytes: 4 << 20, entries: 8, ..RingConfig::default() });
    let (_dir, file) = temp_file(&mut rig, false);
    rig.ring.write_blocking(file, 0, &[1; 4096]).unwrap();
    let tokens: Vec<_> = (0..1000)
        .map(|_| {
            let buf = rig.ring.arena().alloc(1).unwrap();
            rig.submit(Op::ReadAt { file, offset: 0, buf, bytes: 4096 })
        })
        .collect();
    for token in tokens {
        assert_eq!(rig.wait(token).result, Ok(Output::Read(4096)));
    }
    rig.assert_clean();
}

#[test]
fn dropping_a_ring_with_ops_outstanding_gives_their_memory_back() {
    let mut rig = Rig::new();
    let (near, _far) = rig.tcp_pair();
    let buf = rig.buf(4, 0);
    rig.submit(Op::Recv { socket: near, buf, from: 0, to: 100 });
    rig.submit(Op::Send {
        socket: near,
        bufs: IoList::from_iter([IoBuf::whole(rig.ring.arena().alloc(2).unwrap().freeze())]),
    });
    let now = rig.ring.now();
    rig.turn(now);
    let arena = rig.ring.arena().clone();
    assert!(arena.used_blocks() >= 4);
    drop(rig);
    assert_eq!(arena.used_blocks(), 0);
}

#[test]
fn what_was_received_comes_before_reads_that_ended_together_and_those_a_few_at_a_time() {
    let mut rig = Rig::new();
    let (_dir, file) = temp_file(&mut rig, true);
    rig.ok(Op::Allocate { file, offset: 0, bytes: 1 << 20 });
    let listener = rig.ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let accept = rig.submit(Op::Accept { listener });
    let Addr::Tcp(addr) = rig.ring.listener_addr(listener).unwrap() else { panic!() };
    let mut client = std::net::TcpStream::connect(addr).unwrap();
    let Ok(Output::Accepted { socket, .. }) = rig.wait(accept).result else { panic!() };
    let buf = rig.buf(1, 0);
    let receive = rig.submit(Op::Recv { socket, buf, from: 0, to: 1 });
    rig.turn(Time(0));
    let reads: Vec<u64> = (0..20)
        .map(|_| {
            let buf = rig.buf(1, 0);
            rig.submit(Op::ReadAt { file, offset: 0, buf, bytes: 4096 })
        })
        .collect();
    rig.ring.submit_now();
    std::thread::sleep(Duration::from_millis(50));
    std::io::Write::write_all(&mut client, &[1]).unwrap();

    let mut turns: Vec<Vec<u64>> = Vec::new();
    let count = |turn: &Vec<u64>| turn.iter().filter(|token| reads.contains(token)).count();
    while turns.iter().map(count).sum::<usize>() < reads.len() {
        let mut completions = Vec::new();
        rig.ring.turn(Some(Time(0)), &mut completions);
        turns.push(completions.into_iter().map(|done| done.token).collect());
    }
    assert_eq!(turns.iter().flatten().next(), Some(&receive), "{turns:?}");
    assert!(turns.iter().all(|turn| count(turn) <= TURN_READS_MAX), "{turns:?}");
}

#[test]
fn whoever_awaits_many_reads_sleeps_at_once() {
    let mut rig = Rig::with(RingConfig { arena_bytes: 1 << 20, spin_us_max: 200, ..RingConfig::default() });
    if rig.ring.spin.max_ns == 0 {
        return; // One processor: nobody ever spins.
    }
    let spins = |rig: &mut Rig, reads: usize| {
        rig.ring.awaits_reads(reads);
        rig.ring.spin.budget_ns = rig.ring.spin.max_ns;
        let before = rig.ring.stats();
        let deadline = rig.ring.now() + Span::ms(1);
        rig.turn(deadline);
        let after = rig.ring.stats();
        assert!(after.sleeps > before.sleeps, "nothing came");
        after.spins_won + after.spins_lost - before.spins_won - before.spins_lost
    };
    assert_eq!(spins(&mut rig, SPIN_READS_MAX), 1);
    assert_eq!(spins(&mut rig, SPIN_READS_MAX + 1), 0);
    assert_eq!(spins(&mut rig, 0), 1);
}

#[test]
fn what_stays_unacknowledged_ends_a_connection_after_as_long_as_was_asked() {
    let mut rig = Rig::new();
    let (near, far) = rig.tcp_pair();
    rig.ring.limit_unacknowledged(near, Span::ms(10_000));
    let limit = |rig: &mut Rig, socket| {
        let entry = rig.ring.live_socket(socket).expect("it is open");
        socket2::SockRef::from(&entry.fd).tcp_user_timeout().expect("Linux tells")
    };
    assert_eq!(limit(&mut rig, near), Some(Duration::from_secs(10)));
    assert_eq!(limit(&mut rig, far), None, "the other side was not asked");
    rig.ok(Op::Close { socket: near });
    rig.ok(Op::Close { socket: far });
    rig.ring.limit_unacknowledged(near, Span::ms(1));
    rig.assert_clean();
}
