//! Runs one target of `ashlar_tests::fuzz`, or all; normally started by `cargo xtask fuzz`.
//!
//! Built plainly it mutates without coverage. Built with `--cfg ashlar_libfuzzer` it is a libFuzzer
//! program, whose target `ASHLAR_FUZZ` names.

#![cfg_attr(ashlar_libfuzzer, no_main)]

use peak_alloc::PeakAlloc;

#[global_allocator]
static HELD: PeakAlloc = PeakAlloc;

#[cfg(ashlar_libfuzzer)]
mod led_by_coverage {
    use ashlar_tests::fuzz::{Target, find};
    use std::sync::LazyLock;

    static TARGET: LazyLock<&Target> = LazyLock::new(|| {
        let name = std::env::var("ASHLAR_FUZZ").expect("ASHLAR_FUZZ names a target");
        find(&name).unwrap_or_else(|| panic!("ASHLAR_FUZZ={name} is no target"))
    });

    libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET.check(input, &super::HELD));
}

#[cfg(not(ashlar_libfuzzer))]
fn main() -> std::process::ExitCode {
    plain::main()
}

#[cfg(not(ashlar_libfuzzer))]
mod plain {
    use ashlar_tests::fuzz::plain::{Until, run};
    use ashlar_tests::fuzz::{TARGETS, find};
    use clap::Parser;
    use std::path::PathBuf;
    use std::process::ExitCode;
    use std::time::Instant;

    /// Give decoders what nobody should send: the corpus, and inputs made and mutated from a seed.
    #[derive(Parser)]
    struct Args {
        /// Which decoders; all when none is named.
        #[arg(value_parser = TARGETS.iter().map(|t| t.name).collect::<Vec<_>>())]
        targets: Vec<String>,
        /// How long each.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// What decides all inputs; drawn from the clock when not given.
        #[arg(long)]
        seed: Option<u64>,
        /// Only this input.
        #[arg(long, requires = "targets")]
        input: Option<PathBuf>,
        /// Tell what there is, one line a target.
        #[arg(long)]
        list: bool,
        /// Write some well-formed inputs of each target into this folder: what coverage starts from.
        #[arg(long)]
        make: Option<PathBuf>,
    }

    pub fn main() -> ExitCode {
        let args = Args::parse();
        match go(&args) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("ashlar-fuzz: {error}");
                ExitCode::FAILURE
            }
        }
    }

    fn go(args: &Args) -> std::io::Result<bool> {
        let all: Vec<String> = TARGETS.iter().map(|t| t.name.to_owned()).collect();
        let names = if args.targets.is_empty() { &all } else { &args.targets };
        let mut good = true;
        for target in names.iter().filter_map(|name| find(name)) {
            if args.list {
                println!("{:<16} {:>6} {}", target.name, target.bytes_max, target.about);
            } else if let Some(path) = &args.input {
                target.check(&std::fs::read(path)?, &super::HELD);
            } else if let Some(folder) = &args.make {
                let folder = folder.join(target.name);
                std::fs::create_dir_all(&folder)?;
                let mut dice = ashlar_tests::fuzz::Dice(args.seed.unwrap_or(1));
                for nth in 0..50 {
                    std::fs::write(folder.join(format!("made-{nth}")), (target.make)(&mut dice))?;
                }
            } else {
                good &= one(args, target)?;
            }
        }
        Ok(good)
    }

    fn one(args: &Args, target: &ashlar_tests::fuzz::Target) -> std::io::Result<bool> {
        let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = args.seed.unwrap_or_else(|| clock().map_or(1, |at| at.as_nanos() as u64));
        // Each input is written there before it is tried.
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let folder = folder.join(format!("ashlar-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let (current, start) = (folder.join(target.name), Instant::now());
        let ran = run(target, seed, Until::Seconds(args.seconds), &super::HELD, Some(&current))?;
        match ran {
            Ok(ran) => {
                std::fs::remove_dir_all(&folder)?;
                println!(
                    "{}: {} inputs kept, {} made from seed {seed} in {:.1} s, nothing found",
                    target.name,
                    ran.kept,
                    ran.made,
                    start.elapsed().as_secs_f32()
                );
                Ok(true)
            }
            Err(found) => {
                println!("{}: seed {seed}: {}", target.name, found.why);
                println!("  the input ({} bytes) is {}", found.input.len(), current.display());
                Ok(false)
            }
        }
    }
}
