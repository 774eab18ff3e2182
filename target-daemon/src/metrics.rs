//! What a shard counts, and its form as Prometheus text.
//!
//! A closed list: each counter is a field here and nowhere else. The shard is the only writer, so
//! counting is a plain load and store without a locked instruction; readers may see values a
//! moment old. Deliberately absent: labels from outside (names of volumes, hosts), so that the
//! number of series is fixed when the process starts.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// One number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts on.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }
    /// Sets what goes up and down.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a [`Histogram`]: up to 1 us, 2 us, 4 us, ... 2^23 us (8.4 s), and more.
pub const LATENCY_BUCKETS: usize = 25;

/// Times, in buckets that double.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; LATENCY_BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// Counts one time, in nanoseconds.
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].add(1);
        self.sum_ns.add(ns);
    }
    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Counter::get).sum()
    }
}

/// The first bucket whose upper bound, 2^n us, is not below the time.
fn bucket_of(ns: u64) -> usize {
    let us = ns.div_ceil(1000).max(1);
    (us.next_power_of_two().trailing_zeros() as usize).min(LATENCY_BUCKETS - 1)
}

macro_rules! counters {
    ($($field:ident: $family:literal $kind:ident $([$label:literal = $value:literal])? $help:literal;)*) => {
        /// What one shard counts.
        #[derive(Debug, Default)]
        pub struct ShardCounters {
            $(#[doc = $help] pub $field: Counter,)*
            /// From a host's read until its answer is handed to the socket.
            pub read_latency: Histogram,
            /// From a host's write (its data received) until its answer is handed to the socket.
            pub write_latency: Histogram,
        }

        /// One line of the list; lines of one family stand together.
        struct Series {
            family: &'static str,
            kind: &'static str,
            label: Option<(&'static str, &'static str)>,
            help: &'static str,
            get: fn(&ShardCounters) -> u64,
        }

        const SERIES: &[Series] = &[$(Series {
            family: $family,
            kind: stringify!($kind),
            label: label!($($label, $value)?),
            help: $help,
            get: |counters| counters.$field.get(),
        },)*];
    };
}

macro_rules! label {
    () => {
        None
    };
    ($label:literal, $value:literal) => {
        Some(($label, $value))
    };
}

counters! {
    reads: "ashlar_reads_total" counter "Reads answered to hosts.";
    read_bytes: "ashlar_read_bytes_total" counter "Bytes read by hosts.";
    writes: "ashlar_writes_total" counter "Writes answered to hosts, zeroing included.";
    write_bytes: "ashlar_write_bytes_total" counter "Bytes written or zeroed by hosts.";
    flushes_host: "ashlar_host_flushes_total" counter "Flushes answered to hosts.";
    errors_no_space: "ashlar_host_errors_total" counter ["reason" = "no_space"] "Requests of hosts that failed.";
    errors_corrupt: "ashlar_host_errors_total" counter ["reason" = "corrupt"] "Requests of hosts that failed.";
    errors_fenced: "ashlar_host_errors_total" counter ["reason" = "fenced"] "Requests of hosts that failed.";
    errors_timed_out: "ashlar_host_errors_total" counter ["reason" = "timed_out"] "Requests of hosts that failed.";
    errors_other: "ashlar_host_errors_total" counter ["reason" = "other"] "Requests of hosts that failed.";
    io_local: "ashlar_pieces_total" counter ["route" = "local"] "Pieces of IO sent to leaders, here or on other shards.";
    io_forwarded: "ashlar_pieces_total" counter ["route" = "forwarded"] "Pieces of IO sent to leaders, here or on other shards.";
    io_served: "ashlar_pieces_served_total" counter "Pieces of IO done here as a leader.";
    io_refused: "ashlar_pieces_refused_total" counter "Pieces of IO not done here: not the leader, busy, or of a host whose volume was taken over.";
    log_batches: "ashlar_log_batches_total" counter "Batches written to the log.";
    log_bytes: "ashlar_log_bytes_total" counter "Bytes written to the log, headers included.";
    log_used_bytes: "ashlar_log_used_bytes" gauge "Bytes of the log that a restart would have to replay.";
    flushed_blocks: "ashlar_flushed_blocks_total" counter "Blocks moved from the overlay to chunk slots.";
    checkpoints: "ashlar_checkpoints_total" counter "Checkpoints completed.";
    overlay_blocks: "ashlar_overlay_blocks" gauge "Blocks in the overlay.";
    blocks_damaged: "ashlar_blocks_corrupt_total" counter "Blocks at rest that failed their checksum.";
    blocks_repaired: "ashlar_blocks_corrupt_repaired_total" counter "Blocks at rest mended from a peer.";
    log_damaged: "ashlar_log_corrupt_total" counter "Places in the log found damaged.";
    checksums_held: "ashlar_checksum_tables" gauge "Chunks whose checksums are in memory.";
    checksums_loaded: "ashlar_checksum_tables_loaded_total" counter "Times that a chunk's checksums were read from the disk, 52 KiB each.";
    slots_free: "ashlar_slots_free" gauge "Preformatted chunk slots that are free.";
    slots_used: "ashlar_slots_used" gauge "Chunk slots in use.";
    disk_failed: "ashlar_disk_failed" gauge "1 when the disk failed a write or sync and work is refused.";
    copysets: "ashlar_copysets" gauge "Replicas held.";
    leaders: "ashlar_leaders" gauge "Copysets led.";
    leaderless: "ashlar_leaderless" gauge "Replicas held that know of no leader.";
    elections: "ashlar_elections_total" counter "Elections begun here.";
    elections_won: "ashlar_elections_won_total" counter "Elections won here.";
    raft_messages: "ashlar_raft_messages_total" counter "Raft messages sent.";
    catch_up_blocks: "ashlar_catch_up_blocks_total" counter "Blocks fetched from a leader to catch up.";
    wire_damaged: "ashlar_wire_damaged_total" counter "Payloads from other shards that failed their checksum.";
    raft_violations: "ashlar_raft_violations_total" counter "Raft messages that no correct peer sends.";
    peer_links: "ashlar_peer_links" gauge "Links to other shards that are up.";
    peer_bytes_sent: "ashlar_peer_bytes_total" counter ["direction" = "sent"] "Bytes on links to other shards.";
    peer_bytes_received: "ashlar_peer_bytes_total" counter ["direction" = "received"] "Bytes on links to other shards.";
    connections: "ashlar_connections" gauge "Hosts connected.";
    connections_accepted: "ashlar_connections_accepted_total" counter "Connections of hosts taken.";
    refused_malformed: "ashlar_connections_closed_total" counter ["reason" = "malformed"] "Connections closed for cause.";
    refused_no_export: "ashlar_connections_closed_total" counter ["reason" = "no_such_export"] "Connections closed for cause.";
    refused_too_many: "ashlar_connections_closed_total" counter ["reason" = "too_many"] "Connections closed for cause.";
    refused_foreign_peer: "ashlar_connections_closed_total" counter ["reason" = "foreign_peer"] "Connections closed for cause.";
    refused_timed_out: "ashlar_connections_closed_total" counter ["reason" = "timed_out"] "Connections closed for cause.";
    arena_bytes: "ashlar_arena_bytes" gauge "Memory for IO.";
    arena_used_bytes: "ashlar_arena_used_bytes" gauge "Memory for IO in use.";
    arena_waits: "ashlar_arena_waits_total" counter "Times that work waited for memory.";
    control_dropped: "ashlar_control_dropped_total" counter "Reports to the control thread that found its queue full.";
    turns: "ashlar_turns_total" counter "Turns of the shard's loop.";
    sleeps: "ashlar_sleeps_total" counter "Times that the shard's loop slept.";
}

/// What the control thread knows, for the page's head.
#[derive(Debug)]
pub struct ProcessGauges {
    /// Whether the MDS answered the last heartbeat.
    pub mds_reachable: AtomicBool,
    /// The generation of the map in force.
    pub map_generation: AtomicU64,
    /// When the process started.
    pub started: Instant,
}

impl Default for ProcessGauges {
    fn default() -> Self {
        Self {
            mds_reachable: AtomicBool::new(false),
            map_generation: AtomicU64::new(0),
            started: Instant::now(),
        }
    }
}

/// The page: Prometheus text, version 0.0.4.
pub fn render(process: &ProcessGauges, shards: &[Arc<ShardCounters>]) -> String {
    let mut page = String::with_capacity(16 << 10);
    let up = process.started.elapsed().as_secs();
    single(&mut page, "ashlar_uptime_seconds", "Since the process started.", up);
    let reachable = process.mds_reachable.load(Ordering::Relaxed);
    let help = "1 when the MDS answered the last heartbeat; IO goes on without it.";
    single(&mut page, "ashlar_mds_reachable", help, reachable.into());
    let generation = process.map_generation.load(Ordering::Relaxed);
    single(&mut page, "ashlar_map_generation", "Of the cluster map in force.", generation);
    for (at, series) in SERIES.iter().enumerate() {
        if at == 0 || SERIES[at - 1].family != series.family {
            head(&mut page, series.family, series.kind, series.help);
        }
        for (shard, counters) in shards.iter().enumerate() {
            let extra = series.label.map(|(k, v)| format!(",{k}=\"{v}\"")).unwrap_or_default();
            line(
                &mut page,
                format_args!("{}{{shard=\"{shard}\"{extra}}} {}", series.family, (series.get)(counters)),
            );
        }
    }
    histogram(&mut page, "ashlar_read_seconds", "Latency of hosts' reads.", shards, |c| &c.read_latency);
    histogram(&mut page, "ashlar_write_seconds", "Latency of hosts' writes.", shards, |c| &c.write_latency);
    page
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    page.write_fmt(text).expect("a string takes all");
    page.push('\n');
}

fn head(page: &mut String, family: &str, kind: &str, help: &str) {
    line(page, format_args!("# HELP {family} {help}\n# TYPE {family} {kind}"));
}

fn single(page: &mut String, family: &str, help: &str, value: u64) {
    head(page, family, "gauge", help);
    line(page, format_args!("{family} {value}"));
}

fn histogram(
    page: &mut String,
    family: &str,
    help: &str,
    shards: &[Arc<ShardCounters>],
    of: impl Fn(&ShardCounters) -> &Histogram,
) {
    head(page, family, "histogram", help);
    for (shard, counters) in shards.iter().enumerate() {
        let histogram = of(counters);
        let mut below = 0;
        for (at, bucket) in histogram.buckets.iter().enumerate() {
            below += bucket.get();
            let bound = match at {
                at if at == LATENCY_BUCKETS - 1 => "+Inf".to_owned(),
                at => (2f64.powi(at as i32) / 1e6).to_string(),
            };
            line(page, format_args!("{family}_bucket{{shard=\"{shard}\",le=\"{bound}\"}} {below}"));
        }
        let sum = histogram.sum_ns.get() as f64 / 1e9;
        line(page, format_args!("{family}_sum{{shard=\"{shard}\"}} {sum}"));
        line(page, format_args!("{family}_count{{shard=\"{shard}\"}} {below}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_line_is_prometheus_text_and_every_family_has_one_head() {
        let shards = [Arc::new(ShardCounters::default()), Arc::new(ShardCounters::default())];
        shards[1].reads.add(3);
        shards[1].read_latency.record(1_500);
        let page = render(&ProcessGauges::default(), &shards);
        let heads: Vec<_> = page.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
        let families: BTreeSet<_> = heads.iter().map(|l| l.split(' ').next().unwrap()).collect();
        assert_eq!(heads.len(), families.len(), "a family told twice is refused by Prometheus");
        let mut seen = BTreeSet::new();
        for line in page.lines().filter(|l| !l.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(series), "{series} twice");
            let name = series.split('{').next().unwrap();
            let family =
                ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            assert!(families.contains(family), "{line}");
        }
        assert!(page.contains("ashlar_reads_total{shard=\"1\"} 3\n"));
        assert!(page.contains("ashlar_read_seconds_bucket{shard=\"1\",le=\"0.000001\"} 0\n"));
        assert!(page.contains("ashlar_read_seconds_bucket{shard=\"1\",le=\"0.000002\"} 1\n"));
        assert!(page.contains("ashlar_read_seconds_count{shard=\"1\"} 1\n"));
    }

    #[test]
    fn a_time_falls_in_the_first_bucket_that_holds_it() {
        assert_eq!([0, 1, 1000, 1001, 2000, 2001].map(bucket_of), [0, 0, 0, 1, 1, 2]);
        assert_eq!(bucket_of(u64::MAX), LATENCY_BUCKETS - 1);
    }
}
