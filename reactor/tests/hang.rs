//! Both hosts under a mix of timers, wakes, disk and socket IO, watched from outside: a core
//! that makes no progress for 2 s is a hang (glommio 0.9.0 can park for good with runnable
//! tasks, so this guards the way we run it).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ashlar_reactor::clock::monotonic_now;
use ashlar_reactor::host::{BareHost, CoreContext, CoreLoop, GlommioHost, Host, Turn, core_specs};
use ashlar_reactor::mailbox::{MailboxReceiver, mailbox};
use ashlar_reactor::ring::{Ring, RingConfig};
use ashlar_reactor::timers::Timers;
use ashlar_reactor::{
    Completion, Create, Disk, File, IoBuf, IoList, Op, OpenOptions, Output, Reactor, Socket,
};
use protocol::types::Span;

const CORES: usize = 2;
/// Kinds of progress, each watched on its own.
const KINDS: [&str; 4] = ["timers", "wakes", "disk", "sockets"];
const STALL_MAX: Duration = Duration::from_secs(2);
/// Time in which a thread that has nothing to do with the reactor did not get one write to the disk does not count for the
/// disk: it is the disk's.
const DISK_STALL: Duration = Duration::from_millis(200);
/// Which kind of progress that is.
const DISK: usize = 2;

#[derive(Default)]
struct Watched {
    progress: [[AtomicU64; KINDS.len()]; CORES],
    stop: AtomicBool,
    /// Writes by a thread of its own, to tell a disk that stalls from a core that hangs.
    control: AtomicU64,
}

const ACCEPT: u64 = 1;
const CONNECT: u64 = 2;
const WRITE: u64 = 3;
const READ: u64 = 4;
const SEND: u64 = 5;
const RECV: u64 = 6;

/// One core's mix: a ping-pong with itself over TCP, write-read of a file, timers at random
/// distances, and mail from another thread at random moments.
struct Mix {
    core: usize,
    reactor: Ring,
    mail: MailboxReceiver<u64>,
    expected_mail: u64,
    timers: Timers<()>,
    file: File,
    near: Option<Socket>,
    far: Option<Socket>,
    watched: Arc<Watched>,
    completions: Vec<Completion>,
}

impl Mix {
    fn new(context: CoreContext, dir: &std::path::Path, watched: Arc<Watched>) -> Self {
        let config = RingConfig { arena_bytes: 2 << 20, ..RingConfig::default() };
        let mut reactor = Ring::new(config).unwrap();
        let options = OpenOptions { create: Create::New, direct: true, read_only: false };
        let file = reactor.open(&dir.join(format!("f{}", context.index)), options).unwrap();
        let (mut sender, mail) = mailbox(64, reactor.waker());
        let mail_watch = watched.clone();
        std::thread::spawn(move || {
            let mut n = 0;
            while !mail_watch.stop.load(Ordering::Relaxed) {
                if sender.post(n).is_ok() {
                    n += 1;
                }
                std::thread::sleep(Duration::from_micros(n * 7919 % 3000));
            }
            sender.wake();
        });
        let listener = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = reactor.listener_addr(listener).unwrap();
        reactor.submit(ACCEPT, Op::Accept { listener });
        reactor.submit(CONNECT, Op::Connect { addr });
        let mut mix = Self {
            core: context.index,
            reactor,
            mail,
            expected_mail: 0,
            timers: Timers::new(),
            file,
            near: None,
            far: None,
            watched,
            completions: Vec::new(),
        };
        mix.write();
        mix.set_timer();
        mix
    }

    fn progressed(&self, kind: usize) {
        self.watched.progress[self.core][kind].fetch_add(1, Ordering::Relaxed);
    }

    fn set_timer(&mut self) {
        let after = Span::us(self.reactor.random() % 4000);
        self.timers.set(self.reactor.now() + after, ());
    }

    fn write(&mut self) {
        let buf = self.reactor.arena().alloc(1).unwrap().freeze();
        let bufs = IoList::from_iter([IoBuf::whole(buf)]);
        self.reactor.submit(WRITE, Op::WriteAt { file: self.file, offset: 0, bufs, dsync: false });
    }

    fn recv(&mut self, socket: Socket) {
        let buf = self.reactor.arena().alloc(1).unwrap();
        self.reactor.submit(RECV, Op::Recv { socket, buf, from: 0, to: 64 });
    }

    fn send(&mut self) {
        let Some(socket) = self.near else { return };
        let bufs = IoList::from_iter([IoBuf::copy(&[1; 32])]);
        self.reactor.submit(SEND, Op::Send { socket, bufs });
    }

    fn dispatch(&mut self, token: u64, output: Output) {
        match (token, output) {
            (ACCEPT, Output::Accepted { socket, .. }) => self.recv_on(socket),
            (CONNECT, Output::Connected { socket }) => {
                self.near = Some(socket);
                self.send();
            }
            (WRITE, Output::Written) => {
                let buf = self.reactor.arena().alloc(1).unwrap();
                self.reactor.submit(READ, Op::ReadAt { file: self.file, offset: 0, buf, bytes: 4096 });
            }
            (READ, Output::Read(4096)) => {
                self.progressed(2);
                self.write();
            }
            (SEND, Output::Sent) => {}
            other => panic!("unexpected {other:?}"),
        }
    }

    fn recv_on(&mut self, socket: Socket) {
        self.far = Some(socket);
        self.recv(socket);
    }
}

impl CoreLoop for Mix {
    fn turn(&mut self) -> Turn {
        let mut completions = std::mem::take(&mut self.completions);
        self.reactor.turn(self.timers.next_deadline(), &mut completions);
        for completion in completions.drain(..) {
            let output = completion.result.unwrap();
            if let (RECV, Output::Received(_)) = (completion.token, &output) {
                self.progressed(3);
                let far = self.far.expect("received on an accepted socket");
                self.recv(far);
                self.send();
            } else {
                self.dispatch(completion.token, output);
            }
        }
        self.completions = completions;
        while let Some(n) = self.mail.take() {
            assert_eq!(n, self.expected_mail);
            self.expected_mail += 1;
            self.progressed(1);
        }
        let now = self.reactor.now();
        while self.timers.pop_due(now).is_some() {
            self.progressed(0);
            self.set_timer();
        }
        if self.watched.stop.load(Ordering::Relaxed) { Turn::Stop } else { Turn::Continue }
    }
}

/// Writes and syncs a file beside the cores', again and again.
fn control(dir: &std::path::Path, watched: &Watched) {
    let file = std::fs::File::create(dir.join("control")).unwrap();
    while !watched.stop.load(Ordering::Relaxed) {
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0).unwrap();
        file.sync_data().unwrap();
        watched.control.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn watch(watched: &Watched, seconds: u64) {
    let (mut control, mut control_since) = (0, Instant::now());
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut last = [[0; KINDS.len()]; CORES];
    let mut since = [[Instant::now(); KINDS.len()]; CORES];
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        let count = watched.control.load(Ordering::Relaxed);
        if count != control {
            (control, control_since) = (count, Instant::now());
        }
        if control_since.elapsed() > DISK_STALL {
            since.iter_mut().for_each(|kinds| kinds[DISK] = Instant::now());
        }
        for core in 0..CORES {
            for kind in 0..KINDS.len() {
                let count = watched.progress[core][kind].load(Ordering::Relaxed);
                if count != last[core][kind] {
                    (last[core][kind], since[core][kind]) = (count, Instant::now());
                }
                let stall = since[core][kind].elapsed();
                if stall > STALL_MAX {
                    eprintln!("core {core}: no progress of {} for {stall:?} after {count}", KINDS[kind]);
                    // The hung thread cannot be joined.
                    std::process::exit(1);
                }
            }
        }
    }
}

fn run_for(host: impl Host + Send + 'static, seconds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let watched = Arc::new(Watched::default());
    let (mains, beside, folder) = (watched.clone(), watched.clone(), dir.path().to_path_buf());
    let controlling = std::thread::spawn(move || control(&folder, &beside));
    let thread = std::thread::spawn(move || {
        let main = move |context| -> Box<dyn CoreLoop> { Box::new(Mix::new(context, &path, mains.clone())) };
        host.run(core_specs(CORES, true, "mix"), main)
    });
    watch(&watched, seconds);
    watched.stop.store(true, Ordering::Relaxed);
    let stopping = monotonic_now();
    while !thread.is_finished() {
        assert!(monotonic_now() < stopping + Span::ms(5000), "the cores do not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.join().unwrap().unwrap();
    controlling.join().unwrap();
}

#[test]
fn the_bare_host_never_hangs() {
    run_for(BareHost, 10);
}

#[test]
fn the_glommio_host_never_hangs() {
    run_for(GlommioHost, 10);
}

#[test]
fn a_glommio_host_starts_and_stops_many_times_without_hanging() {
    for _ in 0..20 {
        run_for(GlommioHost, 0);
    }
}
