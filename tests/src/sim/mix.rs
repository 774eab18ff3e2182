//! What a seed draws: the shape of the cluster, its limits, its load and its faults.
//!
//! Swarm testing: each seed leaves most things out and overdoes the others, for many bugs show
//! only when something else does not happen.

use super::Draw;
use chunkstore::Layout;
use protocol::types::{BLOCK_BYTES, Span};

/// Families of runs: `swarm` draws everything; `calm` has no faults; `partial` writes parts of few
/// blocks through elections; `lag` leaves one of three replicas behind while the log is recycled;
/// `rot` damages one disk at rest; `lease` cuts leaders off from their followers, but not from hosts,
/// again and again, under clocks that drift as far as is allowed; `wire` inverts bits between shards; `beyond`
/// damages two disks of three: the right answer is to stop; `full` has fewer slots than chunks, and file
/// systems that fill up: hosts are told so, and what was written stays; `late` lets requests arrive long after their
/// sender has asked again elsewhere, while leadership goes to and fro; `discard` trims chunks whole and by halves
/// where there is not one slot more than chunks; `amnesia` damages the log of one target whenever it is down, while the
/// others are cut off from each other, so that what it has acknowledged is soon needed; `fence` lets hosts take
/// volumes over from each other while the old ones go on, maps come late, requests arrive late and leaders change;
/// `mds` has metadata servers that place, move and heal, while targets join, leave, return and are lost, and volumes
/// come and go.
pub const FAMILIES: [&str; 14] = [
    "swarm", "calm", "partial", "lag", "rot", "lease", "wire", "beyond", "full", "late", "discard",
    "amnesia", "fence", "mds",
];

/// Of swarm seeds, how many in a thousand have metadata servers, unless they have bad disks. A generator of its own
/// decides, so that all other seeds are the runs that they were before there were any.
const WITH_MDS_PERMILLE: u64 = 150;

/// What may go wrong, and about how often; `None` leaves it out.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Mean time between power cuts of one target.
    pub crash: Option<Span>,
    /// Of power cuts, how many in a thousand hit every target at once.
    pub crash_all_permille: u64,
    /// The longest that a target stays down.
    pub down_max: Span,
    /// Mean time between partitions.
    pub partition: Option<Span>,
    /// Two targets have a bad disk: more than a copyset can bear.
    pub beyond: bool,
    /// Every partition cuts one shard off from the other shards, but not from hosts.
    pub isolate: bool,
    /// Mean time between resets of connections.
    pub reset: Option<Span>,
    /// Mean time between leaderships handed over as if by an operator.
    pub transfer: Option<Span>,
    /// Mean time between stalls of a target.
    pub pause: Option<Span>,
    /// Mean time between slow links.
    pub slow_link: Option<Span>,
    /// Ops of disks that take 100 times as long, in ppm.
    pub slow_disk_ppm: u32,
    /// Reads that return one wrong bit, on the one target whose disk is bad, in ppm.
    pub read_flip_ppm: u32,
    /// Reads that fail there, in ppm.
    pub read_error_ppm: u32,
    /// Writes that fail there, in ppm.
    pub write_error_ppm: u32,
    /// Syncs that fail there, in ppm.
    pub sync_error_ppm: u32,
    /// Writes to its chunk files that never happen, in ppm.
    pub lost_write_ppm: u32,
    /// Writes to its chunk files that land beside their place, in ppm.
    pub misdirect_ppm: u32,
    /// Mean time between sectors of its chunk files that become unreadable.
    pub break_sectors: Option<Span>,
    /// Sends between shards that arrive with a bit inverted, in ppm.
    pub wire_flip_ppm: u32,
    /// The most that a clock gains or loses, set anew when a target starts.
    pub drift_ppm: Option<u32>,
    /// Mean time between targets that join.
    pub join: Option<Span>,
    /// Mean time between targets that are lost for good, as far as the copysets can bear it.
    pub lose: Option<Span>,
    /// Mean time between targets that are away for so long that they are given up, and then return.
    pub outage: Option<Span>,
    /// Mean time between file systems that fill up for a while.
    pub full_disk: Option<Span>,
    /// Mean time between connections of two shards whose data takes up to 4 s one way.
    pub detour: Option<Span>,
    /// Mean time between bits that rot in its chunk files.
    pub rot_chunks: Option<Span>,
    /// Bits that rot in its log while it is down, each time it goes down.
    pub rot_log_permille: u64,
}

/// The metadata servers of a run, their network, and what operators do.
#[derive(Clone, Debug)]
pub struct MdsMix {
    /// Processes; of several, one leads.
    pub servers: usize,
    /// Targets that are there from the beginning; the others join.
    pub initial: usize,
    /// How often targets are to send heartbeats.
    pub heartbeat: Span,
    /// Hosts are sent elsewhere when a target's last heartbeat is older.
    pub unstable_after: Span,
    /// Its replicas are built elsewhere when a target's last heartbeat is older.
    pub offline_after: Span,
    /// Most replicas that are built on a target at once.
    pub tasks_a_target: u32,
    /// Of messages, in a thousand: lost, sent twice, and very late.
    pub lost_permille: u64,
    /// See `lost_permille`.
    pub doubled_permille: u64,
    /// See `lost_permille`.
    pub late_permille: u64,
    /// Of maps, how many in a thousand a target cannot write to its disk.
    pub unsaved_permille: u64,
    /// Of transactions, how many in a thousand end their server: one half before, one half after.
    pub crash_at_commit_permille: u64,
    /// Mean time between crashes of a server.
    pub crash: Option<Span>,
    /// Mean time between stalls of a server.
    pub pause: Option<Span>,
    /// Mean time between a server and a target losing each other.
    pub cut: Option<Span>,
    /// Mean time between a server losing the store.
    pub store_cut: Option<Span>,
    /// Mean time between drains, and ends of drains.
    pub drain: Option<Span>,
    /// Mean time between volumes being created, grown or deleted.
    pub volumes: Option<Span>,
}

/// Everything that a seed decides about a run.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Targets.
    pub targets: usize,
    /// Shards of each.
    pub shards: usize,
    /// Copysets of three replicas.
    pub copysets: usize,
    /// Bytes and block size of each volume.
    pub volumes: Vec<(u64, u32)>,
    /// NBD clients.
    pub hosts: usize,
    /// Of them, those that only read: where writes hang, they go on.
    pub readers: usize,
    /// Requests that a host keeps in flight, at most.
    pub depth: usize,
    /// The longest that a host waits between two requests, in microseconds.
    pub think_us_max: u64,
    /// Of requests: reads, zeroes, trims, flushes in a thousand; the rest are writes.
    pub reads_permille: u64,
    /// See `reads_permille`.
    pub zeroes_permille: u64,
    /// See `reads_permille`.
    pub flushes_permille: u64,
    /// Of zeroes, those that are trims of a whole chunk or of half of one, in a thousand.
    pub discards_permille: u64,
    /// The longest request, in blocks.
    pub blocks_max: u64,
    /// Places of a volume that are used: windows, and blocks of each.
    pub windows: (u64, u64),
    /// No two writes of a block are in flight at once.
    pub exclusive: bool,
    /// A host gives up a connection on which nothing was answered for so long.
    pub patience: Option<Span>,
    /// How long load and faults last.
    pub load: Span,
    /// Bytes of each shard's arena.
    pub arena_bytes: usize,
    /// Sizes of each shard's store.
    pub layout: Layout,
    /// The shortest election time-out.
    pub election_timeout: Span,
    /// How long a copyset is idle before it hibernates.
    pub hibernate_after: Span,
    /// What goes wrong.
    pub faults: Faults,
    /// Mean time between take-overs of a volume by one of its hosts; `None`: all use it all the time.
    pub take_overs: Option<Span>,
    /// The metadata servers; `None`: the map is handed in and never changes, but for take-overs.
    pub mds: Option<MdsMix>,
}

impl Mix {
    /// A small cluster without faults.
    pub fn calm() -> Self {
        Self {
            targets: 3,
            shards: 1,
            copysets: 2,
            volumes: vec![(64 << 20, 4096)],
            hosts: 2,
            readers: 0,
            depth: 4,
            think_us_max: 4_000,
            reads_permille: 400,
            zeroes_permille: 50,
            flushes_permille: 10,
            discards_permille: 0,
            blocks_max: 40,
            windows: (2, 96),
            exclusive: false,
            patience: None,
            load: Span::ms(4_000),
            arena_bytes: 16 << 20,
            layout: small_layout(&mut Draw::new(1)),
            election_timeout: Span::ms(500),
            hibernate_after: Span::ms(2_000),
            faults: Faults::default(),
            take_overs: None,
            mds: None,
        }
    }

    /// What a seed draws within a family of runs; see [`FAMILIES`]. `None`: there is no such family.
    pub fn of_family(family: &str, seed: u64) -> Option<Self> {
        let mut mix = Self::of_seed(seed);
        match family {
            "swarm" => {
                let with_mds = Draw::new(seed ^ 0x6d64_7377).chance(WITH_MDS_PERMILLE);
                if with_mds && !mix.faults.has_bad_disk() {
                    mix.add_mds(seed);
                }
            }
            "mds" => {
                mix.faults = Faults { down_max: Span::ms(1_500), ..Faults::default() };
                mix.add_mds(seed);
                let mut draw = Draw::new(seed ^ 0x6661_6d64);
                mix.faults.crash = draw.of(&[None, Some(Span::ms(3_000)), Some(Span::ms(8_000))]);
                mix.faults.pause = draw.of(&[None, None, Some(Span::ms(5_000))]);
                mix.faults.partition = draw.of(&[None, None, Some(Span::ms(5_000))]);
            }
            "calm" => mix = Self::calm(),
            "partial" => {
                mix.volumes = vec![(16 << 20, 512)];
                (mix.hosts, mix.depth, mix.think_us_max, mix.windows) = (4, 16, 500, (1, 4));
                (mix.blocks_max, mix.zeroes_permille, mix.load) = (2, 50, Span::ms(8_000));
                mix.faults = Faults { down_max: Span::ms(600), ..Faults::default() };
                mix.faults.crash = Some(Span::ms(700));
                mix.election_timeout = Span::ms(300);
            }
            "lag" => {
                (mix.hosts, mix.depth, mix.think_us_max) = (4, 16, 500);
                (mix.copysets, mix.targets, mix.shards) = (1, 3, 1);
                mix.blocks_max = 80;
                mix.faults = Faults { down_max: Span::ms(3_000), ..Faults::default() };
                mix.faults.crash = Some(Span::ms(2_500));
                mix.faults.pause = Some(Span::ms(1_500));
            }
            "lease" => {
                (mix.targets, mix.shards, mix.copysets) = (3, 1, 2);
                mix.volumes = vec![(16 << 20, 4096)];
                (mix.hosts, mix.readers) = (7, 4);
                (mix.depth, mix.think_us_max, mix.windows) = (2, 2_000, (1, 1));
                (mix.reads_permille, mix.blocks_max, mix.exclusive) = (600, 1, false);
                (mix.patience, mix.load) = (None, Span::ms(20_000));
                mix.faults = Faults { down_max: Span::ms(400), ..Faults::default() };
                mix.faults.partition = Some(Span::ms(600));
                mix.faults.isolate = true;
                mix.faults.pause = Some(Span::ms(1_500));
                mix.faults.crash = Some(Span::ms(1_500));
                mix.faults.transfer = Some(Span::ms(300));
                mix.faults.drift_ppm = Some(45_000);
                mix.election_timeout = Span::ms(200);
            }
            "beyond" => {
                (mix.targets, mix.shards) = (3, 1);
                mix.faults = Faults { down_max: Span::ms(500), ..Faults::default() };
                mix.faults.rot_chunks = Some(Span::ms(100));
                mix.faults.rot_log_permille = 500;
                mix.faults.crash = Some(Span::ms(1_000));
                mix.faults.beyond = true;
            }
            "full" => {
                // Replicas with the same chunks, so that a slot for one is a slot for all.
                (mix.targets, mix.shards, mix.copysets) = (3, 1, 1);
                mix.volumes = vec![(64 << 20, 4096), (64 << 20, 512)];
                (mix.hosts, mix.windows) = (4, (8, 40));
                (mix.layout.slots_per_file, mix.layout.slots_max) = (1, 2 + (seed % 5) as u32);
                mix.layout.reserve_slots = (seed % 2) as u32;
                mix.zeroes_permille = 300;
                mix.faults = Faults { down_max: Span::ms(600), ..Faults::default() };
                mix.faults.crash = Some(Span::ms(2_000));
                mix.faults.full_disk = Some(Span::ms(1_500));
            }
            "late" => {
                let draw = &mut Draw::new(seed ^ 0x6c61_7465);
                (mix.targets, mix.shards, mix.copysets) = (3, 1, 1 + draw.below(2) as usize);
                mix.volumes = vec![(16 << 20, draw.of(&[512, 4096]))];
                (mix.hosts, mix.readers) = (5, 1);
                (mix.depth, mix.think_us_max, mix.windows) = (draw.of(&[1, 4]), 3_000, (1, 2));
                (mix.reads_permille, mix.blocks_max, mix.exclusive) = (300, 1, draw.chance(300));
                (mix.patience, mix.load) = (None, Span::ms(15_000));
                mix.faults = Faults { down_max: Span::ms(400), ..Faults::default() };
                mix.faults.detour = Some(Span::ms(draw.of(&[100, 300])));
                mix.faults.transfer = Some(Span::ms(draw.of(&[200, 500])));
                mix.faults.partition = draw.chance(500).then_some(Span::ms(1_500));
                mix.faults.isolate = true;
                mix.faults.crash = draw.chance(500).then_some(Span::ms(3_000));
                mix.election_timeout = Span::ms(200);
            }
            "fence" => {
                let draw = &mut Draw::new(seed ^ 0x6665_6e63);
                (mix.targets, mix.shards, mix.copysets) =
                    (3, draw.of(&[1, 1, 2]), draw.between(1, 3) as usize);
                mix.volumes = vec![(64 << 20, draw.of(&[512, 4096]))];
                (mix.hosts, mix.readers) = (draw.between(3, 5) as usize, 0);
                (mix.depth, mix.think_us_max, mix.windows) = (draw.of(&[1, 4]), 8_000, (3, 4));
                // Zeroes do not tell who wrote them.
                (mix.reads_permille, mix.zeroes_permille) = (300, 0);
                (mix.blocks_max, mix.exclusive, mix.patience) = (draw.of(&[1, 4]), false, None);
                (mix.load, mix.take_overs) = (Span::ms(12_000), Some(Span::ms(draw.of(&[200, 600]))));
                mix.faults = Faults { down_max: Span::ms(400), ..Faults::default() };
                mix.faults.detour = Some(Span::ms(draw.of(&[150, 400])));
                mix.faults.pause = draw.chance(600).then_some(Span::ms(800));
                mix.faults.transfer = draw.chance(600).then_some(Span::ms(400));
                mix.faults.crash = draw.chance(600).then_some(Span::ms(1_500));
                mix.faults.crash_all_permille = 200;
                mix.faults.partition = draw.chance(300).then_some(Span::ms(1_500));
                mix.election_timeout = Span::ms(200);
            }
            "discard" => {
                mix.volumes = vec![(64 << 20, 4096), (32 << 20, 512)];
                (mix.hosts, mix.windows) = (4, (6, 40));
                (mix.layout.slots_per_file, mix.layout.slots_max) = (1, 6);
                (mix.zeroes_permille, mix.discards_permille) = (200, 250);
                mix.load = Span::ms(8_000);
                mix.faults = Faults { down_max: Span::ms(2_000), ..Faults::default() };
                mix.faults.crash = Some(Span::ms(1_000));
                mix.faults.crash_all_permille = 300;
                mix.faults.transfer = Some(Span::ms(1_500));
            }
            "amnesia" => {
                (mix.targets, mix.shards, mix.copysets) = (3, 1, 1);
                mix.volumes = vec![(16 << 20, 4096)];
                (mix.hosts, mix.depth, mix.think_us_max, mix.windows) = (4, 4, 2_000, (1, 8));
                (mix.blocks_max, mix.zeroes_permille, mix.load) = (4, 0, Span::ms(15_000));
                mix.faults = Faults { down_max: Span::ms(200), ..Faults::default() };
                mix.faults.crash = Some(Span::ms(300));
                mix.faults.partition = Some(Span::ms(800));
                mix.faults.isolate = true;
                mix.faults.rot_log_permille = 1000;
                mix.election_timeout = Span::ms(200);
            }
            "wire" => {
                mix.faults.wire_flip_ppm = 3_000;
                mix.load = Span::ms(8_000);
            }
            "rot" => {
                mix.faults = Faults { down_max: Span::ms(500), ..mix.faults };
                mix.faults.rot_chunks = Some(Span::ms(100));
                mix.faults.rot_log_permille = 500;
                mix.faults.crash = Some(Span::ms(2_000));
            }
            _ => return None,
        }
        Some(mix)
    }

    /// Puts metadata servers in charge of a cluster that is larger than its copysets need.
    fn add_mds(&mut self, seed: u64) {
        let mut draw = Draw::new(seed ^ 0x6d64_7300);
        let draw = &mut draw;
        self.targets = draw.of(&[4, 5, 5, 6]);
        self.shards = draw.of(&[1, 1, 2]);
        self.copysets = draw.between(2, 5) as usize;
        // One after the other; those beyond the second come when others have gone.
        self.volumes = (0..draw.between(3, 6)).map(|_| (draw.of(&[16 << 20, 24 << 20]), 4096)).collect();
        self.hosts = self.volumes.len() + 1;
        (self.depth, self.think_us_max) = (draw.of(&[1, 4]), draw.of(&[5_000, 20_000, 60_000]));
        self.windows = draw.of(&[(1, 8), (2, 32), (3, 64)]);
        self.blocks_max = self.blocks_max.min(33);
        self.load = Span::ms(draw.of(&[30_000, 45_000]));
        // Few slots, so that those which are freed are used again.
        self.layout.slots_max = 16;
        let often = |draw: &mut Draw, permille: u64, means: &[u64]| {
            let mean = draw.of(means);
            draw.chance(permille).then_some(Span::ms(mean))
        };
        self.faults.join = often(draw, 700, &[6_000, 15_000]);
        self.faults.lose = often(draw, 600, &[8_000, 20_000]);
        self.faults.outage = often(draw, 500, &[8_000, 20_000]);
        let initial = draw.between(3, self.targets as u64) as usize;
        self.mds = Some(MdsMix {
            servers: draw.of(&[1, 2, 3]),
            initial: if self.faults.join.is_none() { self.targets } else { initial },
            heartbeat: Span::ms(draw.of(&[200, 500])),
            unstable_after: Span::ms(draw.of(&[1_500, 2_500])),
            offline_after: Span::ms(draw.of(&[4_000, 8_000])),
            tasks_a_target: draw.of(&[1, 2, 4]),
            lost_permille: draw.of(&[0, 10, 100]),
            doubled_permille: draw.of(&[0, 10, 50]),
            late_permille: draw.of(&[0, 10, 50]),
            unsaved_permille: draw.of(&[0, 0, 50, 300]),
            crash_at_commit_permille: draw.of(&[0, 20, 100]),
            crash: often(draw, 500, &[5_000, 15_000]),
            pause: often(draw, 500, &[5_000, 15_000]),
            cut: often(draw, 500, &[2_000, 8_000]),
            store_cut: often(draw, 400, &[5_000, 15_000]),
            drain: often(draw, 500, &[8_000, 15_000]),
            volumes: often(draw, 800, &[3_000, 8_000]),
        });
    }

    /// What a seed draws.
    pub fn of_seed(seed: u64) -> Self {
        let mut draw = Draw::new(seed ^ 0x6d69_7800);
        let draw = &mut draw;
        let targets = draw.of(&[3, 3, 3, 4, 5, 7]);
        let shards = draw.of(&[1, 1, 2, 3]);
        let volume =
            |draw: &mut Draw| (draw.of(&[16 << 20, 24 << 20, 64 << 20]), draw.of(&[512, 4096, 4096]));
        let volumes = (0..draw.of(&[1, 1, 2])).map(|_| volume(draw)).collect();
        Self {
            targets,
            shards,
            copysets: draw.between(1, 4) as usize,
            volumes,
            hosts: draw.between(1, 4) as usize,
            readers: 0,
            depth: draw.of(&[1, 2, 4, 8, 16]),
            think_us_max: draw.of(&[500, 3_000, 10_000, 50_000]),
            reads_permille: draw.of(&[100, 300, 500]),
            zeroes_permille: draw.of(&[0, 50, 200]),
            flushes_permille: draw.of(&[0, 20]),
            discards_permille: 0,
            blocks_max: draw.of(&[1, 4, 33, 80]),
            windows: draw.of(&[(1, 4), (1, 40), (3, 64), (4, 200)]),
            exclusive: draw.chance(500),
            patience: draw.of(&[None, None, Some(Span::ms(1_500)), Some(Span::ms(8_000))]),
            load: Span::ms(draw.of(&[8_000, 15_000, 30_000])),
            arena_bytes: draw.of(&[8 << 20, 16 << 20, 32 << 20]),
            layout: small_layout(draw),
            election_timeout: Span::ms(draw.of(&[500, 500, 300, 1_000])),
            hibernate_after: Span::ms(draw.of(&[400, 2_000, 10_000])),
            faults: Faults::draw(draw),
            take_overs: None,
            mds: None,
        }
    }
}

impl Faults {
    fn draw(draw: &mut Draw) -> Self {
        let mut faults = Self { down_max: Span::ms(draw.of(&[300, 2_000, 8_000])), ..Self::default() };
        let sometimes = |draw: &mut Draw, permille: u64| {
            let mean = draw.of(&[500, 1_500, 5_000]);
            draw.chance(permille).then_some(Span::ms(mean))
        };
        faults.crash = sometimes(draw, 600);
        faults.crash_all_permille = draw.of(&[0, 100, 500]);
        faults.partition = sometimes(draw, 400);
        faults.reset = sometimes(draw, 300);
        faults.pause = sometimes(draw, 300);
        faults.slow_link = sometimes(draw, 200);
        faults.transfer = sometimes(draw, 200);
        faults.slow_disk_ppm = draw.of(&[0, 0, 1_000, 50_000]);
        if draw.chance(350) {
            let kind = draw.below(9);
            faults.read_flip_ppm = if kind == 0 { 20_000 } else { 0 };
            faults.read_error_ppm = if kind == 1 { 20_000 } else { 0 };
            faults.write_error_ppm = if kind == 2 { 100 } else { 0 };
            faults.sync_error_ppm = if kind == 3 { 2_000 } else { 0 };
            faults.rot_chunks = (kind == 4).then_some(Span::ms(300));
            faults.rot_log_permille = if kind == 5 { 500 } else { 0 };
            faults.lost_write_ppm = if kind == 6 { 5_000 } else { 0 };
            faults.misdirect_ppm = if kind == 7 { 5_000 } else { 0 };
            faults.break_sectors = (kind == 8).then_some(Span::ms(300));
        }
        faults.wire_flip_ppm = draw.of(&[0, 0, 0, 200]);
        // Below what leases allow for: 10 % between any two clocks.
        faults.drift_ppm = draw.of(&[None, Some(100), Some(45_000)]);
        faults
    }

    /// Whether hosts may be told that there is no space left.
    pub fn has_little_space(&self) -> bool {
        self.full_disk.is_some()
    }

    /// Whether something other than power cuts happens to disks.
    pub fn has_bad_disk(&self) -> bool {
        self.read_flip_ppm + self.read_error_ppm + self.write_error_ppm + self.sync_error_ppm > 0
            || self.lost_write_ppm + self.misdirect_ppm > 0
            || self.break_sectors.is_some()
            || self.rot_chunks.is_some()
            || self.rot_log_permille > 0
    }
}

/// One way to make a run simpler.
type Simpler = fn(&mut Mix);

/// Ways to make a failing run simpler, the most telling first; each is kept where the run still fails.
pub const SIMPLER: &[(&str, Simpler)] = &[
    ("no take-overs", |mix| mix.take_overs = None),
    ("nobody joins", |mix| mix.faults.join = None),
    ("nothing is lost for good", |mix| mix.faults.lose = None),
    ("no long outages", |mix| mix.faults.outage = None),
    ("no drains", |mix| with_mds(mix, |mds| mds.drain = None)),
    ("no other volumes", |mix| with_mds(mix, |mds| mds.volumes = None)),
    ("servers do not crash", |mix| {
        with_mds(mix, |mds| (mds.crash, mds.crash_at_commit_permille) = (None, 0));
    }),
    ("servers do not stall", |mix| with_mds(mix, |mds| mds.pause = None)),
    ("servers and targets keep in touch", |mix| with_mds(mix, |mds| mds.cut = None)),
    ("servers reach the store", |mix| with_mds(mix, |mds| mds.store_cut = None)),
    ("no message is lost, doubled or late", |mix| {
        with_mds(mix, |mds| (mds.lost_permille, mds.doubled_permille, mds.late_permille) = (0, 0, 0));
    }),
    ("every map is written", |mix| with_mds(mix, |mds| mds.unsaved_permille = 0)),
    ("one server", |mix| with_mds(mix, |mds| mds.servers = 1)),
    ("no power cuts", |mix| mix.faults.crash = None),
    ("no cut of all at once", |mix| mix.faults.crash_all_permille = 0),
    ("no partitions", |mix| mix.faults.partition = None),
    ("no resets", |mix| mix.faults.reset = None),
    ("no stalls", |mix| mix.faults.pause = None),
    ("no slow links", |mix| mix.faults.slow_link = None),
    ("no hand-overs", |mix| mix.faults.transfer = None),
    ("no detours", |mix| mix.faults.detour = None),
    ("true clocks", |mix| mix.faults.drift_ppm = None),
    ("no slow disks", |mix| mix.faults.slow_disk_ppm = 0),
    ("no bits inverted on the wire", |mix| mix.faults.wire_flip_ppm = 0),
    ("no rot in the log", |mix| mix.faults.rot_log_permille = 0),
    ("no rot in chunks", |mix| mix.faults.rot_chunks = None),
    ("no impatient hosts", |mix| mix.patience = None),
    ("no discards", |mix| mix.discards_permille = 0),
    ("no zeroes", |mix| mix.zeroes_permille = 0),
    ("no flushes", |mix| mix.flushes_permille = 0),
    ("one host", |mix| mix.hosts = 1),
    ("one volume", |mix| mix.volumes.truncate(1)),
    ("one copyset", |mix| mix.copysets = 1),
    ("one shard", |mix| mix.shards = 1),
    ("three targets", |mix| {
        if mix.mds.is_none() {
            mix.targets = 3;
        }
    }),
    ("one request at a time", |mix| mix.depth = 1),
    ("short requests", |mix| mix.blocks_max = 1),
    ("half as long", |mix| mix.load = Span(mix.load.0 / 2)),
    ("half as long again", |mix| mix.load = Span(mix.load.0 / 2)),
];

fn with_mds(mix: &mut Mix, change: impl FnOnce(&mut MdsMix)) {
    mix.mds.as_mut().map(change);
}

/// A store so small that it recycles, flushes and reads back all the time.
fn small_layout(draw: &mut Draw) -> Layout {
    let batch_blocks_max = draw.of(&[32, 64]);
    let least = 4 * (batch_blocks_max + 8);
    let segment_blocks = least + draw.of(&[0, 7, 100]);
    Layout {
        segment_bytes: segment_blocks * BLOCK_BYTES as u32,
        // An Append of 256 blocks must find room in a log that is being recycled.
        log_segments: draw.of(&[8, 9, 12, 16]),
        slots_per_file: draw.of(&[1, 4]),
        slots_max: 32,
        format_segments: 2,
        reserve_slots: draw.of(&[0, 1, 2]),
        batch_blocks_max,
        batches_in_flight_max: draw.of(&[1, 2, 4]),
        flush_in_flight_max: draw.of(&[1, 4]),
        table_cache_max: draw.of(&[1, 2, 64]),
        ram_blocks_max: draw.of(&[1, 64, 1024]),
        flush_ahead: true,
        zero_blocks_max: 4096,
        seal_idle_ns: 50_000_000,
        flush_idle_ns: draw.of(&[200_000_000, 2_000_000_000]),
    }
}
