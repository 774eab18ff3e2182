//! Subsystems and controllers: what Connect makes and what admin queues talk to.
//!
//! One subsystem a volume, with the namespace 1, and the discovery subsystem. Controllers are
//! dynamic: a Connect of an admin queue makes one, the end of that queue ends it and closes
//! its IO queues. Ids of controllers are split between targets (255 a target and subsystem), for
//! a host that sees a subsystem through two targets must not meet the same id twice.
//!
//! Calling contract: [`Controllers::connect`] for each Connect, [`Controllers::admin`] for each
//! command of an admin queue, [`Controllers::closed`] once for every connection that ended,
//! [`Controllers::served`] and [`Controllers::tick`] about once a second, and [`Controllers::poll`] to the end after each.
//! A [`QueueId`] names a connection until it is told closed.
//!
//! Deliberately absent: sockets, IO, saved features, firmware, reservations.

mod admin;
mod features;
#[cfg(test)]
mod tests;

use super::command::Namespace;
use super::identify;
use super::logs::{Ana, Served};
use super::wire::*;
use crate::map::Session;
use crate::types::{SessionEpoch, Span, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

/// Controllers of one subsystem at one target.
const CONTROLLERS_MAX: u32 = 255;
/// How long a discovery controller that has no keep alive timer may be idle.
const DISCOVERY_IDLE: Span = Span::ms(120_000);
/// How late a keep alive may be: the clock is looked at once a second.
const GRACE: Span = Span::ms(1_000);

/// The caller's name of a connection.
pub type QueueId = usize;

/// What this target offers, and what it knows of the others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct View {
    /// Which cluster.
    pub cluster: [u8; 16],
    /// Rises with changes. The discovery log's generation is this, or more: it rises with that log's own changes.
    pub generation: u64,
    /// This target's number.
    pub target: u32,
    /// Every port of every target, by the number of the port.
    pub ports: Vec<(u16, SocketAddr)>,
    /// The volumes offered, each a subsystem.
    pub volumes: Vec<Volume>,
    /// How good the paths through this target are.
    pub ana: Ana,
}

/// One volume offered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What hosts see of it.
    pub namespace: Namespace,
    /// The names of the only hosts that may see it; empty: any may.
    pub allowed_hosts: BTreeSet<String>,
    /// Who of them may attach now.
    pub session: Session,
}

impl Volume {
    fn allows(&self, host: &str) -> bool {
        self.allowed_hosts.is_empty() || self.allowed_hosts.contains(host)
    }
    fn admits(&self, host: &str) -> bool {
        self.allows(host) && self.session.admits(host)
    }
}

/// A Connect that was accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connected {
    /// The queue is an admin queue.
    pub admin: bool,
    /// The controller's id.
    pub cntlid: u16,
    /// The namespace of the subsystem.
    pub namespace: Option<Namespace>,
    /// Who connected.
    pub host: String,
    /// The queue's number.
    pub qid: u16,
    /// Under which its controller was made: what is done by its queues is done under this.
    pub epoch: SessionEpoch,
}

/// The answer to an admin command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Now.
    Done {
        /// How it went.
        status: Status,
        /// Depends on the command.
        result: u64,
        /// For the host.
        data: Vec<u8>,
    },
    /// It is answered by [`Out::Complete`], some day.
    Later,
}

impl Answer {
    fn ok(result: u64) -> Self {
        Self::Done { status: Status::SUCCESS, result, data: Vec::new() }
    }
    fn data(data: Vec<u8>) -> Self {
        Self::Done { status: Status::SUCCESS, result: 0, data }
    }
}

/// What the caller is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Out {
    /// Answer a command of an admin queue.
    Complete {
        /// The connection.
        queue: QueueId,
        /// The command.
        cid: u16,
        /// How it went.
        status: Status,
        /// Depends on the command.
        result: u64,
    },
    /// The namespace of an IO queue has changed.
    Namespace {
        /// The connection.
        queue: QueueId,
        /// What it is now.
        namespace: Option<Namespace>,
    },
    /// End a connection.
    Close {
        /// The connection.
        queue: QueueId,
        /// For people.
        why: &'static str,
    },
}

impl Out {
    /// The connection that it concerns.
    pub fn queue(&self) -> QueueId {
        match self {
            Out::Complete { queue, .. } | Out::Namespace { queue, .. } | Out::Close { queue, .. } => *queue,
        }
    }
}

/// What a host is told of by asynchronous events.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Notice {
    Namespace,
    Ana,
    Discovery,
}

impl Notice {
    /// Its bit of the configuration.
    fn bit(self) -> u32 {
        match self {
            Notice::Namespace => 1 << 8,
            Notice::Ana => 1 << 11,
            Notice::Discovery => 1 << 31,
        }
    }
    fn page(self) -> u8 {
        match self {
            Notice::Namespace => log::CHANGED_NS,
            Notice::Ana => log::ANA,
            Notice::Discovery => log::DISCOVERY,
        }
    }
    fn result(self) -> u64 {
        let info = match self {
            Notice::Namespace => 0u64,
            Notice::Ana => 3,
            Notice::Discovery => 0xf0,
        };
        2 | info << 8 | u64::from(self.page()) << 16
    }
}

/// One host's association with one subsystem.
#[derive(Debug)]
struct Controller {
    cntlid: u16,
    nqn: String,
    /// `None`: discovery.
    volume: Option<VolumeId>,
    epoch: SessionEpoch,
    host_nqn: String,
    host_id: [u8; 16],
    admin: QueueId,
    io: BTreeMap<u16, QueueId>,
    io_max: u16,
    cc: u32,
    csts: u32,
    kato_ms: u32,
    seen: Time,
    /// Asynchronous Event Requests that wait.
    aers: VecDeque<u16>,
    /// Events that are told of.
    event_bits: u32,
    pending: BTreeSet<Notice>,
    /// Told, and the log was not read since.
    masked: BTreeSet<Notice>,
    changed: bool,
    features: BTreeMap<u8, u32>,
    behavior: Vec<u8>,
}

/// All controllers of one target; see the module.
#[derive(Debug, Default)]
pub struct Controllers {
    view: View,
    /// By volume.
    served: BTreeMap<VolumeId, Served>,
    ana_changes: u64,
    /// By a number that is never used again.
    controllers: BTreeMap<u64, Controller>,
    next: u64,
    queues: BTreeMap<QueueId, u64>,
    out: VecDeque<Out>,
}

/// A Connect is refused: with which status and which result.
type Refused = (Status, u32);

impl Controllers {
    /// Nothing is offered yet.
    pub fn new() -> Self {
        Self::default()
    }
    /// What is to be done.
    pub fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }
    /// Whether no host is connected.
    pub fn is_empty(&self) -> bool {
        self.controllers.is_empty()
    }
    /// What is offered has changed; hosts are told, and those that may not any more are let go.
    pub fn set_view(&mut self, view: View) {
        let before = core::mem::replace(&mut self.view, view);
        let offer = |view: &View| {
            let seen = |v: &Volume| (v.name.clone(), v.allowed_hosts.clone(), v.session.holder.clone());
            view.volumes.iter().map(seen).collect::<Vec<_>>()
        };
        let changed = before.ports != self.view.ports || offer(&before) != offer(&self.view);
        if before.generation != 0 {
            self.view.generation = match changed {
                true => self.view.generation.max(before.generation + 1),
                false => before.generation,
            };
        }
        self.let_go();
        let view = &self.view;
        let ana = before.ana != self.view.ana;
        self.ana_changes += u64::from(ana);
        for controller in self.controllers.values_mut() {
            let host = &controller.host_nqn;
            if let Some(volume) = controller.volume {
                let now = namespace(&self.view, volume);
                if now != namespace(&before, volume) {
                    controller.changed = true;
                    controller.notify(Notice::Namespace, &mut self.out);
                    let told = |&queue| Out::Namespace { queue, namespace: now };
                    self.out.extend(controller.io.values().map(told));
                }
                if ana {
                    controller.notify(Notice::Ana, &mut self.out);
                }
            } else if before.ports != view.ports || before.shown(host) != view.shown(host) {
                controller.notify(Notice::Discovery, &mut self.out);
            }
        }
    }
    /// Ends the controllers of hosts that are no longer allowed. One whose volume was taken over stays: its
    /// commands fail for good, where those of one that ends would be sent again by a host that comes back.
    fn let_go(&mut self) {
        let stays = |c: &Controller| {
            let volume = self.view.volumes.iter().find(|v| Some(v.namespace.volume) == c.volume);
            volume.is_none_or(|volume| volume.allows(&c.host_nqn))
        };
        let barred: Vec<u64> =
            self.controllers.iter().filter(|(_, c)| !stays(c)).map(|(key, _)| *key).collect();
        for key in barred {
            self.expel(key, "its host is no longer allowed");
        }
    }
    /// What this target offers.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// A Connect, with its data.
    pub fn connect(
        &mut self,
        queue: QueueId,
        sqe: &Sqe,
        data: &[u8],
        now: Time,
    ) -> Result<Connected, Refused> {
        assert!(!self.queues.contains_key(&queue), "a queue is connected once");
        if data.len() != CONNECT_DATA_BYTES {
            return Err((Status::SGL_LENGTH.dnr(), 0));
        }
        if u16_at(&sqe.0, 40) != 0 {
            return Err((Status::CONNECT_FORMAT.dnr(), 0));
        }
        let entries = u16_at(&sqe.0, 44);
        if entries == 0 || entries >= QUEUE_ENTRIES_MAX {
            return Err(in_command(44));
        }
        let subsystem = name(&data[256..512]).ok_or(in_data(256))?;
        let host = name(&data[512..768]).ok_or(in_data(512))?;
        let host_id: [u8; 16] = data[..16].try_into().expect("16 bytes");
        let cntlid = u16_at(data, 16);
        match u16_at(&sqe.0, 42) {
            0 if cntlid != u16::MAX => Err(in_data(16)),
            0 => self.connect_admin(queue, sqe, subsystem, host, host_id, now),
            qid => self.connect_io(queue, qid, cntlid, subsystem, host, host_id),
        }
    }
    fn connect_admin(
        &mut self,
        queue: QueueId,
        sqe: &Sqe,
        nqn: &str,
        host: &str,
        host_id: [u8; 16],
        now: Time,
    ) -> Result<Connected, Refused> {
        let (volume, epoch) = self.subsystem(nqn, host)?;
        let cntlid = self.free_id(nqn).ok_or((Status::CONNECT_BUSY, 0))?;
        let controller = Controller {
            cntlid,
            nqn: nqn.to_owned(),
            volume,
            epoch,
            host_nqn: host.to_owned(),
            host_id,
            admin: queue,
            io: BTreeMap::new(),
            io_max: IO_QUEUES_MAX,
            cc: 0,
            csts: 0,
            kato_ms: sqe.cdw(12),
            seen: now,
            aers: VecDeque::new(),
            event_bits: 0,
            pending: BTreeSet::new(),
            masked: BTreeSet::new(),
            changed: false,
            features: BTreeMap::new(),
            behavior: Vec::new(),
        };
        self.next += 1;
        self.controllers.insert(self.next, controller);
        self.queues.insert(queue, self.next);
        Ok(Connected { admin: true, cntlid, namespace: None, host: host.to_owned(), qid: 0, epoch })
    }
    fn connect_io(
        &mut self,
        queue: QueueId,
        qid: u16,
        cntlid: u16,
        nqn: &str,
        host: &str,
        host_id: [u8; 16],
    ) -> Result<Connected, Refused> {
        self.subsystem(nqn, host)?;
        let mut found = self.controllers.iter_mut().filter(|(_, c)| c.cntlid == cntlid && c.nqn == nqn);
        let (key, controller) = found.next().ok_or(in_data(16))?;
        if controller.host_nqn != host {
            return Err(in_data(512));
        }
        if controller.host_id != host_id {
            return Err(in_data(0));
        }
        let Some(volume) = controller.volume.filter(|_| qid <= controller.io_max) else {
            return Err(in_command(42));
        };
        if !controller.is_enabled() || controller.io.contains_key(&qid) {
            return Err((Status::SEQUENCE.dnr(), 0));
        }
        controller.io.insert(qid, queue);
        self.queues.insert(queue, *key);
        let (namespace, epoch) = (namespace(&self.view, volume), controller.epoch);
        Ok(Connected { admin: false, cntlid, namespace, host: host.to_owned(), qid, epoch })
    }
    /// The volume of a subsystem and the epoch of its session, if the host may; `None` is discovery, which all
    /// may.
    fn subsystem(&self, nqn: &str, host: &str) -> Result<(Option<VolumeId>, SessionEpoch), Refused> {
        if nqn == DISCOVERY_NQN {
            return Ok((None, SessionEpoch(0)));
        }
        let mut volumes = self.view.volumes.iter();
        let found = volumes.find(|v| identify::nqn(&self.view.cluster, &v.name) == nqn);
        let found = found.ok_or(in_data(256))?;
        match found.admits(host) {
            true => Ok((Some(found.namespace.volume), found.session.epoch)),
            false => Err((Status::CONNECT_HOST.dnr(), 0)),
        }
    }
    /// An id that no controller of the subsystem has, and that no other target gives out.
    fn free_id(&self, nqn: &str) -> Option<u16> {
        let base = self.view.target % CONTROLLERS_MAX * 256 + 1;
        let taken: BTreeSet<u16> =
            self.controllers.values().filter(|c| c.nqn == nqn).map(|c| c.cntlid).collect();
        let start = self.next as u32;
        let mut candidates = (0..CONTROLLERS_MAX).map(|n| (base + (start + n) % CONTROLLERS_MAX) as u16);
        candidates.find(|id| !taken.contains(id))
    }

    /// Commands that a connection has answered since it told last.
    pub fn served(&mut self, queue: QueueId, served: &Served) {
        let controller = self.queues.get(&queue).and_then(|key| self.controllers.get(key));
        if let Some(volume) = controller.and_then(|controller| controller.volume) {
            self.served.entry(volume).or_default().add(served);
        }
    }
    /// A connection has ended. Its controller ends with its admin queue.
    pub fn closed(&mut self, queue: QueueId) {
        let Some(key) = self.queues.remove(&queue) else { return };
        let Some(controller) = self.controllers.get_mut(&key) else { return };
        if controller.admin == queue {
            self.end(key, "its admin queue is gone");
        } else {
            controller.io.retain(|_, io| *io != queue);
        }
    }
    /// Ends a controller, its admin queue too.
    fn expel(&mut self, key: u64, why: &'static str) {
        self.out.push_back(Out::Close { queue: self.controllers[&key].admin, why });
        self.end(key, why);
    }
    fn end(&mut self, key: u64, why: &'static str) {
        let Some(controller) = self.controllers.remove(&key) else { return };
        self.queues.remove(&controller.admin);
        for queue in controller.io.into_values() {
            self.queues.remove(&queue);
            self.out.push_back(Out::Close { queue, why });
        }
    }
    /// Looks at keep alive timers.
    pub fn tick(&mut self, now: Time) {
        let late = |c: &Controller| c.patience().is_some_and(|patience| now >= c.seen + patience + GRACE);
        let expired: Vec<u64> =
            self.controllers.iter().filter(|(_, c)| late(c)).map(|(key, _)| *key).collect();
        for key in expired {
            self.expel(key, "keep alive timer expired");
        }
    }
}

impl View {
    /// The names of the volumes that a host may see.
    pub(super) fn shown(&self, host: &str) -> Vec<&str> {
        self.volumes.iter().filter(|v| v.admits(host)).map(|v| v.name.as_str()).collect()
    }
}

fn namespace(view: &View, volume: VolumeId) -> Option<Namespace> {
    view.volumes.iter().map(|v| v.namespace).find(|n| n.volume == volume)
}

impl Controller {
    fn is_enabled(&self) -> bool {
        self.csts & 1 != 0
    }
    /// How long the host may be silent.
    fn patience(&self) -> Option<Span> {
        match self.kato_ms {
            0 => self.volume.is_none().then_some(DISCOVERY_IDLE),
            ms => Some(Span::ms(ms.into())),
        }
    }
    fn notify(&mut self, notice: Notice, out: &mut VecDeque<Out>) {
        if self.event_bits & notice.bit() != 0 {
            self.pending.insert(notice);
            self.tell(out);
        }
    }
    /// Answers waiting requests with what there is to tell.
    fn tell(&mut self, out: &mut VecDeque<Out>) {
        while let Some(notice) = self.pending.difference(&self.masked).next().copied() {
            let Some(cid) = self.aers.pop_front() else { return };
            self.pending.remove(&notice);
            self.masked.insert(notice);
            let (queue, result) = (self.admin, notice.result());
            out.push_back(Out::Complete { queue, cid, status: Status::SUCCESS, result });
        }
    }
}

/// A field of Connect's command is wrong.
fn in_command(offset: u32) -> Refused {
    (Status::CONNECT_PARAMETER.dnr(), offset)
}

/// A field of Connect's data is wrong.
fn in_data(offset: u32) -> Refused {
    (Status::CONNECT_PARAMETER.dnr(), offset | 1 << 16)
}

/// A name that ends within its field.
fn name(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|byte| *byte == 0)?;
    core::str::from_utf8(&field[..end]).ok().filter(|name| !name.is_empty() && end <= NQN_BYTES_MAX)
}
