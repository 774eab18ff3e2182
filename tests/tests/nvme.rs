//! Linux's own NVMe/TCP initiator and nvme-cli, in a virtual machine, against a dev cluster.
//!
//! Hazards: all that an initiator nobody here wrote may think of the target; `tests/interop/guest/nvme.sh` has the checks.

use anyhow::{Context, ensure};
use ashlar_tests::cluster::{DevCluster, wait_until, with_cluster};
use ashlar_tests::tools::{skip, tell_checks};
use ashlar_tests::vm::{Guest, HOST_ADDRESS, image};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::time::Duration;

/// Emulated machines are slow, and this one may share its cores with a build.
const LIMIT: Duration = Duration::from_secs(540);
/// Longer than the guest's keep alive timer, the target's grace and its clock's tick.
const SILENCE: Duration = Duration::from_secs(9);

#[test]
fn a_stock_kernel_attaches_and_loses_nothing_when_a_target_dies() {
    let image = match image() {
        Ok(image) => image,
        Err(reason) => return skip(&format!("{reason:#}")),
    };
    let cluster = DevCluster::start_with("256M", |options| {
        let extra = ["--block-size", "512", "--advertise", HOST_ADDRESS, "--shards", "2"];
        options.extra = extra.map(str::to_owned).to_vec();
    });
    with_cluster(cluster, |cluster| {
        cluster.ashlar(&["volume", "create", "files", "--size", "64M", "--block-size", "4096"]).ok()?;
        cluster.ashlar(&["export", "add", "files", "--protocol", "nvme"]).ok()?;
        let args = arguments(cluster)?;
        let left = Guest::start(&image, "nvme.sh", &args, LIMIT)?.serve(|guest, words| {
            let told = serve(cluster, guest, words);
            eprintln!("host {}: {told:?}", words.join(" "));
            told
        })?;
        ensure!(left.status == 0, "the guest's script ended with {}:\n{}", left.status, left.output);
        cluster.check_replicas()?;
        let checks: Vec<&str> = left.output.lines().filter(|line| line.starts_with("ok ")).collect();
        let count = format!("{} checks by Linux's own initiator passed", checks.len());
        tell_checks("nvme", checks.into_iter().chain([count.as_str()]));
        Ok(())
    });
}

/// What the guest's script takes.
fn arguments(cluster: &DevCluster) -> anyhow::Result<Vec<String>> {
    let file = cluster.dir().join("dev.json");
    let dev: Value = serde_json::from_slice(&std::fs::read(file)?)?;
    let paths = dev["volumes"][0]["nvme"].as_array().context("dev.json has no NVMe paths")?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text in dev.json");
    let nqn = text(&paths[0]["nqn"])?;
    let other = nqn.strip_suffix("vol0").context("an NQN that does not end with its volume")?;
    let discovery = text(&dev["discovery"][0]["trsvcid"])?;
    let mut args = vec![HOST_ADDRESS.to_owned(), discovery, nqn.clone(), format!("{other}files")];
    for path in paths {
        args.push(text(&path["trsvcid"])?);
    }
    Ok(args)
}

/// What the guest asks for.
fn serve(cluster: &DevCluster, guest: &Guest, words: &[&str]) -> anyhow::Result<String> {
    match words {
        ["resize", size] => Ok(cluster.ashlar(&["volume", "resize", "vol0", "--size", size]).ok()?.stdout),
        ["ls", host] => {
            let seen = hosts(cluster, host)?;
            let two = |attached: &Value| {
                attached["queues"] == 2
                    && attached["header_digest"] == false
                    && attached["data_digest"] == false
            };
            ensure!(seen.len() == 1 && two(&seen[0]), "`export ls` shows {seen:?}");
            Ok(seen[0].to_string())
        }
        ["freeze", host] => {
            guest.signal(Signal::SIGSTOP)?;
            std::thread::sleep(SILENCE);
            let gone = wait_until(Duration::from_secs(10), || {
                let seen = hosts(cluster, host)?;
                ensure!(seen.is_empty(), "a silent host is still attached: {seen:?}");
                Ok(())
            });
            guest.signal(Signal::SIGCONT)?;
            gone.map(|()| String::new())
        }
        ["allow", host] => {
            let add = ["export", "add", "vol0", "--protocol", "nvme", "--allow-host", host];
            Ok(cluster.ashlar(&add).ok()?.stdout)
        }
        ["attach", host] => {
            let attach = ["volume", "attach", "vol0", "--holder", host, "--exclusive", "--take-over"];
            Ok(cluster.ashlar(&attach).ok()?.stdout)
        }
        ["detach", host] => Ok(cluster.ashlar(&["volume", "detach", "vol0", "--holder", host]).ok()?.stdout),
        [order @ ("drain" | "undrain"), target] => {
            Ok(cluster.ashlar(&["target", order, target]).ok()?.stdout)
        }
        ["kill", target] => {
            // Else its supervisor would start it again at once.
            cluster.signal_supervisor(Signal::SIGSTOP)?;
            Ok(format!("killed {}", cluster.signal_target(target.parse()?, Signal::SIGKILL)?))
        }
        ["restart", _] => cluster.signal_supervisor(Signal::SIGCONT).map(|()| String::new()),
        _ => anyhow::bail!("nobody here knows {words:?}"),
    }
}

/// What `export ls` tells of a host's connections to `vol0`.
fn hosts(cluster: &DevCluster, nqn: &str) -> anyhow::Result<Vec<Value>> {
    let ran = cluster.ashlar(&["export", "ls", "-o", "json"]).ok()?;
    let exports: Value = serde_json::from_str(&ran.stdout)?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let of_vol0 = list(&exports).into_iter().filter(|e| e["volume"] == "vol0" && e["protocol"] == "nvme");
    let places = of_vol0.flat_map(|export| list(&export["places"]));
    Ok(places.flat_map(|place| list(&place["hosts"])).filter(|host| host["nqn"] == nqn).collect())
}
