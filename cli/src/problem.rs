//! What an operator is told when something does not work: what happened, the likely
//! cause, and what to do about it. Every command ends in an [`Exit`] or in one of these.

use std::fmt;
use std::process::ExitCode;

/// How a command ended, as its exit code tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done.
    Ok,
    /// It could not be done.
    Failed,
    /// The command makes no sense as given.
    Usage,
    /// It was done, and what it checked does not hold.
    CheckFailed,
}

impl Exit {
    /// 0 ok, 1 failed, 2 usage, 3 a check or a regression failed.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::CheckFailed => 3,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

/// What every command answers.
pub type Outcome = Result<Exit, Problem>;

/// A failure as told to an operator.
#[derive(Debug)]
pub struct Problem {
    what: String,
    cause: String,
    fix: String,
    exit: Exit,
}

impl Problem {
    /// Something could not be done.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: String::new(), fix: String::new(), exit: Exit::Failed }
    }
    /// The command makes no sense as given.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::new(what) }
    }
    /// Why, most likely.
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.cause = cause.into();
        self
    }
    /// What to do about it.
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
    /// The exit code's meaning.
    pub fn exit(&self) -> Exit {
        self.exit
    }
    /// For `map_err`: an IO error of something that was being done, such as "cannot write /x".
    pub fn io(what: impl fmt::Display) -> impl FnOnce(std::io::Error) -> Self {
        move |error| {
            let fix = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "run as the user that owns it, or choose another place"
                }
                std::io::ErrorKind::StorageFull => "free some space there, or choose another place",
                _ => "",
            };
            Self::new(format!("{what}: {error}")).fix(fix)
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if !self.cause.is_empty() {
            write!(f, "\n  likely cause: {}", self.cause)?;
        }
        if !self.fix.is_empty() {
            write!(f, "\n  to mend: {}", self.fix)?;
        }
        Ok(())
    }
}

/// What the MDS or a target refused, in its own words.
impl From<protocol::control::Problem> for Problem {
    fn from(problem: protocol::control::Problem) -> Self {
        Self::new(problem.what).cause(problem.cause).fix(problem.fix)
    }
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Self::new(format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_reads_what_why_and_what_to_do() {
        let problem = Problem::new("cannot reach it").cause("it is not running").fix("start it");
        let text = problem.to_string();
        assert_eq!(text, "cannot reach it\n  likely cause: it is not running\n  to mend: start it");
        assert_eq!(problem.exit().code(), 1);
        assert_eq!(Problem::usage("no").exit().code(), 2);
    }
}
