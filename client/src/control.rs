//! The control plane from outside: the MDS's client, a watch on the cluster map, and the client
//! of a target's admin service.
//!
//! Invariants: every call ends within its [`Patience`]; every failure is a [`Problem`] that names
//! the address; what the other end sends is checked before it is handed on. A call that could
//! take effect twice (create, delete) is sent once; the others are sent again while nobody
//! answers. Deliberately absent: threads and a runtime (the caller's tokio drives it), and
//! anything of the IO path.

mod admin;
mod mds;
mod watch;

pub use admin::{AdminClient, ChecksumStream};
pub use mds::{Beat, MdsClient, Registered, volume_ref};
pub use watch::MapWatch;

use protocol::control::{Problem, ProblemKind};
use std::future::Future;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// The first and the longest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long to try.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For one connection to be made.
    pub connect: Duration,
    /// For one attempt of one call to be answered.
    pub call: Duration,
    /// For new attempts of a call that nobody answers, counted from the first; zero: one attempt.
    pub retry: Duration,
}

impl Default for Patience {
    /// For a command that an operator waits for.
    fn default() -> Self {
        Self { connect: Duration::from_secs(2), call: Duration::from_secs(10), retry: Duration::from_secs(2) }
    }
}

impl Patience {
    /// For a loop that tries again by itself, such as heartbeats.
    pub const ONCE: Self =
        Self { connect: Duration::from_secs(1), call: Duration::from_secs(3), retry: Duration::ZERO };
}

/// One service at one address; connects when first used and again after each loss.
#[derive(Clone, Debug)]
struct Link {
    /// "MDS" or "target admin", for messages.
    noun: &'static str,
    address: String,
    patience: Patience,
    channel: Channel,
}

impl Link {
    fn new(noun: &'static str, address: &str, patience: Patience) -> Result<Self, Problem> {
        let endpoint = endpoint(noun, address)?
            .connect_timeout(patience.connect)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5));
        let channel = endpoint.connect_lazy();
        Ok(Self { noun, address: address.to_owned(), patience, channel })
    }

    /// One attempt.
    async fn once<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Problem> {
        match timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.problem(&status)),
            Err(_) => Err(self.timed_out(limit)),
        }
    }

    /// Attempts until one is answered or patience ends; `call` must be harmless when repeated.
    async fn repeat<T, F>(&self, mut call: impl FnMut(Channel) -> F) -> Result<T, Problem>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let end = Instant::now() + self.patience.retry;
        let mut pause = PAUSE_MIN;
        loop {
            let result = self.once(self.patience.call, call(self.channel.clone())).await;
            match result {
                Err(problem) if problem.kind == ProblemKind::Unreachable && Instant::now() + pause < end => {
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                result => return result,
            }
        }
    }

    fn problem(&self, status: &Status) -> Problem {
        // A status without details was made below the service: mostly by the connection.
        if status.details().is_empty() && matches!(status.code(), Code::Unavailable | Code::Unknown) {
            return self.unreachable(&root_cause(status));
        }
        if status.details().is_empty() && status.code() == Code::Unimplemented {
            return Problem::new(
                ProblemKind::Protocol,
                format!("{} at {} does not know this call", self.noun, self.address),
                "something else listens there, or it is of another version",
                "check the address and that all parts run the same version",
            );
        }
        let problem = Problem::from_status(status);
        if status.details().is_empty() {
            let what = format!("{} at {}: {}", self.noun, self.address, problem.what);
            return Problem::new(problem.kind, what, problem.cause, problem.fix);
        }
        problem
    }

    fn unreachable(&self, why: &str) -> Problem {
        Problem::new(
            ProblemKind::Unreachable,
            format!("{} not reachable at {} ({why})", self.noun, self.address),
            "it is not running, or the address is wrong",
            match self.noun {
                "MDS" => "start it (`ashlar dev` or `ashlar mds run`) or name it by --mds HOST:PORT",
                _ => "see `ashlar status` for the targets that are online and their addresses",
            },
        )
    }

    fn timed_out(&self, limit: Duration) -> Problem {
        Problem::new(
            ProblemKind::TimedOut,
            format!("{} at {} did not answer within {} ms", self.noun, self.address, limit.as_millis()),
            "it is overloaded or stopped, its disk hangs, or the network drops packets",
            "see its log; check with `ashlar status` whether the request took effect, then repeat it",
        )
    }

    fn nonsense(&self, what: &str) -> Problem {
        Problem::new(
            ProblemKind::Protocol,
            format!("{} at {} sent {what}", self.noun, self.address),
            "it is of another version, or something else listens there",
            "check the address and that all parts run the same version",
        )
    }
}

fn endpoint(noun: &str, address: &str) -> Result<Endpoint, Problem> {
    let bare = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
    let port = bare
        .rsplit_once(':')
        .and_then(|(host, port)| port.parse::<u16>().ok().filter(|port| *port != 0 && !host.is_empty()));
    let endpoint = port.and_then(|_| Endpoint::from_shared(format!("http://{bare}")).ok());
    endpoint.ok_or_else(|| {
        Problem::new(
            ProblemKind::Invalid,
            format!("{noun} address {address:?} refused"),
            "it is not of the form HOST:PORT",
            "write it as 127.0.0.1:7400, storage1:7400 or [::1]:7400",
        )
    })
}

/// The innermost error of a status: "Connection refused" rather than "transport error".
fn root_cause(status: &Status) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
