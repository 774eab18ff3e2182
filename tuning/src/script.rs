//! What apply would do, as a plain shell script that an operator can read, keep and change.

use crate::look::Finding;
use crate::model::{Bound, Profile};

/// The script's head: what it does, and how a value is set.
const HEAD: &str = r#"# Unlike that command, it keeps no journal: note what it prints to put things back.
set -u
failed=0

# set_value FILE VALUE
set_value() {
	[ -e "$1" ] || { echo "skipped, not there: $1"; return; }
	old=$(cat "$1")
	if printf '%s' "$2" >"$1" 2>/dev/null; then echo "$1: $old -> $2"
	else echo "refused: $1"; failed=1; fi
}

# at_least FILE NUMBER, at_most FILE NUMBER: looked at when the script runs
at_least() { [ "$(cat "$1" 2>/dev/null || echo 0)" -ge "$2" ] || set_value "$1" "$2"; }
at_most() { [ "$(cat "$1" 2>/dev/null || echo 0)" -le "$2" ] || set_value "$1" "$2"; }
"#;

/// The script of a [plan](crate::plan). It sets what is there and differs, shows the old values, and
/// undoes nothing.
pub fn script(plan: &[Finding], profile: Profile) -> String {
    let mut text = format!(
        "#!/bin/sh\n# What `ashlar tune apply --profile {}` would do on this machine.\n{HEAD}",
        profile.word()
    );
    let mut last = "";
    for finding in plan {
        let Some(change) = &finding.item.change else { continue };
        if finding.tuner != last {
            last = finding.tuner;
            text += &format!("\n# {last}\n");
        }
        let (function, value) = match change.bound {
            Some(Bound::AtLeast(least)) => ("at_least", least.to_string()),
            Some(Bound::AtMost(most)) => ("at_most", most.to_string()),
            Some(Bound::AsItIs) | None => ("set_value", change.new.clone()),
        };
        text += &format!("{function} {} {}\n", quoted(&change.path), quoted(&value));
    }
    text + "\nexit $failed\n"
}

/// In single quotes, as a shell takes it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MemTree;
    use crate::plan::plan;
    use crate::tree::Tree;
    use crate::tuners;
    use std::path::Path;
    use std::process::Command;

    #[test]
    fn a_value_cannot_leave_its_quotes() {
        assert_eq!(quoted("a'; rm -r /"), "'a'\\''; rm -r /'");
    }

    /// Runs a script over the files beneath `root`, with what the kernel does to them when the
    /// scheduler changes as a line of its own.
    fn run(script: &str, root: &Path, reset: &str) -> anyhow::Result<String> {
        let mut text = String::new();
        for line in script.lines() {
            text += &line.replace("'/", &format!("'{}/", root.display()));
            text += "\n";
            if line.starts_with("set_value") && line.contains("/scheduler'") {
                text += &reset.replace("ROOT", &root.display().to_string());
                text += "\n";
            }
        }
        let output = Command::new("sh").arg("-c").arg(text).output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    #[test]
    fn a_depth_that_a_new_scheduler_resets_is_set_after_it() -> anyhow::Result<()> {
        let text = "fact disk = 8:0\n/sys/dev/block/8:0 -> /sys/block/sda\n/sys/block/sda/dev = 8:0\n\
                    /sys/block/sda/mq/0/nr_tags = 1024\n/sys/block/sda/queue/rotational = 1\n\
                    /sys/block/sda/queue/scheduler = [none] mq-deadline\n/sys/block/sda/queue/nr_requests = 1024\n";
        let (tree, facts) = MemTree::parse(text).map_err(anyhow::Error::msg)?;
        let names = ["scheduler", "nr-requests"].map(|name| tuners::find(name).expect("a tuner"));
        let plan = plan(&tree, &facts, Profile::Throughput, &names, false);
        let planned: Vec<_> = plan.iter().map(|f| (f.tuner, f.item.found.as_str())).collect();
        assert_eq!(planned, [("scheduler", "none"), ("nr-requests", "what the kernel makes of it then")]);
        // The kernel's default for a scheduler is 256; a larger one is not lowered.
        for (after, wanted) in [("256", "512"), ("700", "700")] {
            let root = tempfile::tempdir()?;
            for path in ["/sys/block/sda/queue/scheduler", "/sys/block/sda/queue/nr_requests"] {
                let file = root.path().join(&path[1..]);
                std::fs::create_dir_all(file.parent().expect("a folder"))?;
                std::fs::write(file, tree.read(path)?)?;
            }
            let reset = format!("printf {after} > ROOT/sys/block/sda/queue/nr_requests");
            run(&script(&plan, Profile::Throughput), root.path(), &reset)?;
            let depth = std::fs::read_to_string(root.path().join("sys/block/sda/queue/nr_requests"))?;
            assert_eq!(depth, wanted);
        }
        Ok(())
    }
}
