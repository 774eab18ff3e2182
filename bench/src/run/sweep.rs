//! `ashlar bench sweep`: every combination of sizes, depths, mixes and jobs, on every target.

use super::load::{Load, Order, Sizes};
use super::measure::Client;
use super::{CommonArgs, TargetArgs, measure, parse_sizes, show};
use crate::fio::Fio;
use crate::parse_bytes;
use anyhow::ensure;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// What `bench sweep` takes.
#[derive(Args, Debug)]
#[command(after_help = "The time it takes is told before it begins. Examples:\n  \
    ashlar bench sweep raw=file:/srv/x vol=dev:nvme --dev /srv/d --prepare --depth 1,4,16,64 --html sweep.html\n  \
    ashlar bench sweep nbd://host/vol0 --block 4K --block 128K --read 100,70,0 --depth 1,32 --jobs 1,2\n\n\
    A --block with commas is one mix of sizes (4K:70,64K:30); repeat --block for several.")]
pub struct SweepArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// In which order.
    #[arg(long, value_enum, default_value_t)]
    order: Order,
    /// Reads among 100 IOs, one grid line each.
    #[arg(long, default_value = "100,0", value_delimiter = ',', value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    read: Vec<u8>,
    /// Sizes, one grid line a --block.
    #[arg(long, default_value = "4K", value_name = "SIZES", value_parser = parse_sizes)]
    block: Vec<Sizes>,
    /// IOs in flight at most, for each job, one grid line each.
    #[arg(long, default_value = "1,4,16,64", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=256))]
    depth: Vec<u32>,
    /// Connections, each with a thread of its own, one grid line each.
    #[arg(long, default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: Vec<u32>,
    /// Writes of a file are durable when they complete (RWF_DSYNC).
    #[arg(long)]
    dsync: bool,
    /// Bytes from the start that are touched.
    #[arg(long, default_value = "1G", value_parser = parse_bytes)]
    size: u64,
    /// Measure with fio; its job files go here.
    #[arg(long, value_name = "DIR")]
    fio: Option<PathBuf>,
    #[command(flatten)]
    common: CommonArgs,
}

/// Most points of a grid: a day of 10 s each.
const POINTS_MAX: usize = 8640;

/// Runs `bench sweep`.
///
/// # Errors
/// See [`super::run`].
pub fn run(args: &SweepArgs) -> anyhow::Result<ExitCode> {
    let (subjects, loads) = (args.targets.subjects()?, args.loads());
    let points = loads.len() * subjects.len() * args.common.rounds as usize;
    ensure!(points <= POINTS_MAX, "{points} measurements are more than {POINTS_MAX}: name fewer grid lines");
    let minutes = points as f64 * (args.common.seconds + args.common.warm_up) / 60.0;
    eprintln!("{points} measurements, at least {minutes:.1} min");
    let client = match &args.fio {
        None => Client::Own,
        Some(dir) => Client::Fio(Fio::probe(dir, subjects.iter().map(|subject| &subject.target))?),
    };
    let results = measure(&subjects, &loads, &args.common, &client)?;
    show(&results, &args.common.keep, "ashlar bench sweep")?;
    Ok(ExitCode::SUCCESS)
}

impl SweepArgs {
    /// The grid: depth varies fastest, so that a curve is measured in one go. Reads come first where `--read` says so:
    /// they then find the target at rest.
    fn loads(&self) -> Vec<Load> {
        let mut loads = Vec::new();
        for read_percent in &self.read {
            for sizes in &self.block {
                for jobs in &self.jobs {
                    for depth in &self.depth {
                        loads.push(Load {
                            order: self.order,
                            sizes: sizes.clone(),
                            jobs: *jobs,
                            dsync: self.dsync,
                            ..Load::random_4k(*read_percent, *depth, self.size)
                        });
                    }
                }
            }
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sweep: SweepArgs,
    }

    #[test]
    fn the_grid_has_every_combination_once_and_depth_varies_fastest() {
        let line = "x file:/x --read 100,0 --block 4K --block 4K:70,64K:30 --depth 1,8 --jobs 1,2 --dsync";
        let loads = Line::parse_from(line.split(' ')).sweep.loads();
        let labels: Vec<String> = loads.iter().map(Load::label).collect();
        assert_eq!(labels.len(), 16);
        assert_eq!(labels[..3], ["randread 4K QD1", "randread 4K QD8", "randread 4K QD1 x2"]);
        assert_eq!(labels[15], "randwrite 4K:70,64K:30 QD8 x2");
        let mut unique = labels.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), 16);
        assert!(loads.iter().all(|load| load.dsync));
    }
}
