//! Sets of processors, in the kernel's two ways of writing them.

use std::collections::BTreeSet;

/// Processors by number, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cpus(pub BTreeSet<u32>);

/// More processors than a machine has; a longer range is a mistake.
const CPU_MAX: u32 = 8192;

impl Cpus {
    /// Reads `0-3,8`; an empty text is the empty set.
    pub fn parse(text: &str) -> Option<Self> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            if first > last || last >= CPU_MAX {
                return None;
            }
            cpus.extend(first..=last);
        }
        Some(Self(cpus))
    }

    /// As `0-3,8`.
    pub fn list(&self) -> String {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for &cpu in &self.0 {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == cpu => *last = cpu,
                _ => ranges.push((cpu, cpu)),
            }
        }
        let words = ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
        words.collect::<Vec<_>>().join(",")
    }

    /// As a hexadecimal mask, groups of 32 bits parted by commas.
    pub fn mask(&self) -> String {
        let words = self.0.last().map_or(0, |last| last / 32) + 1;
        let word =
            |nth: u32| (0..32).filter(|bit| self.0.contains(&(nth * 32 + bit))).map(|b| 1u32 << b).sum();
        let mut groups: Vec<u32> = (0..words).rev().map(word).collect();
        let first = groups.remove(0);
        groups.iter().fold(format!("{first:x}"), |text, group| format!("{text},{group:08x}"))
    }

    /// Those that are not among `others`.
    pub fn without(&self, others: &Self) -> Self {
        Self(self.0.difference(&others.0).copied().collect())
    }

    /// Those that are also among `others`.
    pub fn and(&self, others: &Self) -> Self {
        Self(self.0.intersection(&others.0).copied().collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_masks_as_the_kernel_has_them() {
        let cpus = Cpus::parse("0-2,4, 33\n").expect("well formed");
        assert_eq!((cpus.list().as_str(), cpus.mask().as_str()), ("0-2,4,33", "2,00000017"));
        assert_eq!(Cpus::parse("").map(|c| c.list()), Some(String::new()));
        assert_eq!(Cpus::default().mask(), "0");
        for wrong in ["a", "3-1", "1-", "0-99999999"] {
            assert_eq!(Cpus::parse(wrong), None, "{wrong}");
        }
    }
}
