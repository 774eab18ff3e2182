//! The targets of the project, and what a run says about each: pure, so that a test can break it.
//!
//! Invariants: what was not measured is not met, and says why; a ratio is of medians under one load.

use super::name::{
    BARE_MEMORY, BARE_SLEEPS, BARE_TCP, BARE_UNIX, MEMORY, MEMORY_2, ONE_NBD, ONE_NVME, RAW, THREE,
};
use super::probe::{AfterIdle, Memory};
use super::{MEMORY_BYTES, OPEN_DEPTH, both_shards, polled, read, stream, three_at_once, write_4k};
use crate::rival::Server;
use crate::run::load::Load;
use crate::run::summary::{Row, find};
use serde::Serialize;

/// What was measured beside the rows.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// Subjects that are not there, and why.
    pub lacking: Vec<(&'static str, String)>,
    /// The most that a target used of a core at rest, in percent.
    pub idle_percent: Option<f64>,
    /// Single reads, busy and after a pause.
    pub after_idle: Option<AfterIdle>,
    /// The same of the raw file.
    pub raw_after_idle: Option<AfterIdle>,
    /// Bytes to the disk for each 4 KiB write: for the logs, and in all.
    pub disk_bytes: Option<(f64, f64)>,
    /// Seconds of sustained writes, and their IOPS.
    pub sustained: Option<(f64, f64)>,
    /// Memory meanwhile.
    pub memory: Option<Memory>,
}

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It was reached.
    Met,
    /// It was not.
    Missed,
    /// This machine or build cannot show it, or it was left out by `--only`.
    NotShown,
}

impl Verdict {
    /// As tables have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::NotShown => "not shown",
        }
    }
}

/// One target.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What is measured.
    pub measure: String,
    /// What should hold.
    pub target: String,
    /// What was found, or why nothing was.
    pub found: String,
    /// The same as a number.
    pub value: Option<f64>,
    /// What a server finds that does nothing but IO, where that can be compared.
    pub bare: Option<String>,
    /// What became of it.
    pub verdict: Verdict,
}

/// A limit.
#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

impl Limit {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
            Self::Below(limit) => value < limit,
        }
    }
}

/// IOs a second and so on of Vitastor's durable configuration, as it was measured once beside a raw file that gave
/// [`VITASTOR_RAW`]: three OSDs, three replicas, on a machine of this kind.
struct Vitastor {
    write_1: f64,
    write_32: f64,
    read_32: f64,
    write_1_cpu_us: f64,
    write_32_cpu_us: f64,
    read_32_cpu_us: f64,
}

const VITASTOR: Vitastor = Vitastor {
    write_1: 1760.0,
    write_32: 9719.0,
    read_32: 39_900.0,
    write_1_cpu_us: 334.0,
    write_32_cpu_us: 97.0,
    read_32_cpu_us: 23.0,
};
/// 4 KiB reads a second of the raw file in that run, at depth 1 and 32.
const VITASTOR_RAW: (f64, f64) = (16_000.0, 80_000.0);

/// Memory that a target of a dev cluster may have: its arena is 64 MiB.
const MEMORY_MAX_MIB: f64 = 300.0;
/// Part by which memory may differ between two quarters of a run and count as flat.
const FLAT: f64 = 0.05;
/// From so many processors on, two shards and two connections do not share one.
const CPUS_FOR_SHARDS: usize = 4;

fn shown(value: f64, unit: &str) -> String {
    if value.abs() < 100.0 { format!("{value:.2}{unit}") } else { format!("{value:.0}{unit}") }
}

/// Every target, in the order of the project's table.
pub fn lines(rows: &[Row], facts: &Facts, size: u64) -> Vec<Line> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Judge { rows, facts, size, cpus }.lines()
}

struct Judge<'a> {
    rows: &'a [Row],
    facts: &'a Facts,
    size: u64,
    cpus: usize,
}

impl Judge<'_> {
    fn lines(&self) -> Vec<Line> {
        let mut lines = self.one_replica();
        lines.extend(self.in_memory());
        lines.extend(self.three_replicas());
        lines.extend(self.against_vitastor());
        lines.extend(self.over_time());
        lines.extend(self.scaling());
        lines
    }

    fn row(&self, subject: &str, load: &Load) -> Option<&Row> {
        find(self.rows, subject, load)
    }

    /// One subject's IOPS by another's.
    fn times(&self, subject: &str, base: &str, load: &Load) -> Option<f64> {
        Some(self.row(subject, load)?.iops / self.row(base, load)?.iops)
    }

    fn cpu_us(&self, subject: &str, load: &Load) -> Option<f64> {
        self.row(subject, load)?.server_us_per_io
    }

    fn line(&self, measure: &str, limit: Limit, unit: &str, value: Option<f64>) -> Line {
        let target = match limit {
            Limit::AtLeast(limit) => format!("at least {limit}{unit}"),
            Limit::AtMost(limit) => format!("at most {limit}{unit}"),
            Limit::Below(limit) => format!("under {limit}{unit}"),
        };
        let (found, verdict) = match value {
            Some(value) if limit.holds(value) => (shown(value, unit), Verdict::Met),
            Some(value) => (shown(value, unit), Verdict::Missed),
            None => (self.why(measure), Verdict::NotShown),
        };
        Line { measure: measure.into(), target, found, value, bare: None, verdict }
    }

    /// A line of a volume, beside what a bare server finds.
    fn beside(
        &self,
        measure: &str,
        limit: Limit,
        unit: &str,
        (volume, bare): (&str, &str),
        of: impl Fn(&str) -> Option<f64>,
    ) -> Line {
        let bare = of(bare).map(|value| shown(value, unit));
        Line { bare, ..self.line(measure, limit, unit, of(volume)) }
    }

    /// Why a measure has no value: a subject in its name lacks, or the part was left out.
    fn why(&self, measure: &str) -> String {
        let lacks = self.facts.lacking.iter().rfind(|(what, _)| measure.contains(what));
        lacks.map_or("not measured in this run".into(), |(_, why)| why.clone())
    }

    fn one_replica(&self) -> Vec<Line> {
        let size = self.size;
        let times = |depth| move |subject: &str| self.times(subject, RAW, &read(depth, size));
        // As SPDK was measured: its initiator polls, the raw file's client (fio) does not.
        let polled_by_raw = |subject: &str| {
            Some(self.row(subject, &polled(1, size))?.iops / self.row(RAW, &read(1, size))?.iops)
        };
        let of_qemu = |subject: &str| {
            let qemu = self.cpu_us(Server::QemuNbd.name(), &read(32, size))?;
            Some(self.cpu_us(subject, &read(32, size))? / qemu)
        };
        let (nvme, nbd) = ((ONE_NVME, BARE_TCP), (ONE_NBD, BARE_UNIX));
        vec![
            self.beside(
                "4K read QD1, 1 replica, NVMe/TCP, our initiator polling / raw by a client that sleeps",
                Limit::AtLeast(0.9),
                "",
                nvme,
                polled_by_raw,
            ),
            self.beside("4K read QD32, 1 replica, NVMe/TCP / raw", Limit::AtLeast(0.8), "", nvme, times(32)),
            self.beside(
                "4K read QD128, 1 replica, NVMe/TCP / raw",
                Limit::AtLeast(0.9),
                "",
                nvme,
                times(128),
            ),
            self.beside(
                "4K read QD32, 1 replica, NVMe/TCP, CPU an IO of the target",
                Limit::AtMost(8.0),
                " us",
                nvme,
                |subject| self.cpu_us(subject, &read(32, size)),
            ),
            self.beside(
                "4K read QD32, 1 replica, NBD Unix socket / raw",
                Limit::AtLeast(0.75),
                "",
                nbd,
                times(32),
            ),
            self.beside(
                "4K read QD32, 1 replica, NBD, CPU an IO of the target / qemu-nbd's",
                Limit::AtMost(0.4),
                "",
                nbd,
                of_qemu,
            ),
        ]
    }

    fn in_memory(&self) -> Vec<Line> {
        let both = (MEMORY, BARE_MEMORY);
        let cpu = |depth| move |subject: &str| self.cpu_us(subject, &read(depth, MEMORY_BYTES));
        let p50 = |subject: &str| self.row(subject, &polled(1, MEMORY_BYTES))?.p50_us;
        let measure = |depth| format!("4K read QD{depth} from memory, 1 replica, CPU an IO");
        vec![
            self.beside(&measure(32), Limit::AtMost(4.5), " us", both, cpu(32)),
            self.beside(&measure(128), Limit::AtMost(3.5), " us", both, cpu(128)),
            self.beside(
                "4K read QD1 from memory, 1 replica, our initiator polling, p50",
                Limit::Below(25.0),
                " us",
                both,
                p50,
            ),
        ]
    }

    fn three_replicas(&self) -> Vec<Line> {
        let (size, both) = (self.size, (THREE, BARE_TCP));
        let times = |load: Load| move |subject: &str| self.times(subject, RAW, &load);
        let p50 = |subject, load: Load| self.row(subject, &load)?.p50_us;
        let one_write = |subject| p50(subject, write_4k(1, size));
        let slower = || Some(one_write(THREE)? / one_write(RAW)?);
        // To the leader, and from there to another replica.
        let two_hops = || {
            let hop = one_write(BARE_TCP)? - one_write(RAW)?;
            Some((p50(RAW, three_at_once(size))? + 2.0 * hop) / one_write(RAW)?)
        };
        let sustained = || Some(self.facts.sustained?.1 / self.row(RAW, &write_4k(32, size))?.iops);
        let seconds =
            self.facts.sustained.map_or("5 minutes".into(), |(seconds, _)| format!("{seconds:.0} s"));
        vec![
            self.beside(
                "4K read QD32, 3 replicas, NVMe/TCP / raw",
                Limit::AtLeast(0.75),
                "",
                both,
                times(read(32, size)),
            ),
            Line {
                bare: two_hops().map(|value| shown(value, ": three writes at once, two hops")),
                ..self.line(
                    "4K write QD1, 3 replicas on one disk, p50 / raw O_DSYNC p50",
                    Limit::AtMost(2.2),
                    "",
                    slower(),
                )
            },
            self.beside(
                "4K write QD32, 3 replicas, IOPS / raw random O_DSYNC",
                Limit::AtLeast(3.0),
                "",
                both,
                times(write_4k(32, size)),
            ),
            self.line(
                &format!("the same, sustained over {seconds} (the target says 5 minutes)"),
                Limit::AtLeast(1.5),
                "",
                sustained(),
            ),
            self.line(
                "128K sequential write QD8, 3 replicas / (raw / 3)",
                Limit::AtLeast(0.45),
                "",
                times(stream(0, size))(THREE).map(|part| part * 3.0),
            ),
            self.beside(
                "128K sequential read QD8, 3 replicas / raw",
                Limit::AtLeast(0.8),
                "",
                both,
                times(stream(100, size)),
            ),
        ]
    }

    /// Its figures times what the raw file gives here by what it gave there.
    fn against_vitastor(&self) -> Vec<Line> {
        let size = self.size;
        let here = |depth| self.row(RAW, &read(depth, size)).map(|row| row.iops);
        let times = |load: &Load, theirs: f64, raw: Option<f64>, raw_there: f64| {
            Some(self.row(THREE, load)?.iops / (theirs * raw? / raw_there))
        };
        let by = |subject: &str, load: &Load, theirs: f64| Some(self.cpu_us(subject, load)? / theirs);
        let cpu_write = |measure, load: &Load, theirs: f64| Line {
            bare: by(BARE_SLEEPS, load, theirs / 3.0).map(|value| shown(value, ": three, never spinning")),
            ..self.line(measure, Limit::AtMost(0.5), "", by(THREE, load, theirs))
        };
        let (w1, w32, r32) = (write_4k(1, size), write_4k(32, size), read(32, size));
        let (raw_1, raw_32) = VITASTOR_RAW;
        let v = &VITASTOR;
        let kib = |of: fn(&(f64, f64)) -> f64| self.facts.disk_bytes.as_ref().map(|both| of(both) / 1000.0);
        vec![
            self.line(
                "4K write QD1 / Vitastor's, by the raw ratio",
                Limit::AtLeast(2.0),
                "",
                times(&w1, v.write_1, here(1), raw_1),
            ),
            self.line(
                "4K write QD32 / Vitastor's, by the raw ratio",
                Limit::AtLeast(2.0),
                "",
                times(&w32, v.write_32, here(32), raw_32),
            ),
            cpu_write("CPU a write QD1 / Vitastor's", &w1, v.write_1_cpu_us),
            cpu_write("CPU a write QD32 / Vitastor's", &w32, v.write_32_cpu_us),
            self.line(
                "4K read QD32 / Vitastor's, by the raw ratio",
                Limit::AtLeast(1.3),
                "",
                times(&r32, v.read_32, here(32), raw_32),
            ),
            self.beside(
                "CPU a read QD32 / Vitastor's",
                Limit::AtMost(0.6),
                "",
                (THREE, BARE_TCP),
                |subject| by(subject, &r32, v.read_32_cpu_us),
            ),
            self.line(
                "to the disk for a 4K write QD32, all replicas, before the flusher",
                Limit::AtMost(14.0),
                " KB",
                kib(|both| both.0),
            ),
            self.line("the same with the flusher", Limit::AtMost(26.0), " KB", kib(|both| both.1)),
        ]
    }

    fn over_time(&self) -> Vec<Line> {
        let open = |subject, reads| {
            let mut rows = self.rows.iter();
            let is = |row: &&Row| {
                row.subject == subject
                    && row.load.rate.is_some()
                    && row.load.read_percent == reads
                    && row.load.depth == OPEN_DEPTH
            };
            let row = rows.find(is)?;
            Some(row.p999_us? / row.p50_us?)
        };
        let open_loop = |what, reads| {
            let raw = open(RAW, reads);
            let beside = raw.map_or(String::new(), |raw| format!(" (the raw file's at that rate: {raw:.1})"));
            let measure = format!("4K {what} at half the maximum rate, open loop, p99.9 / p50{beside}");
            self.line(&measure, Limit::AtMost(10.0), "", open(THREE, reads))
        };
        let memory = self.facts.memory;
        let grown = memory.map(|memory| (memory.late_bytes / memory.early_bytes - 1.0) * 100.0);
        let watched = memory.map_or("10 minutes".into(), |memory| format!("{:.0} s", memory.seconds));
        let above_busy = |after: AfterIdle| (after.first_us - after.busy_us).max(0.0);
        let waits = self.facts.after_idle.map(above_busy);
        let raw_waits = self.facts.raw_after_idle.map(above_busy);
        let beside = raw_waits.map_or(String::new(), |us| format!(" (the raw file's: {us:.0} us)"));
        vec![
            open_loop("read", 100),
            open_loop("write", 0),
            self.line("a target idle, of a core", Limit::Below(2.0), " %", self.facts.idle_percent),
            self.line(
                &format!("the first read after idle, above a busy one's p50{beside}"),
                Limit::AtMost(200.0),
                " us",
                waits,
            ),
            self.line(
                &format!(
                    "RSS of a target over {watched} of a mixed load, growth (the target says 10 minutes)"
                ),
                Limit::AtMost(FLAT * 100.0),
                " %",
                grown,
            ),
            self.line(
                "the same, the most of a target",
                Limit::AtMost(MEMORY_MAX_MIB),
                " MiB",
                memory.map(|memory| memory.max_bytes / f64::from(1 << 20)),
            ),
        ]
    }

    fn scaling(&self) -> Vec<Line> {
        let load = both_shards();
        let faster = self.times(MEMORY_2, MEMORY, &load);
        let cpu = || Some(self.cpu_us(MEMORY_2, &load)? / self.cpu_us(MEMORY, &load)?);
        if self.cpus >= CPUS_FOR_SHARDS {
            return vec![self.line("2 shards / 1 shard in memory, 4K read", Limit::AtLeast(1.8), "", faster)];
        }
        let cpus = self.cpus;
        vec![self.line(
            &format!("2 shards / 1 shard in memory, CPU of the target an IO ({cpus} processors: no throughput to compare)"),
            Limit::AtMost(1.1),
            "",
            cpu(),
        )]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::result::Results;
    use crate::run::summary;
    use std::path::Path;

    const SIZE: u64 = 1 << 30;

    fn row(subject: &str, load: Load, iops: f64, cpu: f64) -> Row {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let model = summary::rows(&Results::read(&fixture).expect("a fixture"))[0].clone();
        let (server_us_per_io, p50_us) = (Some(cpu), Some(1e6 / iops));
        Row {
            subject: subject.into(),
            load,
            iops,
            server_us_per_io,
            p50_us,
            p999_us: Some(1e7 / iops),
            ..model
        }
    }

    fn verdict(lines: &[Line], measure: &str) -> Verdict {
        let found: Vec<&Line> = lines.iter().filter(|line| line.measure.starts_with(measure)).collect();
        assert_eq!(found.len(), 1, "{measure}: {found:?}");
        found[0].verdict
    }

    #[test]
    fn nothing_measured_is_nothing_met_and_says_why() {
        let facts = Facts { lacking: vec![("1 replica", "no such thing".into())], ..Facts::default() };
        let lines = lines(&[], &facts, SIZE);
        assert!(lines.len() > 25 && lines.iter().all(|line| line.verdict == Verdict::NotShown));
        assert_eq!(lines[0].found, "no such thing");
        assert!(lines.iter().any(|line| line.found == "not measured in this run"));
    }

    #[test]
    fn ratios_are_of_one_load_and_limits_include_their_edge() {
        let rows = [
            row(RAW, read(32, SIZE), 1000.0, 0.0),
            row(ONE_NVME, read(32, SIZE), 800.0, 8.1),
            row(BARE_TCP, read(32, SIZE), 900.0, 6.1),
            row(THREE, read(32, SIZE), 740.0, 14.0),
            row(RAW, write_4k(32, SIZE), 100.0, 0.0),
            row(THREE, write_4k(32, SIZE), 310.0, 48.0),
            row(BARE_SLEEPS, write_4k(32, SIZE), 90.0, 9.7),
            row(RAW, write_4k(1, SIZE), 10_000.0, 0.0),
            row(RAW, three_at_once(SIZE), 5_000.0, 0.0),
            row(THREE, write_4k(1, SIZE), 2_500.0, 0.0),
            row(BARE_TCP, write_4k(1, SIZE), 8_000.0, 0.0),
            row(RAW, stream(0, SIZE), 300.0, 0.0),
            row(THREE, stream(0, SIZE), 40.0, 0.0),
        ];
        let lines = lines(&rows, &Facts::default(), SIZE);
        let of = |measure| verdict(&lines, measure);
        assert_eq!(of("4K read QD32, 1 replica, NVMe/TCP / raw"), Verdict::Met);
        assert_eq!(of("4K read QD32, 1 replica, NVMe/TCP, CPU an IO of the target"), Verdict::Missed);
        assert_eq!(of("4K read QD32, 3 replicas"), Verdict::Missed);
        assert_eq!(of("4K write QD32, 3 replicas"), Verdict::Met);
        assert_eq!(of("128K sequential write"), Verdict::Missed, "40 is less than 0.45 of a third of 300");
        assert_eq!(of("4K read QD1, 1 replica"), Verdict::NotShown, "another depth");
        assert_eq!(of("CPU a write QD32"), Verdict::Met);
        assert_eq!(of("CPU a read QD32"), Verdict::Missed, "14.0 of 23 are more than 0.6");
        let bare = |measure: &str| {
            let line = lines.iter().find(|line| line.measure.starts_with(measure));
            line.and_then(|line| line.bare.as_deref())
        };
        assert_eq!(bare("4K read QD32, 1 replica, NVMe/TCP / raw"), Some("0.90"));
        assert_eq!(bare("4K read QD32, 1 replica, NVMe/TCP, CPU"), Some("6.10 us"));
        assert_eq!(bare("CPU a write QD32"), Some("0.30: three, never spinning"));
        // 200 us for three at once, and twice the 25 that a hop takes, by 100 us.
        assert_eq!(bare("4K write QD1, 3 replicas"), Some("2.50: three writes at once, two hops"));
        assert_eq!(of("4K write QD1, 3 replicas"), Verdict::Missed, "400 us by 100");
        assert_eq!(bare("4K read QD32, 1 replica, NBD"), None, "it was not measured over a Unix socket");
    }

    #[test]
    fn vitastor_is_scaled_by_what_the_raw_file_gives_here() {
        // Half of the raw file's speed: half of Vitastor's figures are to be doubled.
        let raw = row(RAW, read(32, SIZE), 40_000.0, 0.0);
        let fast = [raw.clone(), row(THREE, write_4k(32, SIZE), 9719.0, 1.0)];
        let slow = [raw, row(THREE, write_4k(32, SIZE), 9700.0, 1.0)];
        let of = |rows: &[Row]| verdict(&lines(rows, &Facts::default(), SIZE), "4K write QD32 / Vitastor's");
        assert_eq!((of(&fast), of(&slow)), (Verdict::Met, Verdict::Missed));
    }

    #[test]
    fn what_is_seen_over_time_is_judged_by_its_limits() {
        let memory =
            Memory { seconds: 90.0, early_bytes: 100e6, late_bytes: 106e6, max_bytes: 299.0 * 1048576.0 };
        let facts = Facts {
            idle_percent: Some(2.0),
            after_idle: Some(AfterIdle { busy_us: 100.0, first_us: 300.0 }),
            disk_bytes: Some((14_000.0, 26_100.0)),
            memory: Some(memory),
            ..Facts::default()
        };
        let half = Load { rate: Some(5.0), depth: OPEN_DEPTH, ..read(1, SIZE) };
        let lines = lines(&[row(THREE, half, 10.0, 1.0)], &facts, SIZE);
        let of = |measure| verdict(&lines, measure);
        assert_eq!(of("a target idle"), Verdict::Missed, "2 is not under 2");
        assert_eq!(of("the first read after idle"), Verdict::Met);
        assert_eq!(of("to the disk for a 4K write"), Verdict::Met);
        assert_eq!(of("the same with the flusher"), Verdict::Missed);
        assert_eq!(of("RSS of a target"), Verdict::Missed);
        assert_eq!(of("the same, the most of a target"), Verdict::Met);
        assert_eq!(of("4K read at half the maximum rate"), Verdict::Met, "exactly 10");
        assert_eq!(of("4K write at half the maximum rate"), Verdict::NotShown);
    }

    #[test]
    fn two_shards_are_judged_by_throughput_only_where_processors_allow() {
        let rows = [row(MEMORY, both_shards(), 1000.0, 3.0), row(MEMORY_2, both_shards(), 1100.0, 3.2)];
        let facts = Facts::default();
        let of = |cpus| Judge { rows: &rows, facts: &facts, size: SIZE, cpus }.scaling().remove(0).verdict;
        assert_eq!((of(2), of(8)), (Verdict::Met, Verdict::Missed));
    }
}
