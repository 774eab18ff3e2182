//! One refusal, with what happened, why it likely did and what mends it; the same on both ends
//! of a gRPC call.

use super::pb;
use core::fmt;
use prost::Message as _;
use tonic::{Code, Status};

/// The longest of each of a problem's texts, in bytes: three of them, percent-encoded as a gRPC
/// message and once more in its details, stay within the 16 KiB that HTTP/2 peers allow headers.
const TEXT_BYTES_MAX: usize = 480;

/// Why something was refused or failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// What a program may decide by.
    pub kind: ProblemKind,
    /// What happened.
    pub what: String,
    /// Its likely cause.
    pub cause: String,
    /// What to do.
    pub fix: String,
    /// Of `NotLeader`: the address of who leads, if anybody does.
    pub leader: Option<String>,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident, $word:literal, $code:ident;)*) => {
        /// What sort of problem; stable words on the wire.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum ProblemKind { $($(#[$doc])* $name,)* }

        impl ProblemKind {
            /// The stable word for it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
            /// The gRPC code it travels as.
            pub fn code(self) -> Code {
                match self { $(Self::$name => Code::$code,)* }
            }
            fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$name),)* _ => None }
            }
            #[cfg(test)]
            const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

kinds! {
    /// The request cannot be meant.
    Invalid, "invalid", InvalidArgument;
    /// No such volume, pool, export, copyset.
    NotFound, "not-found", NotFound;
    /// The name is in use.
    AlreadyExists, "already-exists", AlreadyExists;
    /// The disk belongs to another cluster.
    WrongCluster, "wrong-cluster", FailedPrecondition;
    /// Another disk holds the target id.
    IdTaken, "id-taken", FailedPrecondition;
    /// The MDS knows no such target: it is to register (again).
    UnknownTarget, "unknown-target", FailedPrecondition;
    /// The volume is exported or attached.
    InUse, "in-use", FailedPrecondition;
    /// The pool's capacity is used up.
    NoSpace, "no-space", ResourceExhausted;
    /// A limit named in `limits` is reached.
    Limit, "limit", ResourceExhausted;
    /// Not yet: too few targets registered, or the copyset is not led from here.
    NotReady, "not-ready", FailedPrecondition;
    /// This MDS stands by: another one leads, or none does yet. Nothing was done.
    NotLeader, "not-leader", Unavailable;
    /// Who asks may not do this.
    Refused, "refused", PermissionDenied;
    /// Nobody answers there.
    Unreachable, "unreachable", Unavailable;
    /// No answer within the time allowed; it may or may not have been done.
    TimedOut, "timed-out", DeadlineExceeded;
    /// The service's own storage failed.
    Storage, "storage", Internal;
    /// The other end does not speak as it should.
    Protocol, "protocol", Internal;
}

impl Problem {
    /// A problem; each text is made one line of bounded length.
    pub fn new(
        kind: ProblemKind,
        what: impl Into<String>,
        cause: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let (what, cause, fix) = (line(what.into()), line(cause.into()), line(fix.into()));
        Self { kind, what, cause, fix, leader: None }
    }

    /// What an MDS that does not lead answers to everything.
    pub fn not_leader(leader: Option<&str>) -> Self {
        let what = match leader {
            Some(leader) => format!("this MDS stands by; the leader is {leader}"),
            None => "this MDS stands by; no MDS leads at the moment".to_owned(),
        };
        let cause = "several MDS processes run, one of which leads, or an election is under way";
        let fix = "name all of them (--mds A,B,C): commands and targets then find the leader by themselves";
        Self {
            leader: leader.map(|leader| line(leader.to_owned())),
            ..Self::new(ProblemKind::NotLeader, what, cause, fix)
        }
    }

    /// What a gRPC status says: the problem that the other end sent, or one made from its code.
    pub fn from_status(status: &Status) -> Self {
        Self::from_details(status.details()).unwrap_or_else(|| {
            let kind = match status.code() {
                Code::InvalidArgument | Code::OutOfRange => ProblemKind::Invalid,
                Code::NotFound => ProblemKind::NotFound,
                Code::AlreadyExists => ProblemKind::AlreadyExists,
                Code::Unavailable => ProblemKind::Unreachable,
                Code::PermissionDenied | Code::Unauthenticated => ProblemKind::Refused,
                Code::DeadlineExceeded | Code::Cancelled => ProblemKind::TimedOut,
                Code::ResourceExhausted => ProblemKind::Limit,
                _ => ProblemKind::Protocol,
            };
            let what = format!("{:?}: {}", status.code(), status.message());
            Self::new(
                kind,
                what,
                "the other end failed below the level of this service",
                "see its log; check that both run the same version",
            )
        })
    }

    fn from_details(details: &[u8]) -> Option<Self> {
        if details.is_empty() {
            return None;
        }
        let detail = pb::ErrorDetail::decode(details).ok()?;
        let kind = ProblemKind::from_word(&detail.kind)?;
        let leader =
            (kind == ProblemKind::NotLeader && !detail.leader.is_empty()).then(|| line(detail.leader));
        Some(Self { leader, ..Self::new(kind, detail.what, detail.cause, detail.fix) })
    }
}

/// Without control characters, not above [`TEXT_BYTES_MAX`].
fn line(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let mut end = TEXT_BYTES_MAX - '…'.len_utf8();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    if text.contains(char::is_control) { text.replace(char::is_control, " ") } else { text }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; likely cause: {}; fix: {}", self.what, self.cause, self.fix)
    }
}

impl std::error::Error for Problem {}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let detail = pb::ErrorDetail {
            kind: problem.kind.word().into(),
            what: problem.what.clone(),
            cause: problem.cause.clone(),
            fix: problem.fix.clone(),
            leader: problem.leader.clone().unwrap_or_default(),
        };
        Status::with_details(problem.kind.code(), problem.to_string(), detail.encode_to_vec().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_way_through_a_status() {
        for kind in ProblemKind::ALL {
            let problem = Problem::new(*kind, "what \"x\"", "cause", "fix");
            let back = Problem::from_status(&Status::from(problem.clone()));
            assert_eq!(back, problem);
        }
    }

    #[test]
    fn who_leads_is_told_on_the_way_or_that_nobody_does() {
        for leader in [None, Some("storage1:7400")] {
            let problem = Problem::not_leader(leader);
            let back = Problem::from_status(&Status::from(problem.clone()));
            assert_eq!((back.leader.as_deref(), &back), (leader, &problem));
        }
    }

    #[test]
    fn a_hostile_text_stays_one_bounded_line() {
        let problem = Problem::new(ProblemKind::Invalid, "a\nb\r\x1b[31m", "é".repeat(9999), "");
        let shown = problem.to_string();
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(problem.cause.len() <= TEXT_BYTES_MAX);
    }

    #[test]
    fn a_status_with_foreign_details_is_still_a_problem() {
        for details in [&b"\xff\xff\xff"[..], b"", b"\x0a\x03abc"] {
            let status = Status::with_details(Code::Unavailable, "gone", details.to_vec().into());
            assert_eq!(Problem::from_status(&status).kind, ProblemKind::Unreachable);
        }
    }
}
