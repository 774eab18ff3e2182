//! Network namespaces joined by a bridge, and what may go wrong between them.
//!
//! Partitions are drops by address at the receiver (nftables), so each direction fails by itself. A slow
//! link is netem where the kernel has it, else a token bucket, which delays by queueing.

use crate::tools::Run;
use std::process::{Command, Stdio};

/// The addresses, 10.77.0.x: the hub is 1, the MDS 10, target n 10 + n.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}", if host == HUB { 1 } else { 10 + host })
}

/// The bridge, where clients live.
pub const HUB: usize = usize::MAX;
/// The MDS.
pub const MDS: usize = 0;

/// The namespaces of one run; gone when dropped.
#[derive(Debug)]
pub struct Net {
    prefix: String,
    hosts: usize,
    /// netem is there.
    pub has_netem: bool,
}

impl Net {
    /// A hub, the MDS and so many targets.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn new(targets: usize) -> anyhow::Result<Self> {
        let prefix = format!("ac{}", std::process::id() % 100_000);
        let mut net = Self { prefix, hosts: targets + 1, has_netem: false };
        ip(&["netns", "add", &net.name(HUB)])?;
        net.inside(HUB, "ip link add br0 type bridge && ip link set br0 up && ip link set lo up")?;
        net.inside(HUB, &format!("ip addr add {}/24 dev br0", address(HUB)))?;
        for host in 0..net.hosts {
            let (hub, name) = (net.name(HUB), net.name(host));
            ip(&["netns", "add", &name])?;
            let port = format!("p{host}");
            ip(&[
                "link", "add", &port, "netns", &hub, "type", "veth", "peer", "name", "eth0", "netns", &name,
            ])?;
            net.inside(HUB, &format!("ip link set {port} master br0 up"))?;
            net.inside(host, &format!("ip addr add {}/24 dev eth0", address(host)))?;
            net.inside(host, "ip link set eth0 up && ip link set lo up")?;
            net.inside(host, "nft add table inet chaos")?;
            net.inside(host, "nft add chain inet chaos in '{ type filter hook input priority 0; }'")?;
        }
        net.has_netem = net.inside(MDS, "tc qdisc add dev eth0 root netem delay 1ms").is_ok();
        net.heal()?;
        Ok(net)
    }

    /// A namespace's name.
    pub fn name(&self, host: usize) -> String {
        match host {
            HUB => format!("{}-hub", self.prefix),
            host => format!("{}-{host}", self.prefix),
        }
    }

    fn inside(&self, host: usize, script: &str) -> anyhow::Result<()> {
        Run::new("sh").args(["-c", script]).inside(self.name(host)).ok().map(drop)
    }

    /// Nothing of what `from` sends reaches `to`.
    pub fn drop_from(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.inside(to, &format!("nft add rule inet chaos in ip saddr {} drop", address(from)))
    }

    /// So many of a hundred packets to `to` are lost.
    pub fn lose(&self, to: usize, percent: usize) -> anyhow::Result<()> {
        self.inside(to, &format!("nft add rule inet chaos in numgen random mod 100 '<' {percent} drop"))
    }

    /// What a host sends goes slowly.
    pub fn slow(&self, host: usize) -> anyhow::Result<()> {
        let how =
            if self.has_netem { "netem delay 80ms 60ms" } else { "tbf rate 8mbit burst 16k latency 800ms" };
        self.inside(host, &format!("tc qdisc replace dev eth0 root {how}"))
    }

    /// All is well again.
    pub fn heal(&self) -> anyhow::Result<()> {
        for host in 0..self.hosts {
            self.inside(host, "nft flush chain inet chaos in; tc qdisc del dev eth0 root 2>/dev/null; true")?;
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in (0..self.hosts).chain([HUB]) {
            let mut command = Command::new("ip");
            command.args(["netns", "del", &self.name(host)]).stderr(Stdio::null());
            let _ = command.status();
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    Run::new("ip").args(arguments).ok().map(drop)
}
