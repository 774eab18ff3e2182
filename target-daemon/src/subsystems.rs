//! The NVMe subsystems of a target: what all of its shards share of them.
//!
//! A host's queues are connections, and each lives on the shard that it was given to; they must meet
//! one set of [`Controllers`]. Connect, commands of admin queues, ends of connections and the clock
//! go there, behind a lock; commands of IO queues never do. What a controller wants of a connection
//! lies in the tray of its shard, which is woken.
//!
//! Invariants: nothing waits while it holds the lock; a view is told to hosts only when each shard
//! has the map it was made of, so that nobody is sent to blocks which some shard does not know.

use protocol::map::{ClusterMap, ExportProtocol, TargetEntry};
use protocol::nvme_tcp::Namespace;
use protocol::nvme_tcp::controller::{Controllers, Out, QueueId, View, Volume};
use protocol::nvme_tcp::logs::Ana;
use protocol::types::TargetId;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bits of a [`QueueId`] below the shard's number.
const SHARD_SHIFT: u32 = 48;

/// Makes a shard take a turn if it sleeps.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// One target's; see the module.
pub struct Subsystems {
    shared: Mutex<Shared>,
    trays: Vec<Tray>,
}

impl std::fmt::Debug for Subsystems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subsystems").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    controllers: Controllers,
    /// By shard: the generation of its map; `None` before it serves.
    adopted: Vec<Option<u64>>,
    view: View,
    /// Every port, those of targets that are away or draining included.
    ports: Vec<(TargetId, std::net::SocketAddr)>,
    /// Targets that do not answer.
    away: BTreeSet<TargetId>,
    /// Targets that are being emptied.
    draining: BTreeSet<TargetId>,
    /// This target stops.
    leaves: bool,
}

struct Tray {
    waiting: AtomicBool,
    outs: Mutex<Vec<Out>>,
    wake: Wake,
}

/// One shard's place among them.
#[derive(Clone)]
pub struct Seat {
    subsystems: Arc<Subsystems>,
    shard: usize,
}

impl Subsystems {
    /// Of a target with a shard for each `wake`.
    pub fn new(wakes: Vec<Wake>) -> Arc<Self> {
        let shared = Shared { adopted: vec![None; wakes.len()], ..Shared::default() };
        let tray = |wake| Tray { waiting: AtomicBool::new(false), outs: Mutex::default(), wake };
        Arc::new(Self { shared: Mutex::new(shared), trays: wakes.into_iter().map(tray).collect() })
    }
    /// The place of a shard.
    pub fn seat(self: &Arc<Self>, shard: u16) -> Seat {
        Seat { subsystems: self.clone(), shard: shard.into() }
    }
    /// These targets do not answer: discovery leaves them out until they do.
    pub fn set_away(&self, away: BTreeSet<TargetId>) {
        self.with(|shared| {
            if shared.away != away {
                shared.away = away;
                shared.show();
            }
        });
    }
    fn with<T>(&self, work: impl FnOnce(&mut Shared) -> T) -> T {
        let mut shared = lock(&self.shared);
        let result = work(&mut shared);
        let mut woken = BTreeSet::new();
        while let Some(out) = shared.controllers.poll() {
            let shard = out.queue() >> SHARD_SHIFT;
            let Some(tray) = self.trays.get(shard) else { continue };
            lock(&tray.outs).push(out);
            tray.waiting.store(true, Ordering::Release);
            woken.insert(shard);
        }
        drop(shared);
        woken.into_iter().for_each(|shard| (self.trays[shard].wake)());
        result
    }
}

impl Shared {
    fn show(&mut self) {
        let stays = |target: &TargetId| !self.away.contains(target) && !self.draining.contains(target);
        // A host is better off at a target that is being emptied than at none.
        let any = self.ports.iter().any(|(target, _)| stays(target));
        let here = |(target, _): &&(TargetId, _)| match any {
            true => stays(target),
            false => !self.away.contains(target),
        };
        let port = |(target, at): &(TargetId, _)| (target.0 as u16, *at);
        let ports = self.ports.iter().filter(here).map(port).collect();
        let ana = match () {
            () if self.leaves => Ana::Inaccessible,
            // A host that has no other path may go on; one that has takes that.
            () if self.draining.contains(&TargetId(self.view.target)) => Ana::NonOptimized,
            () => Ana::Optimized,
        };
        self.controllers.set_view(View { ports, ana, ..self.view.clone() });
    }
}

impl Seat {
    /// The shard serves from now on.
    pub fn join(&self) {
        self.subsystems.with(|shared| shared.adopted[self.shard] = Some(0));
    }
    /// The shard has this map. The last one to have it tells hosts.
    pub fn adopted(&self, map: &ClusterMap, me: TargetId) {
        self.subsystems.with(|shared| {
            shared.adopted[self.shard] = Some(map.generation);
            let all = shared.adopted.iter().flatten().all(|generation| *generation >= map.generation);
            if all && shared.view.generation <= map.generation {
                shared.view = view(map, me);
                let draining = map.targets.iter().filter(|(_, entry)| entry.draining);
                shared.draining = draining.map(|(id, _)| *id).collect();
                let port = |(id, entry): (&TargetId, &TargetEntry)| Some((*id, entry.nvme?));
                shared.ports = map.targets.iter().filter_map(port).collect();
                shared.show();
            }
        });
    }
    /// Hosts are to use other paths than this target's.
    pub fn leave(&self) {
        self.subsystems.with(|shared| {
            shared.leaves = true;
            shared.show();
        });
    }
    /// Something that concerns the controllers.
    pub fn with<T>(&self, work: impl FnOnce(&mut Controllers) -> T) -> T {
        self.subsystems.with(|shared| work(&mut shared.controllers))
    }
    /// What the controllers want of this shard's connections, in order.
    pub fn take(&self) -> Vec<Out> {
        let tray = &self.subsystems.trays[self.shard];
        // A plain load, since every turn asks.
        if !tray.waiting.load(Ordering::Acquire) {
            return Vec::new();
        }
        tray.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut *lock(&tray.outs))
    }
    /// Whether the clock of all controllers is this shard's to look at.
    pub fn keeps_time(&self) -> bool {
        let shared = lock(&self.subsystems.shared);
        shared.adopted.iter().position(Option::is_some) == Some(self.shard)
    }
    /// The name of a connection of this shard; a later one at the same place has another.
    pub fn queue_id(&self, place: usize, serial: u32) -> QueueId {
        assert!(place < 1 << 16, "a place among at most 1,024 connections");
        self.shard << SHARD_SHIFT | (serial as usize) << 16 | place
    }
    /// The place of a connection of this shard.
    pub fn place(queue: QueueId) -> usize {
        queue & 0xffff
    }
}

/// What the map says; ports and the state of paths are added when it is shown.
fn view(map: &ClusterMap, me: TargetId) -> View {
    let offered = map.exports.iter().filter(|e| e.protocol == ExportProtocol::Nvme);
    let volumes = offered.filter_map(|e| {
        let volume = map.volumes.get(&e.volume).filter(|v| !v.deleted)?;
        let (bytes, block_bytes) = (volume.bytes, volume.block_bytes);
        let namespace = Namespace { volume: e.volume, bytes, block_bytes };
        let (allowed_hosts, session) = (e.allowed_hosts.clone(), volume.session.clone());
        Some(Volume { name: volume.name.clone(), namespace, allowed_hosts, session })
    });
    View {
        cluster: map.cluster,
        generation: map.generation,
        target: me.0,
        ports: Vec::new(),
        volumes: volumes.collect(),
        ana: Ana::default(),
    }
}

/// Whatever a thread that panicked left is whole: nothing here is changed in two steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::map::{ExportEntry, Session, VolumeEntry};
    use protocol::nvme_tcp::Sqe;
    use protocol::nvme_tcp::controller::{Answer, Connected};
    use protocol::nvme_tcp::host::{CC_ENABLE, connect_data};
    use protocol::nvme_tcp::identify::nqn;
    use protocol::nvme_tcp::wire::{admin, feature, log, property};
    use protocol::types::{CopysetId, Time, VolumeId};

    fn map(generation: u64, bytes: u64) -> ClusterMap {
        let mut map = ClusterMap { generation, ..ClusterMap::default() };
        for id in 1..=2u16 {
            let nvme = Some(std::net::SocketAddr::from(([127, 0, 0, 1], 4420 + id)));
            map.targets.insert(TargetId(id.into()), TargetEntry { peers: Vec::new(), nvme, draining: false });
        }
        let volume = VolumeEntry {
            name: "vol0".into(),
            bytes,
            block_bytes: 4096,
            copysets: vec![CopysetId(1)],
            deleted: false,
            session: Session::default(),
        };
        map.volumes.insert(VolumeId(1), volume);
        map.exports.push(ExportEntry {
            volume: VolumeId(1),
            protocol: ExportProtocol::Nvme,
            allowed_hosts: BTreeSet::new(),
        });
        map
    }

    /// Two shards that serve, with the first map.
    fn seats() -> (Arc<Subsystems>, [Seat; 2]) {
        let subsystems = Subsystems::new(vec![Arc::new(|| {}), Arc::new(|| {})]);
        let seats = [0, 1].map(|shard| subsystems.seat(shard));
        seats.iter().for_each(Seat::join);
        seats.iter().for_each(|seat| seat.adopted(&map(1, 1 << 20), TargetId(1)));
        (subsystems, seats)
    }

    fn connect(seat: &Seat, queue: QueueId, qid: u16, cntlid: u16, name: &str) -> Connected {
        let data = connect_data([1; 16], cntlid, name, "nqn.2014-08.org.example:host");
        seat.with(|c| c.connect(queue, &Sqe::connect(0, qid, 32, 0), &data, Time(0))).expect("accepted")
    }

    fn ask(seat: &Seat, queue: QueueId, sqe: Sqe) -> Answer {
        seat.with(|c| c.admin(queue, &sqe, &[], Time(1)))
    }

    #[test]
    fn queues_of_one_controller_on_two_shards_meet_and_hear_of_a_growth_only_when_both_can_serve_it() {
        let (_, [one, two]) = seats();
        let name = nqn(&[0; 16], "vol0");
        let (admin_queue, io_queue) = (one.queue_id(3, 1), two.queue_id(3, 1));
        let cntlid = connect(&one, admin_queue, 0, u16::MAX, &name).cntlid;
        ask(&one, admin_queue, Sqe::property_set(1, property::CC, CC_ENABLE));
        let told = connect(&two, io_queue, 1, cntlid, &name);
        assert_eq!(told.namespace.map(|n| n.bytes), Some(1 << 20));
        let set =
            Sqe::new(admin::SET_FEATURES, 2, 0).with(10, feature::ASYNC_EVENT.into()).with(11, u32::MAX);
        ask(&one, admin_queue, set);
        assert_eq!(ask(&one, admin_queue, Sqe::new(admin::ASYNC_EVENT, 9, 0)), Answer::Later);
        two.adopted(&map(2, 1 << 21), TargetId(1));
        assert!(one.take().is_empty() && two.take().is_empty(), "the other shard has the old map still");
        one.adopted(&map(2, 1 << 21), TargetId(1));
        assert!(matches!(one.take()[..], [Out::Complete { cid: 9, .. }]));
        assert!(matches!(&two.take()[..],
            [Out::Namespace { queue, namespace: Some(n) }] if *queue == io_queue && n.bytes == 1 << 21));
        one.with(|c| c.closed(admin_queue));
        assert!(matches!(two.take()[..], [Out::Close { queue, .. }] if queue == io_queue));
        assert!(one.keeps_time() && !two.keeps_time());
    }

    #[test]
    fn discovery_leaves_out_who_is_away_and_says_so() {
        let (subsystems, [one, _]) = seats();
        let queue = one.queue_id(0, 1);
        connect(&one, queue, 0, u16::MAX, protocol::nvme_tcp::wire::DISCOVERY_NQN);
        ask(&one, queue, Sqe::property_set(1, property::CC, CC_ENABLE));
        let get = Sqe::new(admin::GET_LOG_PAGE, 1, 0).with_data(16, false);
        let get = get.with(10, 3 << 16 | u32::from(log::DISCOVERY));
        let records = || match ask(&one, queue, get) {
            Answer::Done { data, .. } => data,
            Answer::Later => panic!("a log page waits"),
        };
        assert_eq!(records()[8], 2);
        ask(&one, queue, Sqe::new(admin::SET_FEATURES, 2, 0).with(10, 0x0b).with(11, 1 << 31));
        assert_eq!(ask(&one, queue, Sqe::new(admin::ASYNC_EVENT, 9, 0)), Answer::Later);
        let before = records()[0];
        subsystems.set_away([TargetId(2)].into());
        assert!(matches!(one.take()[..], [Out::Complete { cid: 9, .. }]));
        assert_eq!((records()[8], records()[0] > before), (1, true));
        subsystems.set_away(BTreeSet::new());
        assert_eq!(records()[8], 2);
    }

    #[test]
    fn a_target_that_is_drained_tells_its_hosts_and_is_left_out_of_discovery_everywhere() {
        let (_, [one, two]) = seats();
        let (discovery, admin_queue) = (one.queue_id(0, 1), one.queue_id(1, 2));
        connect(&one, discovery, 0, u16::MAX, protocol::nvme_tcp::wire::DISCOVERY_NQN);
        connect(&one, admin_queue, 0, u16::MAX, &nqn(&[0; 16], "vol0"));
        for (queue, events) in [(discovery, 1 << 31), (admin_queue, u32::MAX)] {
            ask(&one, queue, Sqe::property_set(1, property::CC, CC_ENABLE));
            ask(&one, queue, Sqe::new(admin::SET_FEATURES, 2, 0).with(10, 0x0b).with(11, events));
            assert_eq!(ask(&one, queue, Sqe::new(admin::ASYNC_EVENT, 9, 0)), Answer::Later);
        }
        let page = |queue, page: u8, bytes: u32| {
            let get = Sqe::new(admin::GET_LOG_PAGE, 1, 0).with_data(bytes, false);
            match ask(&one, queue, get.with(10, (bytes / 4 - 1) << 16 | u32::from(page))) {
                Answer::Done { data, .. } => data,
                Answer::Later => panic!("a log page waits"),
            }
        };
        let drained = |generation, drained: &[u32]| {
            let mut map = map(generation, 1 << 20);
            drained.iter().for_each(|id| map.targets.get_mut(&TargetId(*id)).unwrap().draining = true);
            [&one, &two].iter().for_each(|seat| seat.adopted(&map, TargetId(1)));
        };
        let state_and_records =
            || (page(admin_queue, log::ANA, 52)[32], page(discovery, log::DISCOVERY, 16)[8]);
        drained(2, &[1]);
        let told: BTreeSet<QueueId> = one.take().iter().map(Out::queue).collect();
        assert_eq!(told, [discovery, admin_queue].into(), "both hosts are told at once");
        assert_eq!(state_and_records(), (2, 1), "non-optimized, and only the other target");
        drained(3, &[2]);
        assert_eq!(state_and_records(), (1, 1), "the other one's paths are not told here");
        drained(4, &[1, 2]);
        assert_eq!(state_and_records(), (2, 2), "better these than none");
        drained(5, &[]);
        assert_eq!(state_and_records(), (1, 2));
        one.leave();
        drained(6, &[1]);
        assert_eq!(state_and_records().0, 3, "who stops is inaccessible, whatever the map says");
    }
}
