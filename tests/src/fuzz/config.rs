//! `target.toml` as an operator, or a program of another release, may have written it.

use super::{Dice, Target};
use target_daemon::config::TargetConfig;

/// The target's configuration.
pub const TARGET: Target = Target {
    name: "config",
    about: "target.toml",
    bytes_max: 4 << 10,
    memory_max: |bytes| (512 << 10) + 2000 * bytes,
    make,
    run: |input| {
        let Ok(text) = std::str::from_utf8(input) else { return };
        match TargetConfig::parse(text, "target.toml") {
            Ok(config) => {
                let again =
                    TargetConfig::parse(&config.to_toml(), "again").expect("what is accepted reads back");
                assert_eq!(again, config);
            }
            Err(problem) => {
                assert!(problem.what.starts_with("target.toml"), "{problem:?}");
                assert!(!problem.cause.is_empty() && !problem.fix.is_empty(), "{problem:?}");
                assert!(!problem.what.contains('\n') && !problem.fix.contains('\n'), "{problem:?}");
            }
        }
    },
};

fn make(dice: &mut Dice) -> Vec<u8> {
    let mut text = String::new();
    let line = |text: &mut String, dice: &mut Dice, key: &str, values: &[&str]| {
        if dice.percent(95) {
            let number = dice.odd().to_string();
            let value = if dice.percent(5) { &number } else { dice.pick(values) };
            text.push_str(&format!("{key} = {value}\n"));
        }
    };
    line(&mut text, dice, "id", &["1", "7"]);
    line(&mut text, dice, "dir", &["\"t\"", "\"\""]);
    line(&mut text, dice, "mds", &["[\"127.0.0.1:7400\"]", "[\"a:1\", \"b:2\"]", "[]"]);
    line(&mut text, dice, "capacity_bytes", &["4294967296", "16777216"]);
    for (key, values) in [
        ("shards", &["1", "2", "65535"][..]),
        ("cpus", &["[0]", "[0, 1]"]),
        ("arena_bytes", &["67108864", "4194304"]),
        ("host", &["\"bare\"", "\"glommio\"", "\"smol\""]),
        ("spin_us_max", &["0", "50"]),
        ("catch_up_bytes_s", &["0", "1048576"]),
        ("advertise", &["\"10.0.0.1\"", "\"::1\"", "\"host\""]),
    ] {
        if dice.percent(30) {
            line(&mut text, dice, key, values);
        }
    }
    text.push_str("[listen]\n");
    line(&mut text, dice, "peer", &["[\"127.0.0.1:7501\"]", "[\"127.0.0.1:1\", \"[::1]:2\"]"]);
    line(&mut text, dice, "admin", &["\"127.0.0.1:7601\""]);
    line(&mut text, dice, "metrics", &["\"127.0.0.1:7701\"", "\"[::]:0\""]);
    for (key, value) in
        [("nbd", "\"0.0.0.0:10809\""), ("nbd_unix", "\"/tmp/s\""), ("nvme", "\"0.0.0.0:4420\"")]
    {
        if dice.percent(40) {
            line(&mut text, dice, key, &[value]);
        }
    }
    for (table, key, value) in [
        ("log", "segments", "8"),
        ("log", "segment_bytes", "1048576"),
        ("raft", "election_timeout_ms", "500"),
        ("export", "io_timeout_s", "30"),
    ] {
        if dice.percent(30) && !text.contains(&format!("[{table}]")) {
            text.push_str(&format!("[{table}]\n"));
            line(&mut text, dice, key, &[value]);
        }
    }
    text.into_bytes()
}
