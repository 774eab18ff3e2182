//! The READY block: what runs, and lines to paste.

use super::record::{DevRecord, NvmeRecord};
use super::{Plan, VOLUME};
use crate::size::Size;

/// What is printed once the cluster serves.
pub fn block(plan: &Plan, record: &DevRecord) -> String {
    let Some(volume) = record.volumes.iter().find(|volume| volume.name == VOLUME) else {
        return "READY".into();
    };
    let (tcp, unix) = (&volume.nbd[0], &volume.nbd_unix[0]);
    let dir = quoted(&plan.layout.root().display().to_string());
    let pids: Vec<_> =
        record.targets.iter().map(|target| format!("target {} = pid {}", target.id, target.pid)).collect();
    let victim = &record.targets[0];
    format!(
        "\
READY: {volume_name} ({size}, blocks of {block} bytes) on {targets} {of_targets}, {replicas}{memory}
  in {dir}; mds = pid {mds_pid} at {mds}; {pids}

  look          nbdinfo {unix_quoted}
                {ashlar} status --dir {dir}
  measure       fio --name=try --ioengine=nbd --uri={unix_quoted} --rw=randrw --bs=4k --iodepth=32 --time_based --runtime=10
  copy          qemu-img convert -n -f raw -O raw IMAGE {unix_quoted}
  attach        sudo modprobe nbd && sudo nbd-client {host} {port} /dev/nbd0 -N {volume_name} -b {block}
  or by NVMe    sudo modprobe nvme-tcp && sudo {discover}
{nvme}  break         kill -9 {victim}    (target {victim_id}; IO goes on, {restart})
  check         {ashlar} volume check {volume_name} --dir {dir}

  every target serves the same volume: {all}
  stop with Ctrl-C; {after}",
        ashlar = quoted(&own_name()),
        volume_name = volume.name,
        size = Size(volume.bytes),
        block = volume.block_bytes,
        targets = record.targets.len(),
        of_targets = if record.targets.len() == 1 { "target" } else { "targets" },
        replicas = match plan.shape.replicas {
            1 => "1 replica".to_owned(),
            many => format!("{many} replicas"),
        },
        memory = if plan.shape.memory { ", all in memory" } else { "" },
        after = match plan.shape.memory {
            true => "then all data is lost".to_owned(),
            false => format!("start again with --dir {dir}: same data, same addresses"),
        },
        mds_pid = record.mds.pid,
        mds = record.mds.endpoint,
        pids = pids.join(", "),
        unix_quoted = quoted(unix),
        host = host_of(tcp),
        port = plan.shape.targets[0].nbd,
        discover = record.discovery.first().map_or("nvme discover", |d| &d.command),
        nvme = volume.nvme.iter().map(connect).collect::<String>(),
        victim = victim.pid,
        victim_id = victim.id,
        restart = if plan.restart { "it is restarted" } else { "it stays dead" },
        all = volume.nbd.join(" "),
    )
}

/// How a shell here calls this program: by its name where PATH leads to it, else by its path, seen from here if below.
fn own_name() -> String {
    const NAME: &str = "ashlar";
    let Ok(own) = std::env::current_exe() else { return NAME.into() };
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|dir| dir.join(NAME)).find(|file| file.is_file());
    if found.and_then(|file| file.canonicalize().ok()).is_some_and(|file| file == own) {
        return NAME.into();
    }
    let here = std::env::current_dir().unwrap_or_default();
    match own.strip_prefix(&here) {
        Ok(below) => format!("./{}", below.display()),
        Err(_) => own.display().to_string(),
    }
}

fn connect(path: &NvmeRecord) -> String {
    format!("                sudo {}\n", path.command)
}

fn host_of(uri: &str) -> &str {
    let address = uri.trim_start_matches("nbd://").split('/').next().unwrap_or_default();
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// As a shell takes it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/:=".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_quoted_for_the_shell_since_it_holds_a_question_mark() {
        assert_eq!(quoted("nbd+unix:///v?socket=/s"), "'nbd+unix:///v?socket=/s'");
        assert_eq!(quoted("/a/b"), "/a/b");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn the_host_of_a_uri() {
        assert_eq!(host_of("nbd://10.0.2.2:99/vol0"), "10.0.2.2");
        assert_eq!(host_of("nbd://[::1]:99/vol0"), "[::1]");
    }
}
