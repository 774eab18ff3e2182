//! A watch on the cluster map that survives restarts of the MDS.

use super::{MdsClient, PAUSE_MAX, PAUSE_MIN};
use protocol::control::{Problem, ProblemKind, map_from_pb, pb};
use protocol::map::ClusterMap;
use std::time::Duration;
use tokio::time::sleep;
use tonic::Streaming;

/// Hands out each newer map of one cluster.
#[derive(Debug)]
pub struct MapWatch {
    client: MdsClient,
    /// Of the cluster watched; `None` until the first map.
    cluster: Option<[u8; 16]>,
    known: u64,
    stream: Option<Streaming<pb::ClusterMap>>,
    /// To wait before the next attempt.
    pause: Option<Duration>,
}

impl MapWatch {
    /// A watch that starts with whatever map is newer than `known`, or with the current one.
    pub fn new(client: MdsClient, known: Option<&ClusterMap>) -> Self {
        Self {
            client,
            cluster: known.map(|map| map.cluster),
            known: known.map_or(0, |map| map.generation),
            stream: None,
            pause: None,
        }
    }

    /// The next newer map. Cancel-safe: a call given up loses nothing.
    ///
    /// # Errors
    /// Why there is none at the moment, to be logged; call again, which waits a little first.
    pub async fn next(&mut self) -> Result<ClusterMap, Problem> {
        if let Some(pause) = self.pause {
            sleep(pause).await;
        }
        match self.attempt().await {
            Ok(map) => {
                self.pause = None;
                Ok(map)
            }
            Err(problem) => {
                self.stream = None;
                self.pause = Some(self.pause.map_or(PAUSE_MIN, |pause| (pause * 2).min(PAUSE_MAX)));
                Err(problem)
            }
        }
    }

    async fn attempt(&mut self) -> Result<ClusterMap, Problem> {
        loop {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                none => none.insert(self.client.watch(self.known).await?),
            };
            let message = stream.message().await.map_err(|status| self.client.ended_with(&status))?;
            let Some(message) = message else { return Err(self.ended()) };
            let map = map_from_pb(&message)?;
            self.same_cluster(&map)?;
            if map.generation > self.known {
                self.cluster = Some(map.cluster);
                self.known = map.generation;
                return Ok(map);
            }
        }
    }

    fn same_cluster(&self, map: &ClusterMap) -> Result<(), Problem> {
        match self.cluster {
            Some(cluster) if cluster != map.cluster => Err(Problem::new(
                ProblemKind::WrongCluster,
                format!("MDS at {} serves another cluster than before", self.client.address()),
                "it was started on another directory, or the address was given to another MDS",
                "start the MDS on its own directory again, or format the target for the new cluster",
            )),
            _ => Ok(()),
        }
    }

    fn ended(&self) -> Problem {
        Problem::new(
            ProblemKind::Unreachable,
            format!("MDS at {} ended the watch", self.client.address()),
            "it is stopping",
            "start it again; the last map stays in force meanwhile",
        )
    }
}
