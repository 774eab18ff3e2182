//! The configurations of a dev cluster's targets, written by the same types that read them.
//!
//! Written at each start, so that what the command line says now holds; what is fixed once a
//! target is formatted (its shards, its room) is kept from the file that is there.

use super::Plan;
use super::record::replace;
use super::shape::TargetPorts;
use crate::problem::Problem;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use target_daemon::config::{
    CATCH_UP_BYTES_S, CHECKSUM_BYTES, Export, Host, Listen, Log, Raft, Store, TargetConfig,
};
use target_daemon::identity::Identity;

/// Room for the volume and for as much again, at least this much. Disk space is taken only
/// a little ahead of what is written.
const CAPACITY_BYTES_MIN: u64 = 8 << 30;

/// Formats the targets that are new.
pub fn format_new(plan: &Plan) -> Result<(), Problem> {
    for id in 1..=plan.shape.targets.len() as u32 {
        let config = TargetConfig::load(&plan.layout.target_toml(id))?;
        if Identity::load(&config.dir)?.is_none() {
            target_daemon::format(&config)?;
        }
    }
    Ok(())
}

/// Writes `target-N/target.toml` of each target.
pub fn write_configs(plan: &Plan) -> Result<(), Problem> {
    for (id, ports) in (1..).zip(&plan.shape.targets) {
        let folder = plan.layout.target(id);
        std::fs::create_dir_all(&folder).map_err(Problem::io(format!("cannot make {}", folder.display())))?;
        let path = plan.layout.target_toml(id);
        let kept = if path.exists() { Some(TargetConfig::load(&path)?) } else { None };
        let config = config(plan, id, ports, kept)?;
        let text = format!("# Written by `ashlar dev`.\n{}", config.to_toml());
        replace(&path, &text).map_err(Problem::io(format!("cannot write {}", path.display())))?;
    }
    Ok(())
}

/// What was changed by hand in the file that is there stays, but for ids and addresses.
fn config(
    plan: &Plan,
    id: u32,
    ports: &TargetPorts,
    kept: Option<TargetConfig>,
) -> Result<TargetConfig, Problem> {
    let listen = listen(plan, id, ports)?;
    let mds = vec![plan.mds_endpoint()];
    let nvme_advertise = Some(plan.advertise);
    if let Some(kept) = kept {
        let export = Export { nvme_advertise, ..kept.export };
        return Ok(TargetConfig { id, dir: plan.layout.target(id), mds, listen, export, ..kept });
    }
    let size = plan.size.unwrap_or(super::VOLUME_SIZE).0;
    Ok(TargetConfig {
        id,
        dir: plan.layout.target(id),
        mds,
        advertise: None,
        shards: ports.peers.len() as u16,
        cpus: Default::default(),
        capacity_bytes: size.saturating_mul(2).max(CAPACITY_BYTES_MIN),
        arena_bytes: 64 << 20,
        checksum_bytes: CHECKSUM_BYTES,
        store: if plan.shape.memory { Store::Memory } else { Store::Disk },
        lose_all_at_exit: plan.shape.memory,
        host: Host::default(),
        spin_us_max: 200,
        catch_up_bytes_s: CATCH_UP_BYTES_S,
        listen,
        // Half of the default: a restart reads the log, and dev clusters are killed for fun.
        log: Log { segment_bytes: 32 << 20, ..Log::default() },
        raft: Raft::default(),
        export: Export { nvme_advertise, ..Export::default() },
        topology: Default::default(),
    })
}

/// Exports listen for other machines only when an address for them is advertised. That
/// address need not be one of ours (a virtual machine's gateway is not), so it is told to
/// hosts and never bound.
fn listen(plan: &Plan, id: u32, ports: &TargetPorts) -> Result<Listen, Problem> {
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let outward = match plan.advertise {
        IpAddr::V4(address) if address.is_loopback() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    Ok(Listen {
        peer: ports.peers.iter().copied().map(local).collect(),
        admin: local(ports.admin),
        metrics: local(ports.metrics),
        nbd: Some(SocketAddr::new(outward, ports.nbd)),
        nbd_unix: Some(plan.layout.socket(id)?),
        nvme: Some(SocketAddr::new(outward, ports.nvme)),
        nvme_discovery: ports.discovery.map(|port| SocketAddr::new(outward, port)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::layout::Layout;
    use crate::dev::shape::{Asked, Shape};

    fn plan(layout: &Layout, advertise: &str) -> Plan {
        Plan {
            shape: Shape::settle(layout, Asked { shards: Some(2), ..Asked::default() }).expect("settled"),
            layout: layout.clone(),
            size: None,
            block_bytes: None,
            advertise: advertise.parse().expect("an address"),
            restart: true,
            offline_after: 60,
        }
    }

    fn written(plan: &Plan, id: u32) -> TargetConfig {
        write_configs(plan).expect("written");
        TargetConfig::load(&plan.layout.target_toml(id)).expect("what was written is valid")
    }

    #[test]
    fn a_changed_setting_outlives_a_restart_but_addresses_follow_the_cluster() {
        let dir = tempfile::tempdir().expect("a folder");
        let layout = Layout::at(dir.path()).expect("usable");
        let mut plan = plan(&layout, "127.0.0.1");
        let mut config = written(&plan, 2);
        assert_eq!((config.id, config.shards), (2, 2));
        config.arena_bytes *= 2;
        config.mds = vec!["elsewhere:1".into()];
        replace(&layout.target_toml(2), &config.to_toml()).expect("changed by hand");
        plan.size = Some(crate::size::Size(1 << 40));
        let again = written(&plan, 2);
        assert_eq!(again.arena_bytes, config.arena_bytes);
        assert_eq!(again.capacity_bytes, config.capacity_bytes);
        assert_eq!(again.mds, [plan.mds_endpoint()]);
    }

    #[test]
    fn only_an_advertised_cluster_listens_to_other_machines() {
        let dir = tempfile::tempdir().expect("a folder");
        let layout = Layout::at(dir.path()).expect("usable");
        let nbd =
            |advertise| written(&plan(&layout, advertise), 1).listen.nbd.expect("offered").ip().to_string();
        assert_eq!(nbd("127.0.0.1"), "127.0.0.1");
        assert_eq!(nbd("10.0.2.2"), "0.0.0.0");
        assert_eq!(nbd("127.0.0.1"), "127.0.0.1");
    }
}
