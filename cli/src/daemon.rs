//! What the long-running commands (`mds run`, `target run`) share: their log, and the pipe
//! by which a supervisor's death stops them.

use crate::problem::Problem;
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{IsTerminal, Read};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// After the end of stdin, so long may a graceful stop take.
const GRACE: Duration = Duration::from_secs(20);

/// The flags of every long-running command.
#[derive(Args, Clone, Copy, Debug)]
pub struct DaemonArgs {
    /// Stop when stdin ends: so a supervisor that holds the other end leaves nobody behind.
    #[arg(long)]
    die_with_stdin: bool,
    /// One JSON object a line of log.
    #[arg(long)]
    log_json: bool,
}

/// The log's level by part, such as `info,ashlar_copyset=debug`.
pub const LOG_VARIABLE: &str = "ASHLAR_LOG";

impl DaemonArgs {
    /// Starts the log on stderr and, if asked to, the watch on stdin.
    pub fn set_up(self) {
        let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        // A log that was set up already stays.
        let _ = if self.log_json {
            log.json().try_init()
        } else {
            log.with_ansi(std::io::stderr().is_terminal()).try_init()
        };
        if self.die_with_stdin {
            std::thread::spawn(stop_when_stdin_ends);
        }
    }
}

/// Resolves when the operator asks this process to stop. Listens from the call on.
pub fn stop_signal() -> Result<impl Future<Output = ()> + Send, Problem> {
    let listen = |kind| signal(kind).map_err(Problem::io("cannot listen for signals"));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Calls `stop`, on a thread of its own, when the operator asks this process to stop. Listens
/// from the call on.
pub fn on_stop_signal(stop: impl Fn() + Send + 'static) -> Result<(), Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Problem::io("cannot listen for signals"))?;
    let signalled = {
        let _inside = runtime.enter();
        stop_signal()?
    };
    std::thread::spawn(move || {
        runtime.block_on(signalled);
        stop();
    });
    Ok(())
}

/// Asks this process to stop as an operator would; ends it if it does not.
fn stop_when_stdin_ends() {
    let mut ignored = [0; 256];
    while std::io::stdin().lock().read(&mut ignored).is_ok_and(|count| count > 0) {}
    let _ = kill(Pid::this(), Signal::SIGTERM);
    std::thread::sleep(GRACE);
    eprintln!("ashlar: not stopped {} s after its supervisor's end; exiting", GRACE.as_secs());
    std::process::exit(1);
}
