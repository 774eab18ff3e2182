//! `ashlar tune probe`: measures a disk as a target uses it, and writes `device.toml`.
//!
//! In a folder it measures a file of its own, preallocated and fully written, and removes it. A
//! device is only read, unless `--destroy` is given and nothing uses it.
//! Deliberately absent: the page cache (all IO is direct), and any IO of a file it did not make.

mod choose;
mod compare;
mod measure;
mod subject;

pub use choose::{Figures, Point};
pub use measure::Run;

use crate::command::{Exit, Output};
use crate::cpus::Cpus;
use crate::device::{Device, FILE, Measured};
use crate::facts::Facts;
use crate::machine::Machine;
use crate::model::Profile;
use crate::render::Style;
use crate::tree::HostTree;
use anyhow::Context;
use choose::limits;
use clap::Args;
use comfy_table::Cell;
use measure::{Bench, Load};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use subject::Subject;

/// Depths of the sweeps.
const READ_DEPTHS: &[u32] = &[1, 2, 4, 8, 16, 32, 64, 128];
const WRITE_DEPTHS: &[u32] = &[1, 2, 4, 8, 16, 32, 64];
const DSYNC_DEPTHS: &[u32] = &[1, 2, 4, 7];
/// Sizes of log batches.
const BATCH_BYTES: &[u64] = &[128 << 10, 256 << 10, 512 << 10, 1 << 20];
/// IOs in flight while reading or writing in order.
const STREAM_DEPTH: u32 = 8;

/// What `tune probe` takes.
#[derive(Args, Debug)]
pub struct ProbeArgs {
    /// A folder on the disk, best a target's own, or a block device.
    #[arg(value_name = "DIR|DEV")]
    at: PathBuf,
    /// Bytes of the file that is measured; larger than the disk's cache tells more.
    #[arg(long, default_value = "1G", value_parser = parse_bytes, value_name = "BYTES")]
    size: u64,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 2.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Overwrite the device: without this, a device is only read.
    #[arg(long)]
    destroy: bool,
    /// Measure a few loads by fio too, in turns, and print both; exit code 3 when they are more
    /// than a tenth apart.
    #[arg(long)]
    fio: bool,
    /// Keep the comparison with fio as a page, too.
    #[arg(long, requires = "fio", value_name = "FILE")]
    write_markdown: Option<PathBuf>,
    /// How often each load is measured by each, with --fio; medians are compared.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// `latency` also asks the target to keep processors out of deep sleep while it runs.
    #[arg(long, value_enum, default_value_t)]
    profile: Profile,
    /// Where device.toml goes [default: into DIR; for a device, nowhere]
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Write nothing but the result on stdout.
    #[arg(long, conflicts_with = "save")]
    no_save: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

#[derive(Serialize)]
struct Report<'a> {
    figures: &'a Figures,
    device: &'a Device,
    saved: Option<&'a Path>,
}

/// Runs the command.
///
/// # Errors
/// No room, no permission, a device in use, an IO error, or no fio for `--fio`.
pub fn run(args: &ProbeArgs) -> anyhow::Result<Exit> {
    let subject = Subject::open(&args.at, args.size, args.destroy)?;
    let mut bench = Bench::open(&subject)?;
    let time = Duration::from_secs_f64(args.seconds);
    if subject.may_write() {
        eprintln!("writing {} MiB once, so that later writes change no metadata", subject.bytes() >> 20);
        bench.fill()?;
    }
    if args.fio {
        let rows = compare::measure_all(&mut bench, &subject, time, args.rounds)?;
        if let Some(path) = &args.write_markdown {
            let page = compare::page(&rows, time, args.rounds);
            std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
        }
        return compare::show(&rows, args.output);
    }
    let figures = measure_all(&mut bench, &subject, time)?;
    let device = describe(&args.at, &figures, args.profile);
    let path = match (&args.save, subject.is_device() || args.no_save) {
        (Some(path), _) => Some(path.clone()),
        (None, true) => None,
        (None, false) => Some(args.at.join(FILE)),
    };
    if let Some(path) = &path {
        device.save(path)?;
    }
    match args.output {
        Output::Json => {
            let report = Report { figures: &figures, device: &device, saved: path.as_deref() };
            crate::command::print(&serde_json::to_string_pretty(&report)?)?;
        }
        Output::Text => crate::command::print(&text(&figures, &device, path.as_deref()))?,
    }
    Ok(Exit::Ok)
}

fn measure_all(bench: &mut Bench, subject: &Subject, time: Duration) -> anyhow::Result<Figures> {
    let mut sweep = |load: Load, depths: &[u32]| {
        let point = |depth: &u32| {
            let run = bench.run(Load { depth: *depth, ..load }, time)?;
            eprintln!("{}", run.line());
            anyhow::Ok(Point { depth: *depth, run })
        };
        depths.iter().map(point).collect::<anyhow::Result<Vec<_>>>()
    };
    let mut figures = Figures {
        reads: sweep(Load::READ, READ_DEPTHS)?,
        stream_read: sweep(Load::STREAM_READ, &[STREAM_DEPTH])?,
        ..Figures::default()
    };
    if subject.may_write() {
        figures.writes = sweep(Load::WRITE, WRITE_DEPTHS)?;
        figures.dsyncs = sweep(Load::DSYNC, DSYNC_DEPTHS)?;
        let batches = choose::batches(&figures.dsyncs);
        for bytes in BATCH_BYTES {
            figures.logs.extend(sweep(Load { bytes: *bytes, ..Load::LOG }, &[batches])?);
        }
        figures.stream_write = sweep(Load::STREAM_WRITE, &[STREAM_DEPTH])?;
    }
    Ok(figures)
}

/// The figures with what the machine says of the disk.
fn describe(at: &Path, figures: &Figures, profile: Profile) -> Device {
    let tree = HostTree::default();
    let facts = Facts { cpus: Cpus::default(), ..Facts::read(&tree, at, false) };
    let machine = Machine { tree: &tree, facts: &facts, profile };
    let disks = machine.disks();
    let caches: Vec<_> = disks.iter().filter_map(|d| machine.text(&d.queue("write_cache"))).collect();
    let first = |points: &[Point]| points.first().map(|point| point.run.p50_us);
    let best = |points: &[Point]| points.iter().map(|point| point.run.iops).reduce(f64::max);
    let (write_us, dsync_us) = (first(&figures.writes), first(&figures.dsyncs));
    let measured = Measured {
        time_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        read_iops: best(&figures.reads).unwrap_or(0.0),
        write_iops: best(&figures.writes),
        read_bytes_s: figures.stream_read.first().map_or(0.0, |point| point.run.bytes_s),
        write_bytes_s: figures.stream_write.first().map(|point| point.run.bytes_s),
        read_us: first(&figures.reads).unwrap_or(0.0),
        write_us,
        dsync_us,
        log_bytes_s: figures.logs.iter().map(|point| point.run.bytes_s).reduce(f64::max),
        dsync_cost: dsync_us.zip(write_us).map(|(dsync, plain)| (dsync / plain * 100.0).round() / 100.0),
        volatile_cache: (!caches.is_empty()).then(|| caches.iter().any(|cache| cache == "write back")),
        io_poll: !disks.is_empty() && disks.iter().all(|d| machine.number(&d.queue("io_poll")) == Some(1)),
    };
    Device { format: 1, limits: limits(figures, profile), measured: Some(measured) }
}

fn text(figures: &Figures, device: &Device, saved: Option<&Path>) -> String {
    let Figures { reads, stream_read, writes, dsyncs, logs, stream_write } = figures;
    let loads = [reads, stream_read, writes, dsyncs, logs, stream_write];
    let row = |point: &Point| {
        let Run { load, iops, bytes_s, p50_us, p99_us, .. } = &point.run;
        [
            load.to_string(),
            point.depth.to_string(),
            format!("{iops:.0}"),
            format!("{:.1}", bytes_s / 1e6),
            format!("{p50_us:.0}"),
            format!("{p99_us:.0}"),
        ]
        .map(Cell::new)
        .to_vec()
    };
    let rows = loads.into_iter().flatten().map(row).collect();
    let mut text = Style::of_stdout().table(&["LOAD", "DEPTH", "IOPS", "MB/S", "P50 US", "P99 US"], rows);
    text += &verdicts(device).into_iter().map(|line| format!("\n{line}")).collect::<String>();
    let limits = device.limits;
    text += &format!(
        "\n\nfor the target: queue_depth {}, batches_in_flight_max {}, batch_blocks_max {}, flush_in_flight_max {}\n",
        limits.queue_depth, limits.batches_in_flight_max, limits.batch_blocks_max, limits.flush_in_flight_max
    );
    match saved {
        Some(path) => text + &format!("written to {}; read at the target's next start\n", path.display()),
        None => text + "not saved\n",
    }
}

fn verdicts(device: &Device) -> Vec<String> {
    let Some(measured) = &device.measured else { return Vec::new() };
    let mut lines = Vec::new();
    if let Some(cost) = measured.dsync_cost {
        let cache = match measured.volatile_cache {
            Some(true) => "says that it has a volatile cache",
            Some(false) => "says that it has no volatile cache",
            None => "does not say whether it has a volatile cache",
        };
        let dear = if cost > 2.0 { "flushes are dear" } else { "flushes are cheap" };
        lines.push(format!("a durable write takes {cost:.1} times a plain one: {dear} (the disk {cache})"));
    }
    let poll =
        if measured.io_poll { "has queues that can be polled" } else { "has no queues that can be polled" };
    lines.push(format!("the disk {poll} (IOPOLL; see `ashlar tune explain poll-queues`)"));
    lines
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    if (0.05..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("between 0.05 and 3600".into()) }
}

/// Reads a size such as `512M`; the units are powers of 1,024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].trim_end_matches("iB").to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("`{text}` is not a size: write a number with K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is not a size"))?;
    let bytes = number.checked_mul(1 << shift).unwrap_or(0);
    if bytes < 16 << 20 { Err("16M or more, and below 2^64".into()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn sizes_and_times_that_measure_nothing_are_refused() {
        assert_eq!(parse_bytes("1G"), Ok(1 << 30));
        assert_eq!(parse_bytes("64MiB"), Ok(64 << 20));
        for wrong in ["", "1", "G", "1X", "99999999999T", "-1G"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
        assert!(parse_seconds("0").is_err() && parse_seconds("NaN").is_err() && parse_seconds("2").is_ok());
    }

    #[test]
    fn a_small_probe_of_this_disk_finds_figures_that_hang_together() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let subject = Subject::open(dir.path(), 16 << 20, false)?;
        let mut bench = Bench::open(&subject)?;
        bench.fill()?;
        let time = Duration::from_millis(100);
        let read = bench.run(Load { depth: 4, ..Load::READ }, time)?;
        let write = bench.run(Load { depth: 4, ..Load::DSYNC }, time)?;
        for run in [read, write] {
            assert!(run.iops > 1.0 && run.p50_us > 0.0 && run.p99_us >= run.p50_us, "{}", run.line());
            // Little's law: depth = rate x latency; the mean is what it holds for. On a busy machine there are fewer
            // in flight than are wanted, never more.
            let depth = run.iops * run.mean_us / 1e6;
            assert!(depth > 0.0 && depth <= 4.5, "{depth} in flight: {}", run.line());
        }
        drop((bench, subject));
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 0, "a probe leaves nothing behind");
        Ok(())
    }

    /// A loop device over a file; detached when dropped.
    struct Loop(PathBuf);

    impl Loop {
        fn over(file: &Path) -> Option<Self> {
            let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output();
            let output = output.ok().filter(|output| output.status.success())?;
            Some(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let detached = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
            assert!(detached.is_ok_and(|status| status.success()), "{} stays", self.0.display());
        }
    }

    fn probe_of(at: &Path, destroy: bool, save: Option<PathBuf>) -> anyhow::Result<Exit> {
        let no_save = save.is_none();
        let (size, seconds, rounds) = (16 << 20, 0.05, 1);
        let (fio, profile, output, write_markdown) = (false, Profile::default(), Output::Json, None);
        let at = at.into();
        run(&ProbeArgs {
            at,
            size,
            seconds,
            destroy,
            fio,
            write_markdown,
            rounds,
            profile,
            save,
            no_save,
            output,
        })
    }

    #[test]
    fn a_device_is_only_read_unless_it_may_be_destroyed_and_nothing_uses_it() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let (file, saved) = (dir.path().join("disk"), dir.path().join(FILE));
        let pattern = vec![0xA5_u8; 16 << 20];
        std::fs::write(&file, &pattern)?;
        let Some(device) = Loop::over(&file) else {
            println!("SKIPPED: no loop device can be made here (not root, or no loop in the kernel)");
            return Ok(());
        };
        probe_of(&device.0, false, Some(saved.clone()))?;
        let read_only = Device::load(dir.path())?.expect("saved").measured.expect("measured");
        assert!(read_only.read_iops > 0.0 && read_only.write_iops.is_none());
        assert!(std::fs::read(&file)? == pattern, "a device is only read");
        let in_use = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&device.0)?;
        let refused = probe_of(&device.0, true, None).map(|_| ()).expect_err("in use");
        assert!(format!("{refused:#}").contains("is in use"), "{refused:#}");
        assert!(std::fs::read(&file)? == pattern, "a device in use is not written");
        drop(in_use);
        probe_of(&device.0, true, Some(saved))?;
        let written = Device::load(dir.path())?.expect("saved").measured.expect("measured");
        assert!(written.write_iops.is_some_and(|iops| iops > 0.0) && written.log_bytes_s.is_some());
        drop(device);
        assert!(std::fs::read(&file)? != pattern, "a device that may be destroyed is written");
        Ok(())
    }
}
