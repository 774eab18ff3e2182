//! The control plane from outside: the MDS's client, a watch on the cluster map, and the client
//! of a target's admin service.
//!
//! Where several MDS run, one leads and the others tell who: a client is given all their addresses, goes
//! where it is sent, and to the next one when nobody answers.
//!
//! Invariants: every call ends within its [`Patience`]; every failure is a [`Problem`] that names
//! the address; what the other end sends is checked before it is handed on. A call that could
//! take effect twice (create, delete) is sent again only when it was not carried out for sure; the others
//! are sent again while nobody answers. Deliberately absent: threads and a runtime (the caller's tokio drives it), and
//! anything of the IO path.

mod admin;
mod mds;
mod watch;

pub use admin::{AdminClient, ChecksumStream};
pub use mds::{Beat, MdsClient, Registered, volume_ref};
pub use watch::MapWatch;

use protocol::control::{Problem, ProblemKind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, ConnectError, Response, Status};

/// The first and the longest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Where there are several, one that answers no sooner is passed over.
const SEVERAL_CALL_MAX: Duration = Duration::from_secs(3);
/// Where there are several, an election may be under way for so long.
const ELECTION_MAX: Duration = Duration::from_secs(8);
/// Most addresses, those learnt on the way included.
const PLACES_MAX: usize = 16;

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

/// One service at one address, or at several of which one answers; connects when first used and again after
/// each loss. Clones go to the same one.
#[derive(Clone, Debug)]
struct Link {
    /// "MDS" or "target admin", for messages.
    noun: &'static str,
    patience: Patience,
    places: Arc<Places>,
}

/// Where a service may be.
#[derive(Debug)]
struct Places {
    all: Mutex<Vec<Place>>,
    /// Who is asked, as an index.
    at: AtomicUsize,
    /// The one who is asked has answered.
    settled: AtomicBool,
}

/// One address.
#[derive(Clone, Debug)]
struct Place {
    address: String,
    channel: Channel,
}

/// An attempt that failed.
struct Failed {
    problem: Problem,
    /// It may have been carried out.
    sent: bool,
}

impl Link {
    /// `addresses` are `HOST:PORT`, separated by commas.
    fn new(noun: &'static str, addresses: &str, patience: Patience) -> Result<Self, Problem> {
        let places = addresses.split(',').map(|address| place(noun, address.trim(), patience));
        let places = places.collect::<Result<Vec<_>, _>>()?;
        if places.len() > PLACES_MAX {
            return Err(Problem::new(
                ProblemKind::Limit,
                format!("{} addresses of one {noun} refused", places.len()),
                format!("the limit is {PLACES_MAX}"),
                "name fewer",
            ));
        }
        let (all, at, settled) = (Mutex::new(places), AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Self { noun, patience, places: Arc::new(Places { all, at, settled }) })
    }

    /// Who is asked now, and its index.
    fn here(&self) -> (usize, Place) {
        let all = self.places.all.lock().expect("nobody panics with it");
        let at = self.places.at.load(Ordering::Relaxed) % all.len();
        (at, all[at].clone())
    }

    fn count(&self) -> usize {
        self.places.all.lock().expect("nobody panics with it").len()
    }

    /// Whether the one who is asked now has answered, or is the only one.
    fn is_settled(&self) -> bool {
        self.count() == 1 || self.places.settled.load(Ordering::Relaxed)
    }

    /// After a failure of the one at `from`: goes where it said, or to the next one. Whether the problem is
    /// of a kind that another one may not have.
    fn move_on(&self, from: usize, problem: &Problem) -> bool {
        let leader = match problem.kind {
            ProblemKind::NotLeader => problem.leader.as_deref(),
            ProblemKind::Unreachable | ProblemKind::TimedOut => None,
            _ => return false,
        };
        let mut all = self.places.all.lock().expect("nobody panics with it");
        let known = |all: &[Place]| leader.and_then(|leader| all.iter().position(|p| p.address == leader));
        if let Some(leader) = leader
            && known(&all).is_none()
            && all.len() < PLACES_MAX
            && let Ok(place) = place(self.noun, leader, self.patience)
        {
            all.push(place);
        }
        let next = known(&all).unwrap_or((from + 1) % all.len());
        self.places.settled.store(false, Ordering::Relaxed);
        // Unless a clone went on meanwhile.
        let at = &self.places.at;
        let _ = at.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
        true
    }

    /// One attempt, where it is asked now.
    async fn once<T>(
        &self,
        call: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
    ) -> Result<T, (usize, Failed)> {
        let (at, place) = self.here();
        let several = self.count() > 1;
        let limit = if several { self.patience.call.min(SEVERAL_CALL_MAX) } else { self.patience.call };
        match timeout(limit, call(place.channel.clone())).await {
            Ok(Ok(response)) => {
                self.places.settled.store(true, Ordering::Relaxed);
                Ok(response.into_inner())
            }
            Ok(Err(status)) => {
                let problem = self.problem(&place.address, &status);
                let sent = problem.kind != ProblemKind::NotLeader && !is_unsent(&status);
                Err((at, Failed { problem, sent }))
            }
            Err(_) => Err((at, Failed { problem: self.timed_out(&place.address, limit), sent: true })),
        }
    }

    /// Attempts until one is answered or patience ends; `call` must be harmless when repeated.
    async fn repeat<T>(
        &self,
        call: impl AsyncFn(Channel) -> Result<Response<T>, Status>,
    ) -> Result<T, Problem> {
        self.attempts(call, true).await
    }

    /// As [`Link::repeat`], for a call that may take effect twice: it is sent again only when it surely was
    /// not carried out.
    async fn single<T>(
        &self,
        call: impl AsyncFn(Channel) -> Result<Response<T>, Status>,
    ) -> Result<T, Problem> {
        self.attempts(call, false).await
    }

    async fn attempts<T>(
        &self,
        call: impl AsyncFn(Channel) -> Result<Response<T>, Status>,
        repeatable: bool,
    ) -> Result<T, Problem> {
        let several = self.count() > 1;
        let patience = match self.patience.retry {
            Duration::ZERO => Duration::ZERO,
            retry if several => retry.max(ELECTION_MAX),
            retry => retry,
        };
        let end = Instant::now() + patience;
        let (mut pause, mut round) = (PAUSE_MIN, 1);
        loop {
            let (at, Failed { problem, sent }) = match self.once(&call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let moved = self.move_on(at, &problem);
            let harmless = !sent || (repeatable && (several || problem.kind != ProblemKind::TimedOut));
            if !moved || !harmless {
                return Err(problem);
            }
            // All are asked once, and whoever they name, before there is a pause.
            if several && round <= self.count() {
                round += 1;
                continue;
            }
            if Instant::now() + pause >= end {
                return Err(problem);
            }
            sleep(pause).await;
            (pause, round) = ((pause * 2).min(PAUSE_MAX), 1);
        }
    }

    fn problem(&self, address: &str, status: &Status) -> Problem {
        // A status without details was made below the service: mostly by the connection.
        if status.details().is_empty() && matches!(status.code(), Code::Unavailable | Code::Unknown) {
            return self.unreachable(address, &root_cause(status));
        }
        if status.details().is_empty() && status.code() == Code::Unimplemented {
            return Problem::new(
                ProblemKind::Protocol,
                format!("{} at {address} does not know this call", self.noun),
                "something else listens there, or it is of another version",
                "check the address and that all parts run the same version",
            );
        }
        let problem = Problem::from_status(status);
        if status.details().is_empty() {
            let what = format!("{} at {address}: {}", self.noun, problem.what);
            return Problem::new(problem.kind, what, problem.cause, problem.fix);
        }
        problem
    }

    fn unreachable(&self, address: &str, why: &str) -> Problem {
        Problem::new(
            ProblemKind::Unreachable,
            format!("{} not reachable at {address} ({why})", self.noun),
            "it is not running, or the address is wrong",
            match self.noun {
                "MDS" => "start it (`ashlar dev` or `ashlar mds run`) or name it by --mds HOST:PORT",
                _ => "see `ashlar status` for the targets that are online and their addresses",
            },
        )
    }

    fn timed_out(&self, address: &str, limit: Duration) -> Problem {
        Problem::new(
            ProblemKind::TimedOut,
            format!("{} at {address} did not answer within {} ms", self.noun, limit.as_millis()),
            "it is overloaded or stopped, its disk hangs, or the network drops packets",
            "see its log; check with `ashlar status` whether the request took effect, then repeat it",
        )
    }

    fn nonsense(&self, what: &str) -> Problem {
        Problem::new(
            ProblemKind::Protocol,
            format!("{} at {} sent {what}", self.noun, self.here().1.address),
            "it is of another version, or something else listens there",
            "check the address and that all parts run the same version",
        )
    }
}

fn place(noun: &str, address: &str, patience: Patience) -> Result<Place, Problem> {
    let endpoint = endpoint(noun, address)?
        .connect_timeout(patience.connect)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5));
    Ok(Place { address: address.to_owned(), channel: endpoint.connect_lazy() })
}

/// Whether a status was made since no connection could be.
fn is_unsent(status: &Status) -> bool {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
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
