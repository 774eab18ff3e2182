//! The steps of `cargo xtask test`, in order from quick to slow.
//!
//! Every step runs even when an earlier one failed, so that one run tells all; the last
//! line says how many passed and failed. A tool that is not installed is a printed skip.

use crate::{arrows, fuzz, mutants, packages, tidy};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{env, fs};

/// The crate of the tests with real clients and whole clusters.
pub const INTEROP: &str = "ashlar-tests";

/// The binary that tests of whole clusters run.
const RELEASE_BUILD: &[&str] = &["build", "--release", "--quiet", "--package", "ashlar-cli"];

/// What miri runs: where `unsafe` is our own (`reactor`) or that of derived code (`protocol`, by rkyv), and of
/// those what asks the kernel for nothing.
const MIRI: &[(&str, &[&str])] = &[
    ("ashlar-reactor", &["--lib", "--", "arena", "loan", "mailbox", "timers"]),
    ("ashlar-protocol", &["--lib", "--"]),
];

/// Tests of many cases or much payload: miri, some hundred times slower than the machine, takes many minutes
/// for each.
const TOO_LONG_FOR_MIRI: &[&str] = &[
    "never_panic",
    "garbage",
    "come_through",
    "senseless_requests",
    "golden",
    "without_end",
    "however_the_stream",
    "different_ids",
];

/// What `test` and `ci` take.
#[derive(Args)]
pub struct TestArgs {
    /// Install nothing, even as root.
    #[arg(long)]
    no_install: bool,
    /// What takes hours too: fuzzing led by coverage, miri.
    #[arg(long)]
    nightly: bool,
    /// Leave out the tests with real clients and whole clusters.
    #[arg(long)]
    no_interop: bool,
}

/// How a step ended.
pub enum Outcome {
    /// All is well.
    Passed,
    /// Not run, and why.
    Skipped(&'static str),
}

/// Runs every step and sums up; an error when any failed.
pub fn test(args: &TestArgs) -> Result<()> {
    let mut report = Report::default();
    if !args.no_install {
        report.step("packages", || packages::ensure().map(|_| Outcome::Passed));
    }
    report.step("fmt", || fmt(true).map(|()| Outcome::Passed));
    report.step("arrows", || arrows().map(|()| Outcome::Passed));
    report.step("mutants' places", || {
        mutants(&mutants::MutantsArgs { check: true, ..mutants::MutantsArgs::default() })
            .map(|()| Outcome::Passed)
    });
    report.step("deny", deny);
    report.step("clippy", clippy);
    report.step("builds", || builds(!args.no_interop));
    report.step("unit tests", unit_tests);
    report.step("fuzz", || fuzz::short().map(|()| Outcome::Passed));
    if args.nightly {
        report.step("fuzz, led by coverage", || fuzz::long().map(|()| Outcome::Passed));
        report.step("miri", || miri().map(|()| Outcome::Passed));
        report.step("chaos", || chaos(&["--minutes".into(), "30".into()]).map(|()| Outcome::Passed));
    }
    if !args.no_interop {
        report.step("interop tests", interop_tests);
    }
    report.finish()
}

/// Checks the arrows between crates and the rules on source text.
pub fn arrows() -> Result<()> {
    let metadata = cargo(&["metadata", "--format-version", "1", "--no-deps"]).output()?;
    ensure!(
        metadata.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&metadata.stderr)
    );
    let mut broken = arrows::violations(&String::from_utf8_lossy(&metadata.stdout))?;
    broken.extend(tidy::violations(&root())?);
    for line in &broken {
        println!("  {line}");
    }
    ensure!(broken.is_empty(), "{} rules broken; ARCHITECTURE.md tells why they hold", broken.len());
    Ok(())
}

/// Builds the simulator and runs it.
pub fn sim(args: &[String]) -> Result<()> {
    let build = ["build", "--quiet", "--profile", "sim", "--package", INTEROP, "--bin", "ashlar-sim"];
    run(&mut cargo(&build))?;
    run(Command::new(target_folder().join("sim/ashlar-sim")).args(args))
}

/// Builds the chaos program and the release binary, and runs it.
pub fn chaos(args: &[String]) -> Result<()> {
    release_build()?;
    run(&mut cargo(&["build", "--quiet", "--package", INTEROP, "--bin", "ashlar-chaos"]))?;
    let mut command = Command::new(target_folder().join("debug/ashlar-chaos"));
    run(command.args(args).env("ASHLAR_BIN", target_folder().join("release/ashlar")))
}

/// Looks for mutants, or checks that each still has its place.
pub fn mutants(args: &mutants::MutantsArgs) -> Result<()> {
    mutants::mutants(&root(), &target_folder(), args)
}

/// Formats all code, or only checks.
pub fn fmt(check: bool) -> Result<()> {
    let arguments: &[&str] = if check { &["fmt", "--all", "--check"] } else { &["fmt", "--all"] };
    run(&mut cargo(arguments)).context("to mend: cargo xtask fmt")
}

fn clippy() -> Result<Outcome> {
    let arguments =
        ["clippy", "--workspace", "--all-targets", "--all-features", "--quiet", "--", "-D", "warnings"];
    run(&mut cargo(&arguments)).map(|()| Outcome::Passed)
}

fn deny() -> Result<Outcome> {
    if !has_subcommand("deny") {
        // Minutes of compiling, which a developer may not want unasked.
        if env::var_os("CI").is_none() {
            return Ok(Outcome::Skipped("cargo-deny is not installed; cargo install --locked cargo-deny"));
        }
        run(&mut cargo(&["install", "--locked", "--quiet", "cargo-deny"]))?;
    }
    // Without the network the advisories cannot be fetched; the other checks need none.
    run(&mut cargo(&["deny", "check", "bans", "licenses", "sources"])).map(|()| Outcome::Passed)
}

/// Builds all tests and, beside them, the release binary: for minutes its last step keeps one processor busy, and no more.
fn builds(with_release: bool) -> Result<Outcome> {
    let release =
        with_release.then(|| cargo(RELEASE_BUILD).spawn().context("cannot start cargo")).transpose()?;
    let tests = run(&mut test_builds());
    if let Some(mut release) = release {
        ensure!(release.wait()?.success(), "the release build failed");
    }
    tests.map(|()| Outcome::Passed)
}

fn unit_tests() -> Result<Outcome> {
    run(&mut tests(&format!("not package({INTEROP})"), &["--workspace", "--exclude", INTEROP]))?;
    Ok(Outcome::Passed)
}

/// The tests of whole clusters run the release binary, as a user would.
fn interop_tests() -> Result<Outcome> {
    let binary = target_folder().join("release/ashlar");
    ensure!(binary.is_file(), "{} is not there: the release build failed", binary.display());
    // What the tests tell beside passing: nextest shows no output of tests that pass.
    let told = ["checks.txt", "skipped.txt"].map(|name| target_folder().join(name));
    for file in &told {
        let _ = fs::remove_file(file);
    }
    let ran = run(tests(&format!("package({INTEROP})"), &["--package", INTEROP]).env("ASHLAR_BIN", binary));
    for file in &told {
        print!("{}", fs::read_to_string(file).unwrap_or_default());
    }
    ran.map(|()| Outcome::Passed)
}

/// Runs [`MIRI`]; installs miri where it is missing.
pub fn miri() -> Result<()> {
    if !has_miri() {
        println!("miri: installing a nightly toolchain beside the one that builds");
        let parts = ["toolchain", "install", "nightly", "--profile", "minimal"];
        let _ = Command::new("rustup").args(parts).args(["--component", "miri,rust-src"]).status();
        ensure!(has_miri(), "no miri: rustup toolchain install nightly --component miri,rust-src");
    }
    for (package, arguments) in MIRI {
        let start = Instant::now();
        let mut command = nightly();
        command.args(["miri", "test", "--quiet", "--package", package]).args(*arguments);
        command.args(TOO_LONG_FOR_MIRI.iter().flat_map(|name| ["--skip", name]));
        // Tree borrows: stacked borrows refuse the relative pointers of rkyv (its issue 436).
        command.env("MIRIFLAGS", "-Zmiri-disable-isolation -Zmiri-tree-borrows").env("PROPTEST_CASES", "2");
        run(&mut command).with_context(|| format!("{package} under miri"))?;
        println!("miri: {package} in {:.0} s", start.elapsed().as_secs_f32());
    }
    Ok(())
}

fn nightly() -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").current_dir(root());
    command
}

fn has_miri() -> bool {
    let quiet = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet(nightly().args(["miri", "--version"])).is_ok_and(|status| status.success())
}

fn release_build() -> Result<()> {
    run(&mut cargo(RELEASE_BUILD))
}

fn test_builds() -> Command {
    if has_subcommand("nextest") {
        return cargo(&["nextest", "run", "--no-run", "--workspace"]);
    }
    cargo(&["test", "--no-run", "--quiet", "--workspace"])
}

/// Some of the tests by `cargo nextest run` where it is installed, else by `cargo test`. Nextest is asked to build those of the
/// whole workspace each time, so that cargo gives every crate the same features, and builds it once.
fn tests(filter: &str, plain: &[&str]) -> Command {
    if has_subcommand("nextest") {
        let options = ["--workspace", "--no-fail-fast", "--no-tests", "pass", "--filterset", filter];
        let mut command = cargo(&["nextest", "run"]);
        command.args(options);
        return command;
    }
    let mut command = cargo(&["test", "--no-fail-fast", "--quiet"]);
    command.args(plain);
    command
}

/// A command of cargo, in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

fn has_subcommand(name: &str) -> bool {
    let asked = cargo(&[name, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}

/// Runs a command; an error when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        bail!("cargo {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// Where cargo builds.
pub fn target_folder() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |folder| root().join(folder))
}

#[derive(Default)]
struct Report {
    passed: usize,
    skipped: usize,
    failed: Vec<&'static str>,
}

impl Report {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<Outcome>) {
        println!("== {name}");
        let start = Instant::now();
        let outcome = work();
        let seconds = start.elapsed().as_secs_f32();
        match outcome {
            Ok(Outcome::Passed) => {
                self.passed += 1;
                println!("== {name}: passed in {seconds:.1} s");
            }
            Ok(Outcome::Skipped(why)) => {
                self.skipped += 1;
                println!("== {name}: SKIPPED, {why}");
            }
            Err(error) => {
                self.failed.push(name);
                println!("== {name}: FAILED in {seconds:.1} s: {error:#}");
            }
        }
    }

    fn finish(self) -> Result<()> {
        println!("steps: {} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped);
        ensure!(self.failed.is_empty(), "failed: {}", self.failed.join(", "));
        Ok(())
    }
}
