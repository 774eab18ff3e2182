//! `ashlar bench bare`: the least that a server on our reactor costs in front of a file on this machine.
//!
//! An NBD export of one file, by the reactor, the streams and the session that targets use, and nothing else: a read
//! goes to the file, a write goes to it with DSYNC. There are no checksums, no log, no replicas and no second shard. What
//! a volume takes beyond it is the price of its promises; what both take is the machine's and the reactor's. A server
//! that is built otherwise (SPDK polls) may take less.
//!
//! Invariants: an IO has one buffer of the arena; while half of that is used, no more is taken in; whatever a client
//! sends ends its own connection, or makes others wait for memory.
//!
//! Deliberately absent: IOs above [`IO_BYTES_MAX`], discards, deadlines for slow clients. Nobody keeps data here.

use crate::dev::tail;
use crate::parse_bytes;
use crate::process::with_us;
use crate::run::load::IO_BYTES_MAX;
use crate::run::measure::Subject;
use crate::run::target::Target;
use anyhow::{Context, bail, ensure};
use clap::Args;
use protocol::nbd::{Command, Event, ExportInfo, NbdError, Refusal, Request, Session, reply};
use protocol::types::BLOCK_BYTES;
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, BufMut, Completion, Disk, File, IoBuf, Listener, Op, OpenOptions, Output, Reactor};
use slab::Slab;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};
use transport::stream::STAGING_BLOCKS;
use transport::{Fill, Happened, Owner, Stream};

/// Arguments of `ashlar bench bare`.
#[derive(Debug, Args)]
#[command(after_help = "How much of a volume's latency is the machine's:\n  \
    ashlar bench bare --file /var/tmp/raw --socket /var/tmp/bare.sock &\n  \
    ashlar bench run raw=file:/var/tmp/raw bare=nbd+unix:///bare?socket=/var/tmp/bare.sock --prepare --depth 32")]
pub struct BareArgs {
    /// The file or device to serve. It must be there, and its content is what clients write to it.
    #[arg(long, value_name = "FILE", required_unless_present = "memory", conflicts_with = "memory")]
    file: Option<PathBuf>,
    /// Serve so many bytes of memory instead.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// The Unix socket to listen on; a TCP port of 127.0.0.1 is chosen beside it and printed.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Microseconds that it watches for work before it sleeps; a dev cluster's targets have 200.
    #[arg(long, value_name = "US", default_value_t = SPIN_US_MAX)]
    spin_us_max: u32,
}

/// As a dev cluster has it.
const SPIN_US_MAX: u32 = 200;
/// The name of the export.
const EXPORT: &str = "bare";
/// Memory for IO, and for what connections receive into; half of it full, nothing more is taken in.
const ARENA_BYTES: usize = 64 << 20;
/// What the address of the TCP listener stands behind on standard output.
const READY: &str = "bare ";
/// Answers that wait for a client to take them, at most, before no more is taken in.
const ANSWERS_BYTES_MAX: usize = 4 << 20;

/// Serves until it is killed.
///
/// # Errors
/// The file cannot be opened past the page cache, or the socket not be listened on.
pub fn run(args: &BareArgs) -> anyhow::Result<ExitCode> {
    let mut ring = Ring::new(RingConfig {
        arena_bytes: ARENA_BYTES,
        spin_us_max: args.spin_us_max,
        register_arena: true,
        memory_files: args.memory.is_some(),
        ..RingConfig::default()
    })?;
    let (file, bytes) = match (&args.file, args.memory) {
        (_, Some(bytes)) => {
            let file = ring.open(Path::new("/bare"), OpenOptions::NEW)?;
            ring.allocate_blocking(file, 0, bytes)?;
            (file, bytes)
        }
        (Some(path), None) => {
            let file = ring.open(path, OpenOptions::EXISTING)?;
            ensure!(
                ring.disk().is_direct(file),
                "{}: its file system refuses direct IO, as tmpfs does; put it on a disk, or give --memory",
                path.display()
            );
            let bytes = ring.file_len(file)?;
            (file, bytes)
        }
        (None, None) => bail!("nothing to serve: give --file or --memory"),
    };
    let block = BLOCK_BYTES as u64;
    ensure!(bytes >= block && bytes.is_multiple_of(block), "{bytes} bytes are no whole blocks of {block}");
    let unix = ring.listen_unix(&args.socket)?;
    let tcp = ring.listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    match ring.listener_addr(tcp)? {
        Addr::Tcp(addr) => println!("{READY}nbd://{addr}/{EXPORT}"),
        Addr::Unix(_) => bail!("a TCP listener has a path"),
    }
    Server { ring, file, bytes, conns: Slab::new(), ios: Slab::new() }.serve([unix, tcp])
}

/// Kinds of owners of operations.
const CONN: u8 = 0;
const ACCEPT: u8 = 1;
const IO: u8 = 2;

/// One client.
struct Conn {
    stream: Stream,
    session: Session,
    /// A write whose payload is to come.
    incoming: Option<Request>,
    /// IOs of the file.
    under_way: u32,
    /// It took its leave: it is closed when its answers are sent.
    leaving: bool,
}

/// An IO of the file: whose it is, and what was asked.
struct Pending {
    conn: usize,
    request: Request,
}

struct Server {
    ring: Ring,
    file: File,
    bytes: u64,
    conns: Slab<Conn>,
    ios: Slab<Pending>,
}

impl Server {
    fn serve(mut self, listeners: [Listener; 2]) -> anyhow::Result<ExitCode> {
        let accept = |ring: &mut Ring, at: usize| {
            let token = Owner { kind: ACCEPT, index: at as u32 }.token(0);
            ring.submit(token, Op::Accept { listener: listeners[at] });
        };
        (0..listeners.len()).for_each(|at| accept(&mut self.ring, at));
        let (mut completions, mut open) = (Vec::new(), Vec::new());
        loop {
            self.ring.turn(None, &mut completions);
            for completion in completions.drain(..) {
                let Owner { kind, index } = Owner::split(completion.token).0;
                match kind {
                    ACCEPT => {
                        self.accepted(completion)?;
                        accept(&mut self.ring, index as usize);
                    }
                    IO => self.ended(index as usize, completion),
                    _ => self.happened(index as usize, completion),
                }
            }
            open.extend(self.conns.iter().map(|(at, _)| at));
            open.drain(..).for_each(|at| self.pump(at));
        }
    }

    fn accepted(&mut self, completion: Completion) -> anyhow::Result<()> {
        let accepted = completion.result.context("no more clients: is the limit of open files too low?")?;
        let Output::Accepted { socket, .. } = accepted else { return Ok(()) };
        let Some(staging) = self.ring.arena().alloc(STAGING_BLOCKS) else {
            eprintln!("note: a client was turned away, since no memory is left to receive into");
            self.ring.submit(Owner { kind: CONN, index: u32::MAX }.token(0), Op::Close { socket });
            return Ok(());
        };
        let free = self.conns.vacant_entry();
        let mut stream = Stream::new(socket, Owner { kind: CONN, index: free.key() as u32 }, staging);
        let session = Session::new();
        session.greeting(stream.text());
        free.insert(Conn { stream, session, incoming: None, under_way: 0, leaving: false });
        Ok(())
    }

    fn happened(&mut self, at: usize, completion: Completion) {
        let Some(conn) = self.conns.get_mut(at) else { return };
        match conn.stream.on_completion(completion) {
            Happened::Received | Happened::Sent | Happened::Closed => {}
            Happened::Failed(_) | Happened::Eof => conn.stream.close(&mut self.ring),
        }
    }

    /// An IO of the file has ended: its answer is queued.
    fn ended(&mut self, slot: usize, completion: Completion) {
        let Pending { conn, request } = self.ios.remove(slot);
        let conn = &mut self.conns[conn];
        conn.under_way -= 1;
        if conn.stream.is_closing() {
            return;
        }
        let (structured, cookie, bytes) = (conn.session.structured(), request.cookie, request.length);
        let text = conn.stream.text();
        match (completion.result, completion.buf) {
            (Ok(Output::Read(read)), Some(buf)) if read == bytes => {
                match structured {
                    true => reply::data(cookie, request.offset, bytes, true, text),
                    false => reply::simple_data(cookie, text),
                }
                conn.stream.push(IoBuf::part(buf.freeze(), 0..bytes as usize));
            }
            (Ok(Output::Written), _) => reply::done(cookie, text),
            (result, _) => {
                let why =
                    result.err().map_or("the file has become shorter".into(), |error| error.to_string());
                reply::error(structured, cookie, NbdError::Io, &why, text);
            }
        }
    }

    /// Takes in what a client asks for, and sends what is answered.
    fn pump(&mut self, at: usize) {
        let conn = &mut self.conns[at];
        while !conn.stream.is_closing() && !conn.leaving {
            match step(conn, &mut self.ring, self.bytes) {
                Ok(Step::Again) => {}
                Ok(Step::Io(request, op)) => {
                    conn.under_way += 1;
                    let slot = self.ios.insert(Pending { conn: at, request });
                    self.ring
                        .submit(Owner { kind: IO, index: slot as u32 }.token(0), op.of(self.file, request));
                }
                Ok(Step::NeedsBytes) => {
                    conn.stream.receive(&mut self.ring);
                    break;
                }
                Ok(Step::Waits) => break,
                Ok(Step::Leaves) => conn.leaving = true,
                Err(violation) => {
                    eprintln!("note: a client was cut off: {violation}");
                    conn.stream.close(&mut self.ring);
                }
            }
        }
        conn.stream.flush(&mut self.ring);
        if conn.leaving && conn.under_way == 0 && conn.stream.tx_bytes() == 0 {
            conn.stream.close(&mut self.ring);
        }
        if conn.stream.is_closed() && conn.under_way == 0 {
            self.conns.remove(at);
        }
    }
}

/// What the file is to do, and the memory for it.
enum FileOp {
    Read(BufMut),
    Write(BufMut),
}

impl FileOp {
    fn of(self, file: File, Request { offset, length, .. }: Request) -> Op {
        match self {
            Self::Read(buf) => Op::ReadAt { file, offset, buf, bytes: length },
            Self::Write(buf) => {
                let bufs = std::iter::once(IoBuf::part(buf.freeze(), 0..length as usize)).collect();
                Op::WriteAt { file, offset, bufs, dsync: true }
            }
        }
    }
}

/// What a look at a client's bytes led to.
enum Step {
    Io(Request, FileOp),
    Again,
    NeedsBytes,
    Waits,
    Leaves,
}

/// Takes one thing off what a client has sent.
fn step(conn: &mut Conn, ring: &mut Ring, bytes: u64) -> Result<Step, protocol::nbd::Violation> {
    if let Some(request) = conn.incoming {
        if !conn.stream.is_expecting() {
            let Some(buf) = memory(ring, request) else { return Ok(Step::Waits) };
            conn.stream.expect(Fill { buf, at: 0, end: request.length as usize });
        }
        let Some(buf) = conn.stream.poll_fill() else { return Ok(Step::NeedsBytes) };
        conn.incoming = None;
        return Ok(Step::Io(request, FileOp::Write(buf)));
    }
    let full = ring.arena().used_blocks() > ring.arena().capacity_blocks() / 2;
    if full || conn.stream.tx_bytes() > ANSWERS_BYTES_MAX {
        return Ok(Step::Waits);
    }
    let (staged, text) = conn.stream.staged_and_text();
    let progress = conn.session.feed(staged, text)?;
    conn.stream.consume(progress.used);
    let Some(event) = progress.event else {
        return Ok(if progress.used > 0 { Step::Again } else { Step::NeedsBytes });
    };
    match event {
        Event::Export { name } => {
            let known = name.is_empty() || name == EXPORT;
            let info = ExportInfo {
                id: 0,
                name: EXPORT.into(),
                description: String::new(),
                bytes,
                block_bytes: BLOCK_BYTES as u32,
                read_only: false,
            };
            let answer = if known { Ok(info) } else { Err(Refusal::Unknown) };
            conn.session.answer_export(answer, conn.stream.text())?;
        }
        Event::List => conn.session.answer_list(&[(EXPORT.into(), String::new())], conn.stream.text()),
        Event::Attached(_) => {}
        Event::Disconnect => return Ok(Step::Leaves),
        Event::Request(request) => return Ok(begin(conn, ring, request)),
    }
    Ok(Step::Again)
}

fn begin(conn: &mut Conn, ring: &mut Ring, request: Request) -> Step {
    let (structured, cookie) = (conn.session.structured(), request.cookie);
    let fits = u64::from(request.length) <= IO_BYTES_MAX;
    match request.command {
        Command::Read { .. } if fits => match memory(ring, request) {
            Some(buf) => return Step::Io(request, FileOp::Read(buf)),
            None => {
                let text = conn.stream.text();
                reply::error(structured, cookie, NbdError::Io, "no memory for it is left", text);
            }
        },
        Command::Write if fits => conn.incoming = Some(request),
        // Its payload is in the way of all that follows.
        Command::Write => return Step::Leaves,
        // Each write was durable when it was answered.
        Command::Flush | Command::Cache => reply::done(cookie, conn.stream.text()),
        _ => {
            let why = "this server only reads and writes, at most 128 KiB at a time";
            reply::error(structured, cookie, NbdError::NotSupported, why, conn.stream.text());
        }
    }
    Step::Again
}

fn memory(ring: &Ring, request: Request) -> Option<BufMut> {
    ring.arena().alloc((request.length as usize).div_ceil(BLOCK_BYTES))
}

/// How long it may take to listen.
const START_MAX: Duration = Duration::from_secs(10);

/// A running one, in a process of its own, whose processor time can be told; it ends when this is dropped.
#[derive(Debug)]
pub struct Bare {
    child: Child,
    unix: Target,
    tcp: Target,
}

impl Bare {
    /// Serves a file that is there; `spins` as targets of a dev cluster do, or sleeps whenever it waits.
    ///
    /// # Errors
    /// It does not start; the message has its words.
    pub fn of_file(scratch: &Path, file: &Path, spins: bool) -> anyhow::Result<Self> {
        let file = file.to_str().with_context(|| format!("{} is no UTF-8", file.display()))?;
        let (name, us) = if spins { ("spins", SPIN_US_MAX) } else { ("sleeps", 0) };
        Self::start(scratch, name, ["--file", file, "--spin-us-max", &us.to_string()])
    }

    /// Serves so many bytes of memory.
    ///
    /// # Errors
    /// See [`Bare::of_file`].
    pub fn of_memory(scratch: &Path, bytes: u64) -> anyhow::Result<Self> {
        let spin = SPIN_US_MAX.to_string();
        Self::start(scratch, "memory", ["--memory", &bytes.to_string(), "--spin-us-max", &spin])
    }

    fn start(scratch: &Path, name: &str, args: [&str; 4]) -> anyhow::Result<Self> {
        let bin = std::env::current_exe().context("the path of this program is unknown")?;
        let at = |end: &str| scratch.join(format!("bare-{name}.{end}"));
        let (socket, out, log) = (at("sock"), at("out"), at("log"));
        let mut command = with_us(bin);
        command.args(["bench", "bare"]).args(args).arg("--socket").arg(&socket);
        command
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out)?)
            .stderr(std::fs::File::create(&log)?);
        let mut child = command.spawn().context("this program cannot be run again")?;
        let tcp = told(&mut child, &out)
            .with_context(|| format!("`ashlar bench bare` says: {}", tail(&log, 3).trim()))?;
        Ok(Self { child, unix: Target::NbdUnix { socket, export: EXPORT.into() }, tcp })
    }

    /// Over a Unix socket.
    pub fn unix(&self, name: &str) -> Subject {
        self.subject(name, &self.unix)
    }

    /// Over TCP.
    pub fn tcp(&self, name: &str) -> Subject {
        self.subject(name, &self.tcp)
    }

    fn subject(&self, name: &str, target: &Target) -> Subject {
        let pids = vec![self.child.id().cast_signed()];
        Subject { name: name.to_owned(), target: target.clone(), pids, flushes: false }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the line that tells where it listens.
fn told(child: &mut Child, out: &Path) -> anyhow::Result<Target> {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(out)?;
        if let Some(address) = text.lines().find_map(|line| line.strip_prefix(READY))
            && text.ends_with('\n')
        {
            return address.parse();
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status}");
        }
        if started.elapsed() > START_MAX {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it did not listen within {START_MAX:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::job;
    use crate::run::load::{Io, Load};
    use protocol::nbd::{client, wire};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const BYTES: u64 = 1 << 20;

    /// One IO of a block filled with `fill`; what was read.
    fn one(target: &Target, write: bool, offset: u64, fill: u8) -> anyhow::Result<Vec<u8>> {
        let mut ring = job::ring(1, false)?;
        let mut driver = job::connect(&mut ring, target, &Load::random_4k(0, 1, BYTES), 0)?;
        assert_eq!(driver.bytes(), BYTES);
        let mut buf = ring.arena().alloc(1).context("memory")?;
        buf.fill(fill);
        driver.submit(&mut ring, 0, Io { write, offset, bytes: BLOCK_BYTES as u64 }, buf);
        let mut done = Vec::new();
        while done.is_empty() {
            driver.turn(&mut ring, None, &mut done)?;
        }
        let done = done.pop().context("just seen")?;
        done.result.map_err(anyhow::Error::msg)?;
        Ok(done.buf.to_vec())
    }

    /// A client that asks for the export.
    fn attached(socket: &Path) -> anyhow::Result<UnixStream> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut hello = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes().to_vec();
        client::info_option(wire::opt::GO, EXPORT, &[], &mut hello);
        stream.write_all(&hello)?;
        Ok(stream)
    }

    /// One that sends `bytes` then; what it is told until it is cut off.
    fn hostile(socket: &Path, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut stream = attached(socket)?;
        stream.write_all(bytes)?;
        let mut told = Vec::new();
        stream.read_to_end(&mut told)?;
        Ok(told)
    }

    #[test]
    fn what_is_written_is_read_and_a_hostile_client_ends_alone() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("bare.sock");
        let args = BareArgs { file: None, memory: Some(BYTES), socket: socket.clone(), spin_us_max: 0 };
        // It serves for as long as this process lives.
        std::thread::spawn(move || run(&args).map_err(|error| eprintln!("{error:#}")));
        let started = Instant::now();
        while !socket.exists() && started.elapsed() < START_MAX {
            std::thread::sleep(Duration::from_millis(5));
        }
        let target = Target::NbdUnix { socket: socket.clone(), export: EXPORT.into() };
        one(&target, true, 8192, 7)?;
        assert_eq!(one(&target, false, 8192, 0)?, [7; BLOCK_BYTES]);
        assert_eq!(one(&target, false, 4096, 1)?, [0; BLOCK_BYTES]);

        let mut long = Vec::new();
        client::request(wire::cmd::READ, 0, 1, 0, 256 << 10, &mut long);
        client::request(wire::cmd::DISC, 0, 2, 0, 0, &mut long);
        let told = hostile(&socket, &long)?;
        let refused =
            [&wire::SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &NbdError::NotSupported.code().to_be_bytes()];
        assert!(told.windows(8).any(|bytes| bytes == refused.concat()), "a read of 256 KiB: {told:?}");

        // One that asks for more than is taken in and reads nothing holds nobody else up.
        let mut greedy = Vec::new();
        for cookie in 0..16_000 {
            client::request(wire::cmd::READ, 0, cookie, 0, 4096, &mut greedy);
        }
        let mut deaf = attached(&socket)?;
        deaf.set_write_timeout(Some(Duration::from_millis(300)))?;
        let _ = deaf.write_all(&greedy);
        assert_eq!(one(&target, false, 8192, 0)?, [7; BLOCK_BYTES]);

        let mut write = Vec::new();
        client::request(wire::cmd::WRITE, 0, 1, 0, 256 << 10, &mut write);
        for senseless in [write, vec![0xff; 28]] {
            hostile(&socket, &senseless)?;
            assert_eq!(one(&target, false, 8192, 0)?, [7; BLOCK_BYTES], "others are served");
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_served_is_told() {
        let dir = tempfile::tempdir().expect("a folder");
        let args = |file: Option<PathBuf>, memory| {
            run(&BareArgs { file, memory, socket: dir.path().join("s"), spin_us_max: 0 })
        };
        let absent = args(Some(dir.path().join("absent")), None).expect_err("there is no such file");
        assert!(format!("{absent:#}").contains("absent"), "{absent:#}");
        let odd = args(None, Some(5000)).expect_err("no whole blocks");
        assert!(format!("{odd:#}").contains("5000"), "{odd:#}");
    }
}
