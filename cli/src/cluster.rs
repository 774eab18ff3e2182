//! Finding the cluster that a command is about.
//!
//! Where to look, first hit wins: `--mds`, `--dir`, the variable ASHLAR_MDS, a dev cluster
//! in ./ashlar-dev. Deliberately absent: connections; those are the `client` crate's.

use crate::dev::record::DevRecord;
use crate::problem::Problem;
use clap::Args;
use client::control::{MdsClient, Patience};
use std::path::{Path, PathBuf};

/// The dev cluster's folder where none is named.
pub const DEV_DIR: &str = "ashlar-dev";
/// The variable that names the MDS.
pub const MDS_VARIABLE: &str = "ASHLAR_MDS";

/// How to find the cluster.
#[derive(Args, Clone, Debug, Default)]
pub struct ClusterArgs {
    /// The cluster's MDS, or all of them separated by commas [else: --dir, $ASHLAR_MDS, ./ashlar-dev]
    #[arg(long, value_name = "HOST:PORT,...")]
    pub mds: Option<String>,
    /// The folder of a dev cluster (ashlar dev --dir).
    #[arg(long, value_name = "DIR", conflicts_with = "mds")]
    pub dir: Option<PathBuf>,
}

impl ClusterArgs {
    /// The MDS's address.
    pub fn endpoint(&self) -> Result<String, Problem> {
        self.endpoint_given(std::env::var(MDS_VARIABLE).ok().as_deref())
    }

    fn endpoint_given(&self, variable: Option<&str>) -> Result<String, Problem> {
        if let Some(address) = &self.mds {
            return Ok(address.clone());
        }
        if let Some(dir) = &self.dir {
            return endpoint_of_dev(dir);
        }
        if let Some(address) = variable.filter(|value| !value.is_empty()) {
            return Ok(address.to_owned());
        }
        if Path::new(DEV_DIR).join("dev.json").is_file() {
            return endpoint_of_dev(Path::new(DEV_DIR));
        }
        Err(Problem::usage("no cluster is named").fix(
            "give --mds HOST:PORT, or --dir of a dev cluster, or set ASHLAR_MDS; `ashlar dev` starts one",
        ))
    }

    /// A client of the cluster's MDS; it connects at the first call.
    pub fn connect(&self) -> Result<MdsClient, Problem> {
        // Only an address that is none is refused before the first call.
        MdsClient::new(&self.endpoint()?, Patience::default())
            .map_err(|refusal| Problem::usage(refusal.what).cause(refusal.cause).fix(refusal.fix))
    }
}

fn endpoint_of_dev(dir: &Path) -> Result<String, Problem> {
    match DevRecord::read(dir) {
        Ok(record) => Ok(record.mds.endpoint),
        Err(error) => Err(Problem::new(format!("no dev cluster runs in {}: {error}", dir.display()))
            .cause("it was stopped, or never started there")
            .fix(format!("start it: ashlar dev --dir {}", dir.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(mds: Option<&str>, dir: Option<&Path>) -> ClusterArgs {
        ClusterArgs { mds: mds.map(String::from), dir: dir.map(PathBuf::from) }
    }

    #[test]
    fn a_flag_beats_the_variable() {
        let found = args(Some("a:1"), None).endpoint_given(Some("b:2")).expect("named");
        assert_eq!(found, "a:1");
        assert_eq!(args(None, None).endpoint_given(Some("b:2")).expect("named"), "b:2");
    }

    #[test]
    fn a_stopped_dev_cluster_is_said_to_be_stopped() {
        let dir = tempfile::tempdir().expect("a folder");
        let problem = args(None, Some(dir.path())).endpoint_given(Some("b:2")).expect_err("nothing there");
        assert!(problem.to_string().contains("no dev cluster runs in"), "{problem}");
    }

    #[tokio::test]
    async fn several_addresses_are_taken_and_one_that_is_none_is_a_usage_error() {
        args(Some("a:1, b:2,[::1]:3"), None).connect().expect("all are addresses");
        let problem = args(Some("a:1,nonsense"), None).connect().expect_err("no address");
        assert_eq!(problem.exit().code(), 2);
    }

    #[test]
    fn an_empty_variable_is_no_address() {
        let problem = args(None, None).endpoint_given(Some("")).expect_err("nothing named");
        assert_eq!(problem.exit().code(), 2);
    }
}
