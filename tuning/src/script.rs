//! What apply would do, as a plain shell script that an operator can read, keep and change.

use crate::look::Finding;
use crate::model::Profile;

/// The script. It sets what is there and differs, shows the old values, and undoes nothing.
pub fn script(findings: &[Finding], profile: Profile) -> String {
    let mut text = format!(
        "#!/bin/sh\n# What `ashlar tune apply --profile {}` would do on this machine.\n\
         # Unlike that command, it keeps no journal: note what it prints to put things back.\n\
         set -u\nfailed=0\n\n\
         # set_value FILE VALUE\n\
         set_value() {{\n\
         \t[ -e \"$1\" ] || {{ echo \"skipped, not there: $1\"; return; }}\n\
         \told=$(cat \"$1\")\n\
         \tif printf '%s' \"$2\" >\"$1\" 2>/dev/null; then echo \"$1: $old -> $2\"\n\
         \telse echo \"refused: $1\"; failed=1; fi\n\
         }}\n",
        profile.word()
    );
    let mut last = "";
    for finding in findings {
        let Some(change) = &finding.item.change else { continue };
        if finding.tuner != last {
            last = finding.tuner;
            text += &format!("\n# {last}\n");
        }
        text += &format!("set_value {} {}\n", quoted(&change.path), quoted(&change.new));
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

    #[test]
    fn a_value_cannot_leave_its_quotes() {
        assert_eq!(quoted("a'; rm -r /"), "'a'\\''; rm -r /'");
    }
}
