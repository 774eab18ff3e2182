//! A client of etcd: the few calls that the MDS needs, from whichever member answers.
//!
//! Each call is one attempt of bounded length at one member; after a failure the next one goes to another
//! member. Whether a call that failed took effect is not known: whoever repeats it must make that harmless.
//! Made from `proto/etcd.proto`, since published clients need a protobuf compiler on the machine that builds.

use protocol::control::{Problem, ProblemKind};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// The messages and calls as generated; comments are in `proto/etcd.proto`.
pub(crate) mod pb {
    #![allow(missing_docs, rust_2018_idioms, clippy::all)]
    tonic::include_proto!("etcdserverpb");
}

use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::range_request::{SortOrder, SortTarget};
use pb::request_op::Request as OpKind;

/// What one attempt may take; a member that answers no faster is as good as away.
const CALL_MAX: Duration = Duration::from_millis(1000);
const CONNECT_MAX: Duration = Duration::from_millis(500);
/// A page of records: 4,000 volumes of 200 copysets are 4 MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Beneath which all keys are, where the address names nothing else.
const PREFIX: &str = "ashlar";

/// Where an etcd cluster is, and beneath which prefix the keys are: `etcd://HOST:PORT,HOST:PORT[/PREFIX]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EtcdAt {
    /// `HOST:PORT` of its members.
    pub members: Vec<String>,
    /// Without slashes around it.
    pub prefix: String,
}

impl FromStr for EtcdAt {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let refuse = |cause: String| {
            Problem::new(
                ProblemKind::Invalid,
                format!("etcd address {text:?} refused"),
                cause,
                "write it as etcd://HOST:PORT,HOST:PORT or etcd://HOST:PORT/PREFIX",
            )
        };
        let bare = text.strip_prefix("etcd://").ok_or_else(|| refuse("it has no etcd://".into()))?;
        let (members, prefix) = bare.split_once('/').unwrap_or((bare, PREFIX));
        let prefix = prefix.trim_matches('/');
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if prefix.is_empty() || !prefix.chars().all(fine) {
            return Err(refuse(format!("{prefix:?} is no prefix of letters, digits, '.', '_', '-' and '/'")));
        }
        let members: Vec<String> = members.split(',').map(str::to_owned).collect();
        for member in &members {
            endpoint(member).ok_or_else(|| refuse(format!("{member:?} is not of the form HOST:PORT")))?;
        }
        Ok(Self { members, prefix: prefix.to_owned() })
    }
}

impl fmt::Display for EtcdAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}/{}", self.members.join(","), self.prefix)
    }
}

fn endpoint(member: &str) -> Option<Endpoint> {
    let (host, port) = member.rsplit_once(':')?;
    let port = port.parse::<u16>().ok().filter(|port| *port != 0 && !host.is_empty())?;
    Endpoint::from_shared(format!("http://{host}:{port}")).ok()
}

/// Why a call failed.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    member: String,
    why: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd at {}: {}", self.member, self.why)
    }
}

impl Trouble {
    /// As an operator is told of it.
    pub(crate) fn problem(&self) -> Problem {
        Problem::new(
            ProblemKind::Unreachable,
            self.to_string(),
            "that member is down or cut off, or etcd has no leader",
            "see `etcdctl endpoint status`; more than half of its members must run",
        )
    }
}

/// The client. Clones share connections.
#[derive(Clone, Debug)]
pub(crate) struct Etcd {
    members: Arc<[(String, Channel)]>,
    /// Who is asked next, as an index modulo the number of members.
    at: Arc<AtomicUsize>,
}

impl Etcd {
    /// Connects when first used. Must be made within a tokio runtime.
    pub(crate) fn new(at: &EtcdAt) -> Self {
        let connect = |member: &String| {
            let endpoint = endpoint(member).expect("addresses were checked when they were parsed");
            (member.clone(), endpoint.connect_timeout(CONNECT_MAX).tcp_nodelay(true).connect_lazy())
        };
        Self { members: at.members.iter().map(connect).collect(), at: Arc::default() }
    }

    /// One attempt.
    async fn call<T, F>(&self, limit: Duration, call: impl FnOnce(Channel) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let at = self.at.load(Ordering::Relaxed);
        let (member, channel) = &self.members[at % self.members.len()];
        let why = match tokio::time::timeout(limit, call(channel.clone())).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => format!("{:?}: {}", status.code(), status.message()),
            Err(_) => format!("no answer within {} ms", limit.as_millis()),
        };
        // Unless somebody else went on meanwhile.
        let _ = self.at.compare_exchange(at, at.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
        Err(Trouble { member: member.clone(), why })
    }

    /// Keys from `key` to before `end`, in order, at most `limit` of them; whether there are more.
    pub(crate) async fn range(
        &self,
        key: Vec<u8>,
        end: Vec<u8>,
        limit: i64,
    ) -> Result<(Vec<pb::KeyValue>, bool), Trouble> {
        let request = pb::RangeRequest { key, range_end: end, limit, ..Default::default() };
        let answer = self.call(CALL_MAX * 5, |c| async move { kv(c).range(request).await }).await?;
        Ok((answer.kvs, answer.more))
    }

    /// The oldest of the keys that begin so.
    pub(crate) async fn oldest(&self, prefix: &str) -> Result<Option<pb::KeyValue>, Trouble> {
        let request = pb::RangeRequest {
            key: prefix.into(),
            range_end: end_of(prefix),
            limit: 1,
            sort_order: SortOrder::Ascend.into(),
            sort_target: SortTarget::Create.into(),
            ..Default::default()
        };
        let answer = self.call(CALL_MAX, |c| async move { kv(c).range(request).await }).await?;
        Ok(answer.kvs.into_iter().next())
    }

    /// One transaction.
    pub(crate) async fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, Trouble> {
        self.call(CALL_MAX, |c| async move { kv(c).txn(request).await }).await
    }

    /// The revision that the store is at.
    pub(crate) async fn revision(&self) -> Result<i64, Trouble> {
        let request = pb::RangeRequest { key: vec![0], count_only: true, limit: 1, ..Default::default() };
        let answer = self.call(CALL_MAX, |c| async move { kv(c).range(request).await }).await?;
        Ok(answer.header.map_or(0, |header| header.revision))
    }

    /// Forgets what keys held before a revision; what they hold now stays.
    pub(crate) async fn compact(&self, revision: i64) -> Result<(), Trouble> {
        let request = pb::CompactionRequest { revision, physical: false };
        self.call(CALL_MAX, |c| async move { kv(c).compact(request).await }).await.map(drop)
    }

    /// A new lease: its id, and how long it holds, which may be longer than asked for.
    pub(crate) async fn grant(&self, seconds: u32) -> Result<(i64, Duration), Trouble> {
        let request = pb::LeaseGrantRequest { ttl: seconds.into(), id: 0 };
        let answer = self.call(CALL_MAX, |c| async move { lease(c).lease_grant(request).await }).await?;
        Ok((answer.id, Duration::from_secs(answer.ttl.max(0) as u64)))
    }

    /// Renews a lease: how long it holds, zero when it is over.
    pub(crate) async fn keep_alive(&self, id: i64, limit: Duration) -> Result<Duration, Trouble> {
        let renew = |c| async move {
            // One renewal a stream, so that each can go to another member.
            let requests = tokio_stream::once(pb::LeaseKeepAliveRequest { id });
            let mut answers = lease(c).lease_keep_alive(requests).await?.into_inner();
            let answer = answers.message().await?;
            answer.map(Response::new).ok_or_else(|| Status::unavailable("the stream ended"))
        };
        let answer = self.call(limit, renew).await?;
        Ok(Duration::from_secs(answer.ttl.max(0) as u64))
    }

    /// Ends a lease, and all keys that go with it.
    pub(crate) async fn revoke(&self, id: i64) -> Result<(), Trouble> {
        let request = pb::LeaseRevokeRequest { id };
        self.call(CALL_MAX, |c| async move { lease(c).lease_revoke(request).await }).await.map(drop)
    }
}

fn kv(channel: Channel) -> pb::kv_client::KvClient<Channel> {
    pb::kv_client::KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

fn lease(channel: Channel) -> pb::lease_client::LeaseClient<Channel> {
    pb::lease_client::LeaseClient::new(channel)
}

/// The first key after all that begin so.
pub(crate) fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("prefixes are not empty") += 1;
    end
}

/// That a key was created at this revision, and not deleted since; 0: that there is none.
pub(crate) fn created_at(key: &str, revision: i64) -> pb::Compare {
    pb::Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.into(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
    }
}

/// That a key holds this.
pub(crate) fn holds(key: &str, value: &[u8]) -> pb::Compare {
    pb::Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Value.into(),
        key: key.into(),
        target_union: Some(TargetUnion::Value(value.to_vec())),
    }
}

/// Within a transaction: writes a key, which ends with a lease unless that is 0.
pub(crate) fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>, lease: i64) -> pb::RequestOp {
    let put = pb::PutRequest { key: key.into(), value: value.into(), lease };
    pb::RequestOp { request: Some(OpKind::RequestPut(put)) }
}

/// Within a transaction: reads a key.
pub(crate) fn get(key: &str) -> pb::RequestOp {
    let range = pb::RangeRequest { key: key.into(), ..Default::default() };
    pb::RequestOp { request: Some(OpKind::RequestRange(range)) }
}

/// Within a transaction: deletes a key, or all up to before `end`.
pub(crate) fn delete(key: impl Into<Vec<u8>>, end: Vec<u8>) -> pb::RequestOp {
    let range = pb::DeleteRangeRequest { key: key.into(), range_end: end };
    pb::RequestOp { request: Some(OpKind::RequestDeleteRange(range)) }
}

/// The keys that the reads of a transaction found, in their order.
pub(crate) fn found(answer: pb::TxnResponse) -> Vec<Option<pb::KeyValue>> {
    let read = |op: pb::ResponseOp| match op.response {
        Some(pb::response_op::Response::ResponseRange(range)) => Some(range.kvs.into_iter().next()),
        _ => None,
    };
    answer.responses.into_iter().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_members_and_a_prefix_or_is_refused() {
        let at: EtcdAt = "etcd://a:2379,[::1]:2380/one/two/".parse().unwrap();
        assert_eq!((at.members.len(), at.prefix.as_str()), (2, "one/two"));
        assert_eq!("etcd://a:1".parse::<EtcdAt>().unwrap().to_string(), "etcd://a:1/ashlar");
        for bad in
            ["", "a:1", "etcd://", "etcd://a", "etcd://a:0", "etcd://a:1,", "etcd://a:1/", "etcd://a:1/p q"]
        {
            assert_eq!(bad.parse::<EtcdAt>().expect_err(bad).kind, ProblemKind::Invalid, "{bad}");
        }
    }
}
