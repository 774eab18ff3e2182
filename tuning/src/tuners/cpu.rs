//! Processors: how fast they clock, how deep they sleep, who else runs on them.

use crate::cpus::Cpus;
use crate::machine::Machine;
use crate::model::{Form, GONE_AT_REBOOT, Item, Mode, NOT_OURS, Profile, Severity, Tuner};

const CPU: &str = "/sys/devices/system/cpu";
/// Waking from a deeper sleep takes longer than an NVMe disk takes to answer.
const WAKE_US_MAX: i64 = 10;

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "governor",
        family: "processor",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "how the processors choose their clock",
        why: "a core that clocks up only under load answers the first IOs late",
        risk: "power and heat",
        places: &["/sys/devices/system/cpu/cpufreq/policyN/scaling_governor"],
        default: "latency, throughput: performance; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/admin-guide/pm/cpufreq.rst",
            "rpk: cpu",
            "tuned: latency-performance",
        ],
        at_start: true,
        inspect: governor,
    },
    Tuner {
        name: "c-states",
        family: "processor",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "how deep idle processors sleep",
        why: "waking from a deep state takes longer than a fast disk takes to answer",
        risk: "holding them awake costs power, so that it is held only while a target runs",
        places: &["/sys/devices/system/cpu/cpu0/cpuidle/stateN/latency", "/dev/cpu_dma_latency"],
        default: "latency: held shallow by the target through /dev/cpu_dma_latency",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/admin-guide/pm/cpuidle.rst", "tuned: force_latency", "rpk: cpu"],
        at_start: false,
        inspect: c_states,
    },
    Tuner {
        name: "boost",
        family: "processor",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "whether processors may clock above their nominal speed",
        why: "boost helps, but makes measurements drift with heat",
        risk: "none: it only looks",
        places: &["/sys/devices/system/cpu/cpufreq/boost", "/sys/devices/system/cpu/intel_pstate/no_turbo"],
        default: "on for use; off while measuring",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/admin-guide/pm/cpufreq.rst, boost", "rpk: cpu"],
        at_start: false,
        inspect: boost,
    },
    Tuner {
        name: "smt",
        family: "processor",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "whether shards share a physical core with each other or with other work",
        why: "two threads that poll on one core get little more than half a core each",
        risk: "none: it only looks",
        places: &[
            "/sys/devices/system/cpu/smt/active",
            "/sys/devices/system/cpu/cpuN/topology/thread_siblings_list",
        ],
        default: "one shard a physical core",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/admin-guide/hw-vuln/core-scheduling.rst", "seastar: --cpuset"],
        at_start: false,
        inspect: smt,
    },
    Tuner {
        name: "isolation",
        family: "processor",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "whether the shards' cores are kept free of other threads and of the timer tick",
        why: "a thread that is scheduled onto a polling core costs it a time slice",
        risk: "isolated cores do nothing else; that is decided on the kernel line, at start",
        places: &["/sys/devices/system/cpu/isolated", "/sys/devices/system/cpu/nohz_full"],
        default: "latency: the shards' cores isolated",
        reboot: NOT_OURS,
        sources: &[
            "kernel: Documentation/admin-guide/kernel-parameters.txt, isolcpus, nohz_full",
            "tuned: cpu-partitioning",
        ],
        at_start: false,
        inspect: isolation,
    },
];

fn governor(machine: &Machine<'_>) -> Vec<Item> {
    let names = machine.tree.list(&format!("{CPU}/cpufreq"));
    let policies: Vec<_> = names.into_iter().filter(|name| name.starts_with("policy")).collect();
    if policies.is_empty() {
        return vec![Item::unsupported("", "no control of the clock here (a virtual machine has none)")];
    }
    let item = |policy: &String| {
        let path = format!("{CPU}/cpufreq/{policy}/scaling_governor");
        let offered = machine.text(&format!("{CPU}/cpufreq/{policy}/scaling_available_governors"));
        let offered = offered.is_none_or(|words| words.split_whitespace().any(|word| word == "performance"));
        let when = machine.profile.is_server() && offered;
        machine.setting_when(when, policy, &path, Form::Words, "performance")
    };
    policies.iter().map(item).collect()
}

fn c_states(machine: &Machine<'_>) -> Vec<Item> {
    let folder = format!("{CPU}/cpu0/cpuidle");
    let states = machine.tree.list(&folder).into_iter().filter(|name| name.starts_with("state"));
    let open = states.filter(|s| machine.number(&format!("{folder}/{s}/disable")) == Some(0));
    let deepest = open
        .filter_map(|s| Some((machine.number(&format!("{folder}/{s}/latency"))?, s)))
        .max()
        .and_then(|(latency, s)| Some((latency, machine.text(&format!("{folder}/{s}/name"))?)));
    let Some((latency, name)) = deepest else {
        return vec![Item::unsupported("", "no control of idle states here")];
    };
    let found = format!("down to {name}, {latency} us to wake");
    let wanted = format!("{WAKE_US_MAX} us at most while a target runs");
    vec![match machine.profile {
        Profile::Latency if !machine.tree.exists("/dev/cpu_dma_latency") => {
            Item::unsupported("", "no /dev/cpu_dma_latency")
        }
        Profile::Latency => {
            let fix = "ashlar tune probe DIR --profile latency writes `cpu_latency_us_max` to device.toml; the \
                       target then holds /dev/cpu_dma_latency while it runs";
            Item::judged("", latency <= WAKE_US_MAX, &found, &wanted, fix)
        }
        _ => Item::info("", &found, "as it is"),
    }]
}

fn boost(machine: &Machine<'_>) -> Vec<Item> {
    let on = match machine.number(&format!("{CPU}/intel_pstate/no_turbo")) {
        Some(off) => Some(off == 0),
        None => machine.number(&format!("{CPU}/cpufreq/boost")).map(|on| on == 1),
    };
    vec![match on {
        Some(on) => Item::info("", if on { "on" } else { "off" }, "on for use, off while measuring"),
        None => Item::unsupported("", "no control of boost here"),
    }]
}

fn siblings(machine: &Machine<'_>, cpu: u32) -> Cpus {
    let text = machine.text(&format!("{CPU}/cpu{cpu}/topology/thread_siblings_list"));
    text.and_then(|text| Cpus::parse(&text)).unwrap_or_default()
}

fn smt(machine: &Machine<'_>) -> Vec<Item> {
    if machine.number(&format!("{CPU}/smt/active")) != Some(1) {
        return vec![Item::judged("", true, "off or not there", "one shard a physical core", "")];
    }
    let cpus = &machine.facts.cpus;
    if cpus.is_empty() {
        return vec![Item::info("", "on; no cores are pinned", "one shard a physical core")];
    }
    let twins: Vec<String> = cpus
        .0
        .iter()
        .map(|cpu| siblings(machine, *cpu))
        .filter(|twins| twins.and(cpus).0.len() > 1)
        .map(|twins| twins.list())
        .collect();
    let mut shared = twins;
    shared.dedup();
    let found = if shared.is_empty() {
        "on, none shared".into()
    } else {
        format!("shared: {}", shared.join(" and "))
    };
    let fix = "pin shards to one thread of each core (`cpus` in target.toml), or `nosmt` on the kernel line";
    vec![Item::judged("", shared.is_empty(), &found, "one shard a physical core", fix)]
}

fn isolation(machine: &Machine<'_>) -> Vec<Item> {
    let cpus = &machine.facts.cpus;
    if cpus.is_empty() {
        return vec![Item::info("", "no cores are pinned", "-")];
    }
    let list = |file: &str| {
        machine.text(&format!("{CPU}/{file}")).and_then(|text| Cpus::parse(&text)).unwrap_or_default()
    };
    let (isolated, tickless) = (list("isolated"), list("nohz_full"));
    let good = cpus.without(&isolated).is_empty() && cpus.without(&tickless).is_empty();
    let shown = |cpus: &Cpus| if cpus.is_empty() { "none".to_owned() } else { cpus.list() };
    let found = format!("isolated {}, tickless {}", shown(&isolated), shown(&tickless));
    let line = cpus.list();
    let fix =
        format!("on the kernel line: isolcpus=managed_irq,domain,{line} nohz_full={line} rcu_nocbs={line}");
    vec![match machine.profile {
        Profile::Latency => Item::judged("", good, &found, &line, &fix),
        _ => Item::info("", &found, "as it is"),
    }]
}
