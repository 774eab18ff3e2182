//! Sizes as people write them: `4G`, `512MiB`, `1048576`. Powers of two throughout.

use std::fmt;
use std::str::FromStr;

/// So many bytes, for clap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size(pub u64);

const UNITS: &[(&str, u32)] = &[("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40), ("P", 50)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write a size such as 4G, 512M or a number of bytes";
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let number: u64 = digits.parse().map_err(|_| format!("\"{text}\" is not a size; {example}"))?;
        let upper = unit.trim().to_ascii_uppercase();
        let short = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
        let (_, shift) = UNITS
            .iter()
            .find(|(name, _)| *name == short)
            .ok_or_else(|| format!("\"{unit}\" is not a unit of size; {example}"))?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err(format!("a size of nothing; {example}")),
            Some(bytes) => Ok(Self(bytes)),
            None => Err(format!("\"{text}\" is more than 64 bits can count; {example}")),
        }
    }
}

/// In the largest unit that divides it, or with one decimal.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = UNITS.iter().rev().find(|(_, shift)| self.0 >= 1 << shift);
        let (name, shift) = fits.copied().unwrap_or(("", 0));
        let unit = if name.is_empty() { "B".to_owned() } else { format!("{name}iB") };
        if self.0.trailing_zeros() >= shift || self.0 == 0 {
            write!(f, "{} {unit}", self.0 >> shift)
        } else {
            write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("4G", 4 << 30),
            ("4g", 4 << 30),
            ("4GiB", 4 << 30),
            ("4 GB", 4 << 30),
            ("512M", 512 << 20),
            ("8192", 8192),
            ("8192B", 8192),
            ("16T", 16 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in ["", "G", "-1G", "1.5G", "4X", "4GG", "0", "0G", "99999999999P", "1e9"] {
            let refusal = text.parse::<Size>().expect_err(text);
            assert!(refusal.contains("write a size such as"), "{text}: {refusal}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit() {
        assert_eq!(Size(4 << 30).to_string(), "4 GiB");
        assert_eq!(Size(1536 << 20).to_string(), "1.5 GiB");
        assert_eq!(Size(512).to_string(), "512 B");
        assert_eq!(Size(0).to_string(), "0 B");
    }
}
