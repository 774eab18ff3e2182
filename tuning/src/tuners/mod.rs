//! The closed table of tuners, one module each family.
//!
//! The order is the order of applying: a scheduler is chosen before the depth of its queue.

mod cpu;
mod disk;
mod filesystem;
mod irq;
mod memory;
mod net;
mod process;
mod time;
mod topology;

use crate::model::{Item, Tuner};

/// Every tuner there is.
pub fn all() -> Vec<&'static Tuner> {
    let families: [&'static [Tuner]; 9] = [
        process::TUNERS,
        memory::TUNERS,
        disk::TUNERS,
        irq::TUNERS,
        net::TUNERS,
        cpu::TUNERS,
        topology::TUNERS,
        filesystem::TUNERS,
        time::TUNERS,
    ];
    families.into_iter().flatten().collect()
}

/// What is found of each of these objects; `none` says why there is nothing to look at.
fn each<T>(objects: &[T], none: &str, look: impl Fn(&T) -> Vec<Item>) -> Vec<Item> {
    if objects.is_empty() {
        return vec![Item::unsupported("", none)];
    }
    objects.iter().flat_map(look).collect()
}

/// The tuner of that name.
pub fn find(name: &str) -> Option<&'static Tuner> {
    all().into_iter().find(|tuner| tuner.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Mode;

    #[test]
    fn every_tuner_tells_all_that_explain_shows() {
        let all = all();
        for (nth, tuner) in all.iter().enumerate() {
            let Tuner { name, what, why, risk, default, sources, places, .. } = tuner;
            assert!(all[..nth].iter().all(|other| other.name != *name), "{name} is there twice");
            for text in [what, why, risk, default] {
                assert!(text.len() > 3, "{name} leaves something out");
            }
            assert!(!sources.is_empty() && !places.is_empty(), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{name}");
            assert_eq!(tuner.mode == Mode::Report, tuner.reboot == crate::model::NOT_OURS, "{name}");
        }
    }

    #[test]
    fn a_tuner_is_found_by_its_name_only() {
        assert!(find("scheduler").is_some() && find("sched").is_none());
    }
}
