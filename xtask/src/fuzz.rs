//! `cargo xtask fuzz`: builds and runs the fuzz targets of the tests crate.
//!
//! With a C++ compiler the program is libFuzzer, led by coverage (the instrumentation is stable
//! rustc's); without one, where none may be installed, or with `--plain`, it mutates blindly. What
//! libFuzzer collects stays in the target directory; inputs that found something are shown, and belong
//! into `tests/fuzz/TARGET/`.

use crate::packages;
use crate::steps::{INTEROP, cargo, root, run, target_folder};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What rustc is told so that libFuzzer sees branches and comparisons; as cargo-fuzz does.
const INSTRUMENT: &str = "--cfg ashlar_libfuzzer -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";
/// Seconds a target in CI, and nightly.
const SHORT_SECONDS: u64 = 3;
const LONG_SECONDS: u64 = 60;

/// What `fuzz` takes.
#[derive(Args)]
pub struct FuzzArgs {
    /// Which decoders.
    targets: Vec<String>,
    /// How long each.
    #[arg(long, default_value_t = LONG_SECONDS)]
    seconds: u64,
    /// Mutate without coverage.
    #[arg(long)]
    plain: bool,
    /// Tell which decoders there are.
    #[arg(long)]
    list: bool,
    /// Write the smallest set of inputs that covers the same into tests/fuzz.
    #[arg(long)]
    keep: bool,
}

/// Runs targets for so long each.
pub fn fuzz(args: &FuzzArgs) -> Result<()> {
    let plain = build(false)?;
    if args.list {
        return run(Command::new(plain).arg("--list"));
    }
    let names = names(&plain)?;
    for name in &args.targets {
        ensure!(names.contains(name), "{name} is no target; there are: {}", names.join(", "));
    }
    if args.plain || !packages::ensure_compiler()? {
        if !args.plain {
            println!("no C++ compiler, so no libFuzzer: inputs are mutated without coverage");
        }
        return run(Command::new(plain).args(["--seconds", &args.seconds.to_string()]).args(&args.targets));
    }
    let led = build(true)?;
    let mut failed = Vec::new();
    for name in names {
        if args.targets.is_empty() || args.targets.contains(&name) {
            println!("== {name}");
            if let Err(error) = led_by_coverage(&plain, &led, &name, args) {
                println!("{error:#}");
                failed.push(name);
            }
        }
    }
    ensure!(failed.is_empty(), "something was found: {}", failed.join(", "));
    Ok(())
}

/// The pass of every `cargo xtask test`: some seconds each, on any toolchain. Built by building a test of the same crate as all
/// tests are built, so that nothing is compiled for it alone.
pub fn short() -> Result<()> {
    run(&mut cargo(&["test", "--quiet", "--workspace", "--test", "fuzz", "--no-run"]))?;
    let plain = target_folder().join("debug/ashlar-fuzz");
    run(Command::new(plain).args(["--seconds", &SHORT_SECONDS.to_string()]))
}

/// The nightly pass.
pub fn long() -> Result<()> {
    fuzz(&FuzzArgs { targets: Vec::new(), seconds: LONG_SECONDS, plain: false, list: false, keep: false })
}

fn build(coverage: bool) -> Result<PathBuf> {
    let mut command =
        cargo(&["build", "--quiet", "--profile", "sim", "--package", INTEROP, "--bin", "ashlar-fuzz"]);
    if !coverage {
        run(&mut command)?;
        return Ok(target_folder().join("sim/ashlar-fuzz"));
    }
    // Named, the triple keeps the flags away from build scripts and macros.
    let (triple, folder) = (triple()?, target_folder().join("fuzz"));
    command.args(["--target", &triple, "--target-dir"]).arg(&folder);
    run(command.env("RUSTFLAGS", INSTRUMENT))?;
    Ok(folder.join(triple).join("sim/ashlar-fuzz"))
}

fn led_by_coverage(plain: &Path, led: &Path, name: &str, args: &FuzzArgs) -> Result<()> {
    let (kept, grown) = (root().join("tests/fuzz").join(name), target_folder().join("fuzz/corpus"));
    let found = target_folder().join("fuzz/found").join(name);
    for folder in [&kept, &found] {
        fs::create_dir_all(folder)?;
    }
    run(Command::new(plain).arg("--make").arg(&grown).arg(name))?;
    let grown = grown.join(name);
    let fuzzer = |arguments: &[String]| {
        let mut command = Command::new(led);
        command.env("ASHLAR_FUZZ", name).args(arguments);
        command
    };
    let prefix = format!("-artifact_prefix={}/", found.display());
    let common = [prefix, "-rss_limit_mb=2048".into(), "-timeout=10".into(), "-verbosity=0".into()];
    let mut rounds = common.to_vec();
    rounds.extend(["-print_final_stats=1".into(), format!("-max_total_time={}", args.seconds)]);
    rounds.push(format!("-max_len={}", bytes_max(plain, name)?));
    run(fuzzer(&rounds).arg(&grown).arg(&kept)).with_context(|| {
        let show = format!("cargo run --profile sim -p {INTEROP} --bin ashlar-fuzz -- {name} --input FILE");
        format!("{name}: an input was found, see {}; to see it again: {show}", found.display())
    })?;
    if args.keep {
        let smallest = ["-merge=1".to_owned(), "-max_len=2048".to_owned()];
        run(fuzzer(&smallest).arg(&kept).arg(&grown).stderr(Stdio::null()))?;
    }
    Ok(())
}

fn names(plain: &Path) -> Result<Vec<String>> {
    Ok(listed(plain)?.into_iter().map(|(name, _)| name).collect())
}

fn bytes_max(plain: &Path, name: &str) -> Result<String> {
    let found = listed(plain)?.into_iter().find(|(listed, _)| listed == name);
    found.map(|(_, bytes)| bytes).with_context(|| format!("{name} is no target"))
}

/// Names and longest inputs.
fn listed(plain: &Path) -> Result<Vec<(String, String)>> {
    let ran = Command::new(plain).arg("--list").output()?;
    let text = String::from_utf8(ran.stdout)?;
    let words = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        words.next().zip(words.next())
    };
    Ok(text.lines().filter_map(words).collect())
}

fn triple() -> Result<String> {
    let ran = Command::new("rustc").arg("-vV").output().context("rustc")?;
    let text = String::from_utf8(ran.stdout)?;
    match text.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(triple) => Ok(triple.to_owned()),
        None => bail!("rustc -vV does not tell its host"),
    }
}
