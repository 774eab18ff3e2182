//! What glommio costs as a host: processor time an op under `GlommioHost` and `BareHost`, the
//! same loop, in turns (A/B/A/B...), with the ratio and its spread.
//!
//! `cargo run -p ashlar-reactor --release --example host_overhead [seconds a round] [rounds]`
//!
//! Two loads: 4 KiB reads of a temporary file at queue depth 32 (direct where the file system
//! allows), and a 64-byte ping-pong of the core with itself over loopback TCP.

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use ashlar_reactor::clock::thread_cpu;
use ashlar_reactor::host::{CoreContext, CoreLoop, CoreSpec, Host, HostKind, Turn};
use ashlar_reactor::ring::{Ring, RingConfig};
use ashlar_reactor::{
    BufMut, Completion, Create, Disk, File, IoBuf, IoList, Op, OpenOptions, Output, Reactor, Socket,
};
use protocol::types::{Span, Time};

const FILE_BYTES: u64 = 64 << 20;
const DEPTH: u64 = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    Reads,
    PingPong,
}

/// What one round measured.
#[derive(Clone, Copy)]
struct Round {
    ops: u64,
    cpu: Span,
    wall: Span,
}

struct Bench {
    reactor: Ring,
    file: File,
    sockets: Vec<Socket>,
    started: Option<(Time, Span)>,
    length: Span,
    ops: u64,
    completions: Vec<Completion>,
    report: mpsc::Sender<Round>,
}

impl Bench {
    fn new(load: Load, path: &Path, length: Span, report: mpsc::Sender<Round>) -> Self {
        let mut reactor = Ring::new(RingConfig::default()).expect("a ring");
        let options = OpenOptions { create: Create::No, direct: true, read_only: true };
        let file = reactor.open(path, options).expect("the temporary file");
        if load == Load::PingPong {
            let listener = reactor.listen(([127, 0, 0, 1], 0).into()).expect("a port");
            let addr = reactor.listener_addr(listener).expect("its address");
            reactor.submit(0, Op::Accept { listener });
            reactor.submit(1, Op::Connect { addr });
        }
        let mut bench = Self {
            reactor,
            file,
            sockets: Vec::new(),
            started: None,
            length,
            ops: 0,
            completions: Vec::new(),
            report,
        };
        if load == Load::Reads {
            for _ in 0..DEPTH {
                let buf = bench.reactor.arena().alloc(1).expect("room in the arena");
                bench.read(buf);
            }
        }
        bench
    }

    fn read(&mut self, buf: BufMut) {
        let offset = self.reactor.random() % (FILE_BYTES / 4096) * 4096;
        self.reactor.submit(0, Op::ReadAt { file: self.file, offset, buf, bytes: 4096 });
    }

    fn ping(&mut self, from: usize) {
        let bufs = IoList::from_iter([IoBuf::copy(&[1; 64])]);
        self.reactor.submit(9, Op::Send { socket: self.sockets[from], bufs });
    }

    fn recv(&mut self, at: usize, buf: BufMut) {
        let socket = self.sockets[at];
        self.reactor.submit(at as u64, Op::Recv { socket, buf, from: 0, to: 64 });
    }

    fn dispatch(&mut self, completion: Completion) {
        match completion.result.expect("no op of the bench fails") {
            Output::Read(_) => {
                self.ops += 1;
                self.read(completion.buf.expect("a read's buffer"));
            }
            Output::Received(_) => {
                self.ops += 1;
                let at = completion.token as usize;
                self.recv(at, completion.buf.expect("a receive's buffer"));
                self.ping(at);
            }
            Output::Accepted { socket, .. } | Output::Connected { socket } => {
                self.sockets.push(socket);
                if self.sockets.len() == 2 {
                    for at in 0..2 {
                        let buf = self.reactor.arena().alloc(1).expect("room in the arena");
                        self.recv(at, buf);
                    }
                    self.ping(0);
                }
            }
            _ => {}
        }
    }
}

impl CoreLoop for Bench {
    fn turn(&mut self) -> Turn {
        let mut completions = std::mem::take(&mut self.completions);
        self.reactor.turn(None, &mut completions);
        completions.drain(..).for_each(|completion| self.dispatch(completion));
        self.completions = completions;
        let now = self.reactor.now();
        let Some((start, cpu)) = self.started else {
            // The first thousand ops warm things up.
            if self.ops >= 1000 {
                self.ops = 0;
                self.started = Some((now, thread_cpu()));
            }
            return Turn::Continue;
        };
        if (now - start) < self.length {
            return Turn::Continue;
        }
        let cpu = Span(thread_cpu().0 - cpu.0);
        let round = Round { ops: self.ops, cpu, wall: now - start };
        self.report.send(round).expect("main waits for it");
        Turn::Stop
    }
}

fn round(host: HostKind, load: Load, path: &Path, length: Span) -> Round {
    let (report, rounds) = mpsc::channel();
    let path = path.to_path_buf();
    let main = move |_: CoreContext| -> Box<dyn CoreLoop> {
        Box::new(Bench::new(load, &path, length, report.clone()))
    };
    let core = CoreSpec { index: 0, cpu: Some(0), name: "bench".into() };
    host.run(vec![core], main).expect("the bench runs");
    rounds.recv().expect("one round")
}

fn ns_an_op(round: Round) -> f64 {
    round.cpu.0 as f64 / round.ops as f64
}

fn compare(name: &str, load: Load, path: &Path, length: Span, rounds: usize) {
    let mut ratios = Vec::new();
    for i in 0..rounds {
        let bare = round(HostKind::Bare, load, path, length);
        let glommio = round(HostKind::Glommio, load, path, length);
        let ratio = ns_an_op(glommio) / ns_an_op(bare);
        let rate = |r: Round| r.ops as f64 / r.wall.0 as f64 * 1e6;
        println!(
            "{name} {i}: bare {:.0} ns CPU an op ({:.1}K/s), glommio {:.0} ns ({:.1}K/s), ratio {ratio:.3}",
            ns_an_op(bare),
            rate(bare),
            ns_an_op(glommio),
            rate(glommio),
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    let verdict = if median <= 1.05 { "within 5 %" } else { "ABOVE 5 %" };
    println!(
        "{name}: median {median:.3}, from {:.3} to {:.3}: {verdict}",
        ratios[0],
        ratios[ratios.len() - 1]
    );
}

fn make_file() -> std::io::Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bench");
    std::fs::write(&path, vec![0xa5; FILE_BYTES as usize])?;
    std::fs::File::open(&path)?.sync_all()?;
    Ok((dir, path))
}

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<f64>().expect("numbers only"));
    let seconds = args.next().unwrap_or(2.0);
    let rounds = args.next().unwrap_or(7.0).max(1.0) as usize;
    let (_dir, path) = make_file()?;
    let length = Span((seconds * 1e9) as u64);
    compare("4K reads, QD32", Load::Reads, &path, length, rounds);
    compare("TCP ping-pong", Load::PingPong, &path, length, rounds);
    Ok(())
}
