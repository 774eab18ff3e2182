//! `cargo xtask mutants`: can the simulator see the bugs it is there for?
//!
//! The bugs are data (`tests/mutants/mutants.toml`): a place in the sources and what stands there
//! instead. All of them go at once into a copy of the sources, each behind a switch that the
//! environment sets, so that one build serves for all. The sources themselves know nothing of it.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const LIST: &str = "tests/mutants/mutants.toml";
/// What `replace` calls the switch.
const SWITCH: &str = "MUTANT";
/// The environment variable that holds the number of the mutant which is on.
const VARIABLE: &str = "ASHLAR_MUTANT";
const BEGIN: &str = "<!-- mutants: begin -->";
const END: &str = "<!-- mutants: end -->";

/// What `mutants` takes.
#[derive(clap::Args, Default)]
pub struct MutantsArgs {
    /// Only mutants whose name holds this.
    #[arg(long)]
    pub only: Option<String>,
    /// Most seeds of each family before a mutant counts as not caught.
    #[arg(long, default_value_t = 60)]
    pub seeds: u64,
    /// Only check that every mutant still has its place in the sources.
    #[arg(long)]
    pub check: bool,
    /// Write the table into docs/testing.md: rows of mutants that were run are replaced, others stay.
    #[arg(long)]
    pub write: bool,
    /// Take the build of the last run.
    #[arg(long)]
    pub no_build: bool,
}

#[derive(Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Deserialize)]
struct Mutant {
    name: String,
    what: String,
    file: String,
    find: String,
    replace: String,
    /// Families of runs that look for it, in this order.
    #[serde(default = "swarm")]
    families: Vec<String>,
}

fn swarm() -> Vec<String> {
    vec!["swarm".into()]
}

/// Runs the mutants, or checks their places.
pub fn mutants(root: &Path, target: &Path, args: &MutantsArgs) -> Result<()> {
    let list = read(root)?;
    let mutated = mutate(root, &list)?;
    if args.check {
        println!("{} mutants have their place", list.len());
        return Ok(());
    }
    let binary = target.join("mutants/ashlar-sim");
    if !args.no_build {
        build(root, target, &mutated, &binary)?;
    }
    let mut rows = BTreeMap::new();
    let mut missed = 0;
    for (number, mutant) in list.iter().enumerate() {
        if args.only.as_ref().is_some_and(|only| !mutant.name.contains(only)) {
            continue;
        }
        let begun = Instant::now();
        let caught = hunt(&binary, number + 1, mutant, args.seeds)?;
        missed += usize::from(caught.is_none());
        let row = row(mutant, caught.as_ref(), args.seeds);
        println!("{row} {:.0} s", begun.elapsed().as_secs_f64());
        rows.insert(mutant.name.clone(), row);
        if args.write {
            write_table(root, &list, &rows)?;
        }
    }
    println!("{} mutants, {missed} not caught", rows.len());
    Ok(())
}

fn read(root: &Path) -> Result<Vec<Mutant>> {
    let text = fs::read_to_string(root.join(LIST)).with_context(|| LIST.to_owned())?;
    Ok(toml::from_str::<List>(&text).with_context(|| LIST.to_owned())?.mutant)
}

/// The sources that change, with every mutant behind its switch.
fn mutate(root: &Path, list: &[Mutant]) -> Result<BTreeMap<String, String>> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for (number, mutant) in list.iter().enumerate() {
        if !files.contains_key(&mutant.file) {
            files.insert(mutant.file.clone(), fs::read_to_string(root.join(&mutant.file))?);
        }
        let text = files.get_mut(&mutant.file).expect("just read");
        let count = text.matches(&mutant.find).count();
        ensure!(
            count == 1,
            "mutant {}: what it looks for is {count} times in {}; mend {LIST}",
            mutant.name,
            mutant.file
        );
        ensure!(mutant.replace.contains(SWITCH), "mutant {}: `replace` has no {SWITCH}", mutant.name);
        let switch = format!("::protocol::mutant({})", number + 1);
        *text = text.replace(&mutant.find, &mutant.replace.replace(SWITCH, &switch));
    }
    let library = "protocol/src/lib.rs";
    let mut text = fs::read_to_string(root.join(library))?;
    write!(
        text,
        r#"
/// Whether this mutant is on.
#[allow(clippy::all, clippy::disallowed_methods, clippy::disallowed_types)]
pub fn mutant(number: u32) -> bool {{
    static ON: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *ON.get_or_init(|| std::env::var("{VARIABLE}").ok().and_then(|n| n.parse().ok()).unwrap_or(0)) == number
}}
"#
    )?;
    files.insert(library.into(), text);
    Ok(files)
}

/// Builds the simulator from a copy of the sources; files that did not change are left alone, so
/// that little is built anew.
fn build(root: &Path, target: &Path, mutated: &BTreeMap<String, String>, binary: &Path) -> Result<()> {
    // A folder of its own for what is built: cargo tells crates of one workspace apart by their place
    // within it, and would take these for the real ones.
    let (copy, built) = (target.join("mutants/sources"), target.join("mutants/build"));
    let listed =
        Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(root).output()?;
    for name in String::from_utf8(listed.stdout)?.lines() {
        let from = root.join(name);
        if !from.is_file() {
            continue;
        }
        let wanted = match mutated.get(name) {
            Some(text) => text.clone().into_bytes(),
            None => fs::read(&from)?,
        };
        let to = copy.join(name);
        if fs::read(&to).ok().as_ref() != Some(&wanted) {
            fs::create_dir_all(to.parent().expect("within the copy"))?;
            fs::write(&to, wanted)?;
        }
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--profile", "sim", "--package", "ashlar-tests", "--bin", "ashlar-sim"]);
    let status = cargo.current_dir(&copy).env("CARGO_TARGET_DIR", &built).status()?;
    ensure!(status.success(), "the mutants do not build; their sources are in {}", copy.display());
    fs::copy(built.join("sim/ashlar-sim"), binary)?;
    Ok(())
}

struct Caught {
    family: String,
    seeds: u64,
    checker: String,
}

/// Looks for a mutant, seed by seed.
fn hunt(binary: &Path, number: usize, mutant: &Mutant, seeds: u64) -> Result<Option<Caught>> {
    let mut tried = 0;
    for family in &mutant.families {
        let seeds = seeds.to_string();
        let mut run = Command::new(binary);
        run.args(["--family", family, "--seeds", &seeds]).env(VARIABLE, number.to_string());
        let output = run.output().with_context(|| format!("cannot run {}", binary.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let failed = text.lines().find_map(|line| line.strip_prefix("seed ")?.split_once(" FAILED: "));
        match failed {
            Some((seed, why)) => {
                let checker = why.split(':').next().unwrap_or(why).to_owned();
                return Ok(Some(Caught {
                    family: family.clone(),
                    seeds: tried + seed.parse::<u64>()?,
                    checker,
                }));
            }
            None if !output.status.success() => {
                let seeds = tried + 1;
                return Ok(Some(Caught { family: family.clone(), seeds, checker: "abort".into() }));
            }
            None => tried += seeds.parse::<u64>()?,
        }
    }
    Ok(None)
}

fn row(mutant: &Mutant, caught: Option<&Caught>, seeds: u64) -> String {
    let Mutant { name, what, .. } = mutant;
    match caught {
        Some(Caught { family, seeds, checker }) => {
            format!("| `{name}` | {what} | {family} | {seeds} | {checker} |")
        }
        None => format!("| `{name}` | {what} | {} | not in {seeds} | - |", mutant.families.join(", ")),
    }
}

/// Puts rows into the table of the document.
fn write_table(root: &Path, list: &[Mutant], rows: &BTreeMap<String, String>) -> Result<()> {
    let path: PathBuf = root.join("docs/testing.md");
    let text = fs::read_to_string(&path)?;
    let (Some(begin), Some(end)) = (text.find(BEGIN), text.find(END)) else {
        bail!("{} lacks the marks of the table", path.display());
    };
    let old = &text[begin + BEGIN.len()..end];
    let kept =
        |name: &str| old.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).map(str::to_owned);
    let mut table = String::from(
        "\n| mutant | what it does | family | seeds until caught | by |\n| --- | --- | --- | --- | --- |\n",
    );
    for mutant in list {
        if let Some(row) = rows.get(&mutant.name).cloned().or_else(|| kept(&mutant.name)) {
            table += &row;
            table.push('\n');
        }
    }
    fs::write(&path, format!("{}{BEGIN}{table}{}", &text[..begin], &text[end..]))?;
    Ok(())
}
