//! `cargo xtask mutants`: can the simulator see the bugs it is there for?
//!
//! The bugs are data (`tests/mutants/mutants.toml`): a place in the sources and what stands there
//! instead. All of them go at once into a copy of the sources, each behind a switch that the
//! environment sets, so that one build serves for all. The sources themselves know nothing of it.
//!
//! Some bugs no whole cluster can show, because another rule masks them or their moment is too rare.
//! Those name the crates whose own tests see them; these are built from the same copy.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const LIST: &str = "tests/mutants/mutants.toml";
/// What `replace` calls the switch.
const SWITCH: &str = "MUTANT";
/// The environment variable that holds the numbers of the mutants which are on.
const VARIABLE: &str = "ASHLAR_MUTANT";
/// How many seeds the models in the crates' tests try for a mutant: of `copyset`, of `chunkstore`.
const MODEL_SEEDS: [(&str, &str); 2] = [("COPYSET_SEEDS", "3000"), ("SEEDS", "60")];
const BEGIN: &str = "<!-- mutants: begin -->";
const END: &str = "<!-- mutants: end -->";

/// What `mutants` takes.
#[derive(clap::Args, Default)]
pub struct MutantsArgs {
    /// Only mutants whose name holds this; may be given several times.
    #[arg(long)]
    pub only: Vec<String>,
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
    /// Ask the crates' own tests alone, which are built much sooner than the simulator.
    #[arg(long)]
    pub suites_only: bool,
}

#[derive(Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Deserialize)]
struct Mutant {
    name: String,
    what: String,
    #[serde(flatten)]
    edit: Option<Edit>,
    /// Other places that must change too, where a second rule would mask the first.
    #[serde(default)]
    also: Vec<Edit>,
    /// Instead of places: these mutants at once, each of which is seen by itself, but not by the simulator.
    #[serde(default)]
    both: Vec<String>,
    /// Families of runs that look for it, in this order.
    #[serde(default = "swarm")]
    families: Vec<String>,
    /// Packages whose tests look for it where the simulator does not see it.
    #[serde(default)]
    suites: Vec<String>,
}

/// One place in the sources, and what stands there instead.
#[derive(Deserialize)]
struct Edit {
    file: String,
    find: String,
    replace: String,
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
    let place = Place::of(target);
    if !args.no_build {
        place.copy(root, &mutated)?;
    }
    if !args.no_build && !args.suites_only {
        place.build()?;
    }
    let chosen: Vec<(usize, &Mutant)> = list
        .iter()
        .enumerate()
        .filter(|(_, m)| args.only.is_empty() || args.only.iter().any(|only| m.name.contains(only)))
        .collect();
    let suites = place.suites(chosen.iter().flat_map(|(_, mutant)| &mutant.suites).collect())?;
    let mut rows = BTreeMap::new();
    let mut missed = 0;
    for (at, mutant) in chosen {
        let begun = Instant::now();
        let on = switched_on(&list, at)?;
        let found = match args.suites_only {
            true => None,
            false => hunt(&place.binary, &on, mutant, args.seeds)?,
        };
        let caught = match found {
            None => ask_suites(&suites, &on, mutant)?,
            caught => caught,
        };
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

/// What the environment says for a mutant to be on: its number, or those of the ones it is made of.
fn switched_on(list: &[Mutant], at: usize) -> Result<String> {
    let number = |name: &String| {
        let found = list.iter().position(|other| other.name == *name);
        found.with_context(|| format!("mutant {}: there is no {name}", list[at].name))
    };
    let mut numbers: Vec<usize> = list[at].both.iter().map(number).collect::<Result<_>>()?;
    if numbers.is_empty() {
        numbers.push(at);
    }
    Ok(numbers.iter().map(|at| (at + 1).to_string()).collect::<Vec<_>>().join(","))
}

/// The sources that change, with every mutant behind its switch.
fn mutate(root: &Path, list: &[Mutant]) -> Result<BTreeMap<String, String>> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for (number, mutant) in list.iter().enumerate() {
        let switch = format!("::protocol::mutant({})", number + 1);
        ensure!(
            mutant.edit.is_some() == mutant.both.is_empty(),
            "mutant {}: either `file`, `find` and `replace`, or `both`",
            mutant.name
        );
        switched_on(list, number)?;
        for Edit { file, find, replace } in mutant.edit.iter().chain(&mutant.also) {
            if !files.contains_key(file) {
                files.insert(file.clone(), fs::read_to_string(root.join(file))?);
            }
            let text = files.get_mut(file).expect("just read");
            let count = text.matches(find).count();
            ensure!(
                count == 1,
                "mutant {}: what it looks for is {count} times in {file}; mend {LIST}",
                mutant.name
            );
            ensure!(replace.contains(SWITCH), "mutant {}: `replace` has no {SWITCH}", mutant.name);
            *text = text.replace(find, &replace.replace(SWITCH, &switch));
        }
    }
    let library = "protocol/src/lib.rs";
    let mut text = fs::read_to_string(root.join(library))?;
    write!(
        text,
        r#"
/// Whether this mutant is on.
#[allow(clippy::all, clippy::disallowed_methods, clippy::disallowed_types)]
pub fn mutant(number: u32) -> bool {{
    static ON: std::sync::OnceLock<Vec<u32>> = std::sync::OnceLock::new();
    let told = || std::env::var("{VARIABLE}").unwrap_or_default();
    ON.get_or_init(|| told().split(',').filter_map(|n| n.parse().ok()).collect()).contains(&number)
}}
"#
    )?;
    files.insert(library.into(), text);
    Ok(files)
}

/// Where the copy of the sources lies, and what is built from it.
struct Place {
    copy: PathBuf,
    /// A folder of its own for what is built: cargo tells crates of one workspace apart by their place
    /// within it, and would take these for the real ones.
    built: PathBuf,
    binary: PathBuf,
}

impl Place {
    fn of(target: &Path) -> Self {
        let at = target.join("mutants");
        Self { copy: at.join("sources"), built: at.join("build"), binary: at.join("ashlar-sim") }
    }

    /// Copies the sources; files that did not change are left alone, so that little is built anew.
    fn copy(&self, root: &Path, mutated: &BTreeMap<String, String>) -> Result<()> {
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
            let to = self.copy.join(name);
            if fs::read(&to).ok().as_ref() != Some(&wanted) {
                fs::create_dir_all(to.parent().expect("within the copy"))?;
                fs::write(&to, wanted)?;
            }
        }
        Ok(())
    }

    /// Builds the simulator from the copy.
    fn build(&self) -> Result<()> {
        let build = ["build", "--quiet", "--package", "ashlar-tests", "--bin", "ashlar-sim"];
        let status = self.cargo(&build).status()?;
        ensure!(status.success(), "the mutants do not build; their sources are in {}", self.copy.display());
        fs::copy(self.built.join("sim/ashlar-sim"), &self.binary)?;
        Ok(())
    }

    fn cargo(&self, args: &[&str]) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(args).args(["--profile", "sim"]).current_dir(&self.copy);
        cargo.env("CARGO_TARGET_DIR", &self.built);
        cargo
    }

    /// Builds the tests of these packages.
    fn suites(&self, packages: BTreeSet<&String>) -> Result<BTreeMap<String, Vec<Suite>>> {
        let mut suites = BTreeMap::new();
        for package in packages {
            let build = ["test", "--no-run", "--quiet", "--message-format=json", "--package", package];
            let output = self.cargo(&build).stderr(std::process::Stdio::inherit()).output()?;
            ensure!(output.status.success(), "the tests of {package} do not build with the mutants in");
            let told = String::from_utf8(output.stdout)?;
            let told = told.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            suites.insert(package.clone(), told.filter_map(Suite::of).collect());
        }
        Ok(suites)
    }
}

/// A test binary, and the folder of its package, in which it must run.
struct Suite {
    binary: PathBuf,
    dir: PathBuf,
}

impl Suite {
    fn of(message: serde_json::Value) -> Option<Self> {
        let binary = message["executable"].as_str()?.into();
        let dir = Path::new(message["manifest_path"].as_str()?).parent()?.into();
        Some(Self { binary, dir })
    }

    /// The first test that fails with this mutant.
    fn failing(&self, on: &str) -> Result<Option<String>> {
        let output = Command::new(&self.binary)
            .current_dir(&self.dir)
            .env(VARIABLE, on)
            .envs(MODEL_SEEDS)
            .output()
            .with_context(|| format!("cannot run {}", self.binary.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let failed = text.lines().find_map(|l| l.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
        Ok(match failed {
            Some(test) => Some(test.to_owned()),
            None => (!output.status.success()).then(|| "abort".to_owned()),
        })
    }
}

/// Whether tests of the crates see a mutant.
fn ask_suites(suites: &BTreeMap<String, Vec<Suite>>, on: &str, mutant: &Mutant) -> Result<Option<Caught>> {
    for package in &mutant.suites {
        for suite in suites.get(package).into_iter().flatten() {
            if let Some(test) = suite.failing(on)? {
                let family = format!("tests of `{package}`");
                return Ok(Some(Caught { family, seeds: None, checker: format!("`{test}`") }));
            }
        }
    }
    Ok(None)
}

struct Caught {
    family: String,
    /// `None`: by a test that stands by itself.
    seeds: Option<u64>,
    checker: String,
}

/// Looks for a mutant, seed by seed.
fn hunt(binary: &Path, on: &str, mutant: &Mutant, seeds: u64) -> Result<Option<Caught>> {
    let mut tried = 0;
    for family in &mutant.families {
        let seeds = seeds.to_string();
        let mut run = Command::new(binary);
        run.args(["--family", family, "--seeds", &seeds]).env(VARIABLE, on);
        let output = run.output().with_context(|| format!("cannot run {}", binary.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let failed = text.lines().find_map(|line| line.strip_prefix("seed ")?.split_once(" FAILED: "));
        match failed {
            Some((seed, why)) => {
                let checker = why.split(':').next().unwrap_or(why).to_owned();
                return Ok(Some(Caught {
                    family: family.clone(),
                    seeds: Some(tried + seed.parse::<u64>()?),
                    checker,
                }));
            }
            None if !output.status.success() => {
                let seeds = Some(tried + 1);
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
            let seeds = seeds.map_or("-".to_owned(), |seeds| seeds.to_string());
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
