//! The command line of `ashlar tune`: what it takes, what it does, how it ends.

use crate::auto::{self, AutoArgs};
use crate::cpus::Cpus;
use crate::engine::{Applied, Engine, Moment, UndoLine};
use crate::facts::Facts;
use crate::fixture::Recorder;
use crate::journal::{self, FileJournal};
use crate::look::{Finding, items, look};
use crate::machine::Machine;
use crate::model::{Item, Mode, Profile, Tuner};
use crate::plan::plan;
use crate::probe::{self, ProbeArgs};
use crate::render::{self, ApplyLine, Style};
use crate::tree::{HostTree, Tree};
use crate::{docs_page, script, tuners};
use anyhow::{Context, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done.
    Ok,
    /// Done, and what it checked does not hold.
    CheckFailed,
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Commands on the machine's set-up.
#[derive(Debug, Subcommand)]
pub enum TuneCommand {
    /// What can be tuned, or looked at.
    List(ListArgs),
    /// Look, change nothing; exit code 3 when something required does not hold.
    #[command(after_help = "Example: ashlar tune check --config target.toml\n\
                            Marks: ok, FAIL (required), warn (recommended), hint (optional), ? (cannot be read)")]
    Check(CheckArgs),
    /// Set what differs, after its old value is safe in a journal.
    #[command(after_help = "Example: sudo ashlar tune apply --profile latency --config target.toml\n\
                            Nothing outlives a restart of the machine; ashlar-tune.service applies it again.")]
    Apply(ApplyArgs),
    /// Put back what was set, where it is still ours.
    #[command(after_help = "What others have changed since is left alone, and said.\n\
                            Example: sudo ashlar tune undo --dry-run")]
    Undo(UndoArgs),
    /// Print what apply would do as a shell script.
    Script(ScriptArgs),
    /// What a tuner does, why, at what risk, and who recommends it.
    Explain(ExplainArgs),
    /// Measure a disk, and write device.toml for the target.
    #[command(after_help = "Example: ashlar tune probe /srv/ashlar/target-1\n\
                            A folder is measured by a file of its own, which is removed. A device is only read, \
                            unless --destroy is given.")]
    Probe(ProbeArgs),
    /// Try the target's own knobs, with `ashlar bench` as the judge.
    Auto(AutoArgs),
    /// Print docs/tuning.md.
    #[command(hide = true)]
    Docs,
    /// Print all that the tuners read of this machine, as a fixture for their tests.
    #[command(hide = true)]
    Capture(MachineArgs),
}

fn names() -> PossibleValuesParser {
    tuners::all().iter().map(|tuner| tuner.name).collect::<Vec<_>>().into()
}

/// What the machine is looked at for.
#[derive(Args, Debug, Clone)]
pub struct MachineArgs {
    /// What the machine is made ready for.
    #[arg(long, value_enum, default_value_t)]
    profile: Profile,
    /// A folder on the disk that a target uses or shall use, or a device [default: .]
    #[arg(long, value_name = "DIR|DEV")]
    disk: Option<PathBuf>,
    /// The processors that shards are pinned to, such as 2-5; interrupts are kept off them.
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    cpus: Option<Cpus>,
    /// Shards on this machine [default: 1]
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// The network card of the storage network [default: all that are up]
    #[arg(long, value_name = "NAME")]
    nic: Option<String>,
    /// Take disk, processors and shards from a target's configuration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What `tune list` takes.
#[derive(Args, Debug)]
pub struct ListArgs {
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    /// How to print.
    output: Output,
}

/// What `tune check` takes.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Only these [default: all]
    #[arg(value_name = "TUNER", value_parser = names())]
    tuners: Vec<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// Also what is not there on this machine, or left as it is.
    #[arg(long)]
    all: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// Where the old values are kept.
#[derive(Args, Debug)]
pub struct JournalArgs {
    /// Where the old values are kept.
    #[arg(long, value_name = "FILE", default_value = journal::PATH)]
    journal: PathBuf,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What `tune apply` takes.
#[derive(Args, Debug)]
pub struct ApplyArgs {
    /// Only these [default: all but those that must be named]
    #[arg(value_name = "TUNER", value_parser = names())]
    tuners: Vec<String>,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    journal: JournalArgs,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// What `tune undo` takes.
#[derive(Args, Debug)]
pub struct UndoArgs {
    /// Only these [default: all]
    #[arg(value_name = "TUNER", value_parser = names())]
    tuners: Vec<String>,
    #[command(flatten)]
    journal: JournalArgs,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// What `tune script` takes.
#[derive(Args, Debug)]
pub struct ScriptArgs {
    /// Only these [default: all but those that must be named]
    #[arg(value_name = "TUNER", value_parser = names())]
    tuners: Vec<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// How to print; as JSON, the changes instead of the script.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// What `tune explain` takes.
#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Which.
    #[arg(value_name = "TUNER", value_parser = names())]
    tuner: String,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// Runs the command.
///
/// # Errors
/// What was asked for could not be done; the message says why, and what to do.
pub fn run(command: TuneCommand) -> anyhow::Result<Exit> {
    match command {
        TuneCommand::List(args) => list(&args),
        TuneCommand::Check(args) => check(&args),
        TuneCommand::Apply(args) => apply(&args),
        TuneCommand::Undo(args) => undo(&args),
        TuneCommand::Script(args) => script(&args),
        TuneCommand::Explain(args) => explain(&args),
        TuneCommand::Probe(args) => probe::run(&args),
        TuneCommand::Auto(args) => auto::run(&args),
        TuneCommand::Docs => print(&docs_page(&tuners::all())).map(|()| Exit::Ok),
        TuneCommand::Capture(args) => capture(&args),
    }
}

/// A reader that went away (`ashlar tune list | head -1`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot print"),
        _ => Ok(()),
    }
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    Cpus::parse(text)
        .filter(|cpus| !cpus.is_empty())
        .ok_or_else(|| format!("`{text}` is no list such as 0-3,8"))
}

/// What of a target's configuration matters here.
#[derive(serde::Deserialize)]
struct TargetToml {
    dir: PathBuf,
    #[serde(default)]
    shards: Option<u32>,
    #[serde(default)]
    cpus: Vec<u32>,
}

/// The facts that the command line asks for.
fn facts(args: &MachineArgs, tree: &dyn Tree) -> anyhow::Result<Facts> {
    let config = match &args.config {
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            let config: TargetToml =
                toml::from_str(&text).with_context(|| format!("{} is no target's", path.display()))?;
            Some(config)
        }
        None => None,
    };
    let disk = args.disk.clone().or_else(|| config.as_ref().map(|c| c.dir.clone())).unwrap_or(".".into());
    ensure!(disk.exists(), "{} is not there; name a folder or device by --disk", disk.display());
    let mut facts = Facts::read(tree, &disk, true);
    let from_config = config.as_ref().map(|c| Cpus(c.cpus.iter().copied().collect()));
    facts.cpus = args.cpus.clone().or(from_config).unwrap_or_default();
    facts.shards = args.shards.or(config.and_then(|c| c.shards)).unwrap_or(1);
    facts.nic.clone_from(&args.nic);
    if let Some(nic) = &facts.nic {
        ensure!(tree.exists(&format!("/sys/class/net/{nic}")), "there is no network card {nic}");
    }
    Ok(facts)
}

/// The tuners named, in the order of applying; all when none is.
fn selected(names: &[String]) -> Vec<&'static Tuner> {
    let wanted = |tuner: &&Tuner| names.is_empty() || names.iter().any(|name| name == tuner.name);
    tuners::all().into_iter().filter(wanted).collect()
}

#[derive(Serialize)]
struct Described<'a> {
    name: &'a str,
    family: &'a str,
    mode: Mode,
    severity: crate::model::Severity,
    what: &'a str,
    why: &'a str,
    risk: &'a str,
    places: &'a [&'a str],
    default: &'a str,
    undo: &'a str,
    reboot: &'a str,
    sources: &'a [&'a str],
}

fn described(tuner: &'static Tuner) -> Described<'static> {
    let Tuner { name, family, mode, severity, what, why, risk, places, default, reboot, sources, .. } =
        *tuner;
    let undo = tuner.undo();
    Described { name, family, mode, severity, what, why, risk, places, default, undo, reboot, sources }
}

fn list(args: &ListArgs) -> anyhow::Result<Exit> {
    let all = tuners::all();
    match args.output {
        Output::Text => print(&render::list(Style::of_stdout(), &all))?,
        Output::Json => {
            let all: Vec<_> = all.into_iter().map(described).collect();
            print(&serde_json::to_string_pretty(&all)?)?;
        }
    }
    Ok(Exit::Ok)
}

fn explain(args: &ExplainArgs) -> anyhow::Result<Exit> {
    let tuner = tuners::find(&args.tuner).context("no such tuner; see `ashlar tune list`")?;
    match args.output {
        Output::Text => print(&render::explain(tuner))?,
        Output::Json => print(&serde_json::to_string_pretty(&described(tuner))?)?,
    }
    Ok(Exit::Ok)
}

#[derive(Serialize)]
struct CheckReport<'a> {
    profile: Profile,
    failed: bool,
    findings: &'a [Finding],
}

fn check(args: &CheckArgs) -> anyhow::Result<Exit> {
    let tree = HostTree::default();
    let facts = facts(&args.machine, &tree)?;
    let machine = Machine { tree: &tree, facts: &facts, profile: args.machine.profile };
    let findings = look(&selected(&args.tuners), &machine, !args.tuners.is_empty());
    let failed = findings.iter().any(Finding::is_failure);
    match args.output {
        Output::Text => {
            print(&render::findings(Style::of_stdout(), &findings, args.all || !args.tuners.is_empty()))?
        }
        Output::Json => {
            let report = CheckReport { profile: args.machine.profile, failed, findings: &findings };
            print(&serde_json::to_string_pretty(&report)?)?;
        }
    }
    Ok(if failed { Exit::CheckFailed } else { Exit::Ok })
}

/// One change, as JSON has it.
#[derive(Debug, Serialize)]
struct Line {
    tuner: &'static str,
    object: String,
    path: String,
    old: String,
    new: String,
    #[serde(flatten)]
    applied: Option<Applied>,
}

#[derive(Serialize)]
struct ApplyReport<'a> {
    profile: Profile,
    dry_run: bool,
    recovered: &'a [UndoLine],
    changes: &'a [Line],
}

fn apply(args: &ApplyArgs) -> anyhow::Result<Exit> {
    let mut tree = HostTree::default();
    let facts = facts(&args.machine, &tree)?;
    let (profile, named) = (args.machine.profile, !args.tuners.is_empty());
    let chosen = selected(&args.tuners);
    let (mut lines, mut recovered) = (Vec::new(), Vec::new());
    if args.journal.dry_run {
        let plan = plan(&tree, &facts, profile, &chosen, named);
        lines.extend(plan.into_iter().filter_map(|f| line_of(f.tuner, f.item, None)));
    } else {
        ensure_root("apply")?;
        let mut journal = open_journal(&args.journal)?;
        let now = moment(&tree)?;
        recovered = Engine { tree: &mut tree, journal: &mut journal, now: now.clone() }.recover()?;
        for tuner in chosen.iter().filter(|tuner| tuner.mode != Mode::Report) {
            // Looked at one by one: a new scheduler has another queue.
            let wanted = items(tuner, &Machine { tree: &tree, facts: &facts, profile }, named);
            for item in wanted {
                let Some(change) = &item.change else { continue };
                let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now.clone() };
                let applied = engine.apply(tuner.name, &item.object, change)?;
                lines.extend(line_of(tuner.name, item, Some(applied)));
            }
        }
    }
    let partly = lines.iter().any(|line| matches!(line.applied, Some(Applied::Differs { .. })));
    match args.output {
        Output::Json => {
            let dry_run = args.journal.dry_run;
            let report = ApplyReport { profile, dry_run, recovered: &recovered, changes: &lines };
            print(&serde_json::to_string_pretty(&report)?)?;
        }
        Output::Text => {
            let style = Style::of_stdout();
            if !recovered.is_empty() {
                print(&format!(
                    "settled after an interruption:\n{}",
                    render::undone(style, &recovered, false)
                ))?;
            }
            let shown: Vec<_> = lines.iter().map(shown).collect();
            print(&render::applied(style, &shown))?;
        }
    }
    Ok(if partly { Exit::CheckFailed } else { Exit::Ok })
}

fn line_of(tuner: &'static str, item: Item, applied: Option<Applied>) -> Option<Line> {
    let change = item.change?;
    Some(Line { tuner, object: item.object, path: change.path, old: item.found, new: change.new, applied })
}

fn shown(line: &Line) -> ApplyLine<'_> {
    let Line { tuner, object, old, new, applied, .. } = line;
    ApplyLine { tuner, object, old, new, applied: applied.as_ref() }
}

fn undo(args: &UndoArgs) -> anyhow::Result<Exit> {
    let mut tree = HostTree::default();
    let now = moment(&tree)?;
    let lines = if args.journal.dry_run {
        let mut peeked =
            Peeked(FileJournal::peek(&args.journal.journal).with_context(unreadable(&args.journal))?);
        Engine { tree: &mut tree, journal: &mut peeked, now }.would_undo(&args.tuners)
    } else {
        ensure_root("undo")?;
        let mut journal = open_journal(&args.journal)?;
        Engine { tree: &mut tree, journal: &mut journal, now }.undo(&args.tuners)?
    };
    match args.output {
        Output::Text => print(&render::undone(Style::of_stdout(), &lines, args.journal.dry_run))?,
        Output::Json => print(&serde_json::to_string_pretty(&lines)?)?,
    }
    Ok(Exit::Ok)
}

/// A journal that was only read.
struct Peeked(Vec<journal::Record>);

impl journal::Journal for Peeked {
    fn append(&mut self, _: &journal::Record) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn records(&self) -> &[journal::Record] {
        &self.0
    }
}

fn unreadable(args: &JournalArgs) -> impl FnOnce() -> String {
    let path = args.journal.display().to_string();
    move || format!("cannot use the journal {path}")
}

fn open_journal(args: &JournalArgs) -> anyhow::Result<FileJournal> {
    FileJournal::open(&args.journal).with_context(unreadable(args))
}

fn ensure_root(what: &str) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "only root may change the machine: sudo ashlar tune {what} (--dry-run needs nobody's leave)"
    );
    Ok(())
}

fn moment(tree: &dyn Tree) -> anyhow::Result<Moment> {
    let boot =
        tree.read("/proc/sys/kernel/random/boot_id").context("the kernel does not tell its boot id")?;
    let time_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(Moment { boot, time_s })
}

fn script(args: &ScriptArgs) -> anyhow::Result<Exit> {
    let tree = HostTree::default();
    let facts = facts(&args.machine, &tree)?;
    let profile = args.machine.profile;
    let plan = plan(&tree, &facts, profile, &selected(&args.tuners), !args.tuners.is_empty());
    match args.output {
        Output::Text => print(&script::script(&plan, profile))?,
        Output::Json => {
            let lines = plan.into_iter().filter_map(|f| line_of(f.tuner, f.item, None));
            print(&serde_json::to_string_pretty(&lines.collect::<Vec<_>>())?)?;
        }
    }
    Ok(Exit::Ok)
}

fn capture(args: &MachineArgs) -> anyhow::Result<Exit> {
    let tree = HostTree::default();
    let facts = facts(args, &tree)?;
    let recorder = Recorder::new(&tree);
    for profile in Profile::ALL {
        let machine = Machine { tree: &recorder, facts: &facts, profile };
        look(&tuners::all(), &machine, true);
    }
    // What undo needs besides.
    let _ = recorder.read("/proc/sys/kernel/random/boot_id");
    print(&recorder.seen().render(&facts))?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches;

    fn parsed(line: &str) -> Result<TuneCommand, clap::Error> {
        let command = TuneCommand::augment_subcommands(clap::Command::new("tune"));
        command.clone().debug_assert();
        let words = std::iter::once("tune").chain(line.split_whitespace());
        TuneCommand::from_arg_matches(&command.try_get_matches_from(words)?)
    }

    #[test]
    fn commands_as_the_documents_write_them() {
        for line in [
            "list -o json",
            "check --config target.toml --all",
            "apply scheduler nomerges --profile throughput --disk /srv --cpus 2-5 --nic eth0 --dry-run",
            "undo --journal /tmp/j -o json",
            "script --profile conservative",
            "explain thp",
            "probe /srv --size 256M --seconds 0.5 --fio",
            "auto --trials 20",
            "docs",
        ] {
            parsed(line).unwrap_or_else(|error| panic!("tune {line}: {error}"));
        }
    }

    #[test]
    fn a_tuner_that_is_not_there_is_wrong_usage() {
        for line in ["apply sheduler", "explain", "check --cpus 3-1", "probe", "apply --profile fast"] {
            let error = parsed(line).err().unwrap_or_else(|| panic!("tune {line} was taken"));
            assert_eq!(error.exit_code(), 2, "tune {line}");
        }
    }

    #[test]
    fn the_order_of_applying_is_the_tables_and_not_the_command_lines() {
        let names = ["nr-requests".to_owned(), "scheduler".to_owned()];
        assert_eq!(selected(&names).iter().map(|t| t.name).collect::<Vec<_>>(), ["scheduler", "nr-requests"]);
    }
}
