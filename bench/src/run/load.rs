//! The workload: which IO comes next, and when it should have begun.
//!
//! Invariant: a sequence of IOs is a function of the seed, the job and the round. Deliberately absent: IO.

use anyhow::{Context, anyhow, ensure};
use clap::ValueEnum;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

/// Bytes of the smallest IO, of which all others are multiples.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of the largest.
pub const IO_BYTES_MAX: u64 = 128 << 10;
/// IOs in flight at most of an open loop whose depth is not given: enough that a stall does not use them up at once.
pub const OPEN_DEPTH: u32 = 128;
/// Most IOs in flight, for each job.
const DEPTH_MAX: u32 = 256;
/// Most jobs.
const JOBS_MAX: u32 = 64;

/// In which order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Anywhere, evenly.
    #[default]
    Random,
    /// One after the other, again and again; the first round from the first byte on, each other one from elsewhere.
    Sequential,
    /// A few places often, most seldom (exponent 0.99, as YCSB has it).
    Zipfian,
}

/// Sizes of IOs, each with its share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sizes(pub Vec<(u64, f64)>);

impl FromStr for Sizes {
    type Err = anyhow::Error;

    /// `4K`, or `4K:70,64K:30` where the second number is the share.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let one = |part: &str| {
            let (size, share) = part.split_once(':').unwrap_or((part, "1"));
            let bytes = crate::parse_bytes(size).map_err(anyhow::Error::msg)?;
            let share: f64 = share.parse().with_context(|| format!("`{share}` is no share of sizes"))?;
            Ok((bytes, share))
        };
        let sizes = Self(text.split(',').map(one).collect::<anyhow::Result<_>>()?);
        sizes.check()?;
        Ok(sizes)
    }
}

impl Sizes {
    /// Whether there are IOs of these sizes.
    ///
    /// # Errors
    /// None, one that no IO can have, or shares that are none.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.0.is_empty(), "there is no size");
        for (bytes, share) in &self.0 {
            let fits = bytes.is_multiple_of(BLOCK_BYTES) && (BLOCK_BYTES..=IO_BYTES_MAX).contains(bytes);
            ensure!(fits, "{bytes} bytes are not a multiple of 4K up to 128K");
            ensure!(*share > 0.0, "the share of {bytes} bytes is not above 0");
        }
        let sum: f64 = self.0.iter().map(|(_, share)| share).sum();
        ensure!(sum.is_finite(), "the shares of the sizes are too large to be added");
        Ok(())
    }
}

impl Display for Sizes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (nth, (bytes, share)) in self.0.iter().enumerate() {
            let comma = if nth > 0 { "," } else { "" };
            match self.0.len() {
                1 => write!(f, "{}K", bytes >> 10)?,
                _ => write!(f, "{comma}{}K:{share}", bytes >> 10)?,
            }
        }
        Ok(())
    }
}

/// What is done, whoever it is done to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// In which order.
    pub order: Order,
    /// Reads among 100 IOs.
    pub read_percent: u8,
    /// Their sizes.
    pub sizes: Sizes,
    /// IOs in flight at most, for each job.
    pub depth: u32,
    /// Connections, each with a thread of its own.
    pub jobs: u32,
    /// IOs that arrive a second in all, whether or not those before are done; absent for a closed loop.
    pub rate: Option<f64>,
    /// Writes of a file are durable when they complete.
    pub dsync: bool,
    /// What is read is compared with what was written.
    pub verify: bool,
    /// The client polls for completions, as SPDK's does, before it sleeps.
    #[serde(default)]
    pub poll: bool,
    /// Bytes from the start that are touched.
    pub bytes: u64,
    /// Of the random numbers.
    pub seed: u64,
}

impl Load {
    /// 4 KiB at random, one job, a closed loop: what the comparisons of this crate begin with.
    pub fn random_4k(read_percent: u8, depth: u32, bytes: u64) -> Self {
        let (order, sizes) = (Order::Random, Sizes(vec![(BLOCK_BYTES, 1.0)]));
        let (jobs, rate, dsync, verify, poll, seed) = (1, None, true, false, false, 1);
        Self { order, read_percent, sizes, depth, jobs, rate, dsync, verify, poll, bytes, seed }
    }

    /// What the command line refuses, a load may still have that was read from a file.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn check(&self) -> anyhow::Result<()> {
        self.sizes.check()?;
        let Self { read_percent, depth, jobs, rate, verify, .. } = *self;
        ensure!(read_percent <= 100, "{read_percent} reads among 100 IOs");
        ensure!((1..=DEPTH_MAX).contains(&depth), "a depth of {depth} is not between 1 and {DEPTH_MAX}");
        ensure!((1..=JOBS_MAX).contains(&jobs), "{jobs} jobs are not between 1 and {JOBS_MAX}");
        ensure!(rate.is_none_or(|rate| rate > 0.0 && rate.is_finite()), "a rate that is not above 0");
        ensure!(
            !verify || read_percent < 100,
            "--verify compares what is read with what this run has written, and --read 100 writes nothing"
        );
        Ok(())
    }

    /// What is done, without how much of it at once: `randread 4K`, `zipf 70 % reads 4K:3,64K:1`.
    pub fn pattern(&self) -> String {
        let order = match self.order {
            Order::Random => "rand",
            Order::Sequential => "",
            Order::Zipfian => "zipf",
        };
        match self.read_percent {
            100 => format!("{order}read {}", self.sizes),
            0 => format!("{order}write {}", self.sizes),
            reads => format!("{order}rw {reads} % reads {}", self.sizes),
        }
    }

    /// The whole in a few words: `randread 4K QD32`; of an open loop with the depth where that is not the usual one.
    pub fn label(&self) -> String {
        let depth = format!("QD{}", self.depth);
        let pace = match self.rate {
            None => depth,
            Some(rate) if self.depth == OPEN_DEPTH => format!("{rate:.0}/s"),
            Some(rate) => format!("{rate:.0}/s {depth}"),
        };
        let jobs = if self.jobs > 1 { format!(" x{}", self.jobs) } else { String::new() };
        let poll = if self.poll { " polled" } else { "" };
        format!("{} {pace}{jobs}{poll}", self.pattern())
    }
}

/// One IO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// Or a read.
    pub write: bool,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Io {
    /// The blocks that it covers.
    pub fn blocks(&self) -> std::ops::Range<usize> {
        (self.offset / BLOCK_BYTES) as usize..((self.offset + self.bytes) / BLOCK_BYTES) as usize
    }
}

/// The IOs of one job, without end.
pub struct Ios {
    order: Order,
    read_percent: u8,
    random: SmallRng,
    sizes: Vec<Size>,
    /// Of all sizes.
    shares: f64,
    first: u64,
    next: u64,
}

/// The IOs of one size.
struct Size {
    bytes: u64,
    share: f64,
    /// Where they can lie, side by side.
    places: u64,
    zipf: Zipf<f64>,
    /// From a rank's place to that of the next.
    stride: u64,
}

impl Size {
    fn new(bytes: u64, share: f64, range: u64) -> anyhow::Result<Self> {
        let places = range / bytes;
        let zipf = Zipf::new(places as f64, 0.99).map_err(|error| anyhow!("{error}"))?;
        Ok(Self { bytes, share, places, zipf, stride: stride(places) })
    }

    /// The popular places lie all over, not side by side, and each rank has one of its own.
    fn place(&self, rank: u64) -> u64 {
        (u128::from(rank) * u128::from(self.stride) % u128::from(self.places)) as u64
    }
}

impl Ios {
    /// The IOs of a job in a round, within `bytes` from `first` on. Rounds differ: were they the same, many of them would
    /// touch no more than one does, and find it in caches.
    ///
    /// # Errors
    /// The load cannot be done, or its largest IO does not fit.
    pub fn new(load: &Load, job: u32, round: u32, first: u64, bytes: u64) -> anyhow::Result<Self> {
        load.check()?;
        let largest = load.sizes.0.iter().map(|(size, _)| *size).max().unwrap_or(BLOCK_BYTES);
        ensure!(bytes >= largest, "{bytes} bytes a job are less than one IO of {largest}");
        let stream = u64::from(job) << 32 | u64::from(round);
        let random = SmallRng::seed_from_u64(mixed(load.seed).wrapping_add(stream));
        // Multiples of the golden ratio, modulo 1, lie far from each other however many there are.
        let part = u64::from(round).wrapping_mul(GOLDEN);
        let next = ((u128::from(part) * u128::from(bytes)) >> 64) as u64;
        let sizes = load.sizes.0.iter().map(|(size, share)| Size::new(*size, *share, bytes));
        let sizes = sizes.collect::<anyhow::Result<Vec<_>>>()?;
        let shares = sizes.iter().map(|size| size.share).sum();
        let (order, read_percent) = (load.order, load.read_percent);
        Ok(Self { order, read_percent, random, sizes, shares, first, next })
    }

    /// The next.
    pub fn draw(&mut self) -> Io {
        let write = self.random.random_range(0..100) >= self.read_percent;
        let size = drawn(&self.sizes, self.random.random_range(0.0..self.shares));
        let bytes = size.bytes;
        let place = match self.order {
            Order::Random => self.random.random_range(0..size.places),
            Order::Sequential => {
                let place = self.next.div_ceil(bytes) % size.places;
                self.next = (place + 1) * bytes;
                place
            }
            Order::Zipfian => size.place(size.zipf.sample(&mut self.random) as u64),
        };
        Io { write, offset: self.first + place * bytes, bytes }
    }
}

/// The size at a point of all shares laid end to end.
fn drawn(sizes: &[Size], mut left: f64) -> &Size {
    for size in sizes {
        left -= size.share;
        if left < 0.0 {
            return size;
        }
    }
    &sizes[sizes.len() - 1]
}

/// 2^64 divided by the golden ratio.
pub(super) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Spreads a change of any bit over all (the last step of splitmix64).
pub(super) fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Near the golden part of the places, and without a common divisor: its multiples meet every place once.
fn stride(places: u64) -> u64 {
    let divisor = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let from = ((u128::from(GOLDEN) * u128::from(places)) >> 64) as u64;
    (from.max(1)..).find(|stride| divisor(*stride, places) == 1).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(order: Order, sizes: &str) -> Load {
        let sizes = sizes.parse().expect("well formed");
        let (rate, bytes) = (None, 1 << 20);
        Load {
            order,
            read_percent: 70,
            sizes,
            depth: 1,
            jobs: 1,
            rate,
            dsync: false,
            poll: false,
            verify: false,
            bytes,
            seed: 7,
        }
    }

    fn ios(load: &Load, count: usize) -> Vec<Io> {
        ios_of(load, 0, 0, count)
    }

    fn ios_of(load: &Load, job: u32, round: u32, count: usize) -> Vec<Io> {
        let mut ios = Ios::new(load, job, round, 4096, load.bytes).expect("fits");
        (0..count).map(|_| ios.draw()).collect()
    }

    #[test]
    fn every_io_is_whole_blocks_within_its_part() {
        for order in [Order::Random, Order::Sequential, Order::Zipfian] {
            for io in ios(&load(order, "4K:2,12K:1,128K:1"), 5000) {
                assert!(io.offset >= 4096 && io.offset + io.bytes <= 4096 + (1 << 20), "{order:?} {io:?}");
                assert!(io.offset.is_multiple_of(4096) && io.bytes.is_multiple_of(4096));
            }
        }
    }

    #[test]
    fn mixes_have_their_shares() {
        let all = ios(&load(Order::Random, "4K:3,64K:1"), 20_000);
        let part = |of: fn(&Io) -> bool| all.iter().filter(|io| of(io)).count() as f64 / 20_000.0;
        assert!((part(|io| !io.write) - 0.7).abs() < 0.02);
        assert!((part(|io| io.bytes == 4096) - 0.75).abs() < 0.02);
    }

    #[test]
    fn in_order_means_without_gaps_and_again_from_the_start() {
        let offsets: Vec<_> = ios(&load(Order::Sequential, "64K"), 18).iter().map(|io| io.offset).collect();
        assert_eq!(offsets[..3], [4096, 4096 + 65536, 4096 + 131_072]);
        assert_eq!(offsets[16..], [4096, 4096 + 65536]);
    }

    #[test]
    fn zipfian_has_hot_places_and_random_has_none() {
        let hottest = |order| {
            let mut counts = std::collections::HashMap::<u64, usize>::new();
            ios(&load(order, "4K"), 10_000).iter().for_each(|io| *counts.entry(io.offset).or_default() += 1);
            counts.into_values().max().unwrap_or(0)
        };
        assert!(hottest(Order::Zipfian) > 1000 && hottest(Order::Random) < 100);
    }

    #[test]
    fn ranks_have_places_of_their_own_and_the_hottest_is_as_hot_for_each_size() -> anyhow::Result<()> {
        for places in [1_u64, 2, 3, 8, 100, 256, 1000] {
            let size = Size::new(8192, 1.0, places * 8192)?;
            let met: std::collections::HashSet<u64> = (1..=places).map(|rank| size.place(rank)).collect();
            assert_eq!(met.len() as u64, places);
        }
        // 8 places of 128K: the first rank has 1 / (1 + 2^-0.99 + ... + 8^-0.99), 37 of 100.
        let mut counts = std::collections::HashMap::<u64, usize>::new();
        ios(&load(Order::Zipfian, "128K"), 10_000)
            .iter()
            .for_each(|io| *counts.entry(io.offset).or_default() += 1);
        let hottest = counts.values().copied().max().unwrap_or(0);
        assert!((3400..4000).contains(&hottest) && counts.len() == 8, "{counts:?}");
        Ok(())
    }

    #[test]
    fn a_label_says_what_was_done_and_how_much_at_once() -> anyhow::Result<()> {
        let read = Load::random_4k(100, 32, 1 << 20);
        assert_eq!(read.label(), "randread 4K QD32");
        let order = Order::Sequential;
        let mixed = Load { read_percent: 70, sizes: "4K:3,64K".parse()?, jobs: 2, order, ..read.clone() };
        assert_eq!(mixed.label(), "rw 70 % reads 4K:3,64K:1 QD32 x2");
        assert_eq!(Load { rate: Some(5000.0), read_percent: 0, ..read }.label(), "randwrite 4K 5000/s QD32");
        Ok(())
    }

    #[test]
    fn the_same_seed_gives_the_same_ios() {
        let one = load(Order::Random, "4K:1,8K:1");
        assert_eq!(ios(&one, 50), ios(&one, 50));
        assert_ne!(ios(&one, 50), ios(&Load { seed: 8, ..one.clone() }, 50));
    }

    #[test]
    fn rounds_and_jobs_have_ios_of_their_own_and_rounds_together_cover_the_range() {
        let random = Load { seed: 1, ..load(Order::Random, "4K") };
        let streams = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(job, round)| ios_of(&random, job, round, 50));
        for (nth, one) in streams.iter().enumerate() {
            assert!(streams[nth + 1..].iter().all(|other| other != one));
        }
        // 256 places: ten rounds of 40 IOs in order meet nearly all of them.
        let ordered = load(Order::Sequential, "4K");
        let touched = (0..10).flat_map(|round| ios_of(&ordered, 0, round, 40)).map(|io| io.offset);
        let touched: std::collections::HashSet<u64> = touched.collect();
        assert!(touched.len() > 240, "{}", touched.len());
    }

    #[test]
    fn sizes_that_no_io_can_have_are_refused() {
        for wrong in ["", "0", "1K", "256K", "4K:0", "4K:x", "4K:-1", "4K:inf", "4K:NaN", "4K:1e308,8K:1e308"]
        {
            assert!(wrong.parse::<Sizes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_load_from_a_file_that_cannot_be_done_is_refused_before_the_first_io() {
        let good = load(Order::Random, "4K");
        let is_refused = |load: Load| Ios::new(&load, 0, 0, 0, load.bytes).is_err();
        assert!(!is_refused(good.clone()));
        for sizes in [vec![], vec![(0, 1.0)], vec![(4096, f64::NAN)], vec![(4096, 1e308), (8192, 1e308)]] {
            assert!(is_refused(Load { sizes: Sizes(sizes.clone()), ..good.clone() }), "{sizes:?}");
        }
        assert!(is_refused(Load { depth: 0, ..good.clone() }));
        assert!(is_refused(Load { jobs: 0, ..good.clone() }));
        assert!(is_refused(Load { rate: Some(0.0), ..good.clone() }));
        assert!(is_refused(Load { verify: true, read_percent: 100, ..good }), "nothing would be verified");
    }
}
