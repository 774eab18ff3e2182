//! Mutation without coverage: the corpus and what targets make, changed a little, for so many
//! inputs or so long. One seed decides everything.

use super::Target;
use peak_alloc::PeakAlloc;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Numbers from a seed (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below a bound; 0 when that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound.max(1) as u64) as usize
    }
    /// True so many times in a hundred.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
    /// A number of the sizes that break things: near 0, near a power of two, or any.
    pub fn odd(&mut self) -> u64 {
        let shift = self.below(64) as u32;
        match self.below(4) {
            0 => self.below(10) as u64,
            1 => (1u64 << shift).wrapping_add(self.below(3) as u64).wrapping_sub(1),
            2 => u64::MAX - self.below(3) as u64,
            _ => self.roll() >> shift,
        }
    }
    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// Any bytes, up to so many.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.roll() as u8).collect()
    }
}

/// What a run did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ran {
    /// Inputs of the corpus.
    pub kept: u64,
    /// Inputs made and mutated.
    pub made: u64,
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many inputs that were made.
    Inputs(u64),
    /// After so long.
    Seconds(u64),
}

/// An input that broke a promise.
#[derive(Debug)]
pub struct Found {
    /// It.
    pub input: Vec<u8>,
    /// What the panic said.
    pub why: String,
}

/// Where a target's inputs are kept.
pub fn corpus_folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(target.name)
}

/// The kept inputs, in order of name; none is no error.
pub fn corpus(target: &Target) -> io::Result<Vec<Vec<u8>>> {
    let folder = match fs::read_dir(corpus_folder(target)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        folder => folder?,
    };
    let mut files = folder.map(|file| Ok(file?.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    files.iter().map(fs::read).collect()
}

/// Runs the corpus, then what is made from `seed`, until the end or the first finding. `current`, if
/// given, always holds the input under way: what remains when the process itself dies.
pub fn run(
    target: &Target,
    seed: u64,
    until: Until,
    held: &PeakAlloc,
    current: Option<&Path>,
) -> io::Result<Result<Ran, Box<Found>>> {
    let corpus = corpus(target)?;
    let (mut ran, mut dice, start) = (Ran::default(), Dice(seed), Instant::now());
    for input in &corpus {
        if let Err(found) = one(target, input, held, current)? {
            return Ok(Err(found));
        }
        ran.kept += 1;
    }
    let over = |made: u64| match until {
        Until::Inputs(inputs) => made >= inputs,
        Until::Seconds(seconds) => made.is_multiple_of(64) && start.elapsed() >= Duration::from_secs(seconds),
    };
    while !over(ran.made) {
        let mut input = match corpus.len() {
            0 => (target.make)(&mut dice),
            kept if dice.percent(30) => corpus[dice.below(kept)].clone(),
            _ => (target.make)(&mut dice),
        };
        if dice.percent(80) {
            mutate(&mut input, &mut dice, target);
        }
        input.truncate(target.bytes_max);
        if let Err(found) = one(target, &input, held, current)? {
            return Ok(Err(found));
        }
        ran.made += 1;
    }
    Ok(Ok(ran))
}

fn one(
    target: &Target,
    input: &[u8],
    held: &PeakAlloc,
    current: Option<&Path>,
) -> io::Result<Result<(), Box<Found>>> {
    if let Some(path) = current {
        fs::write(path, input)?;
    }
    let checked = catch_unwind(AssertUnwindSafe(|| target.check(input, held)));
    Ok(checked.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Box::new(Found { input: input.to_vec(), why: text.unwrap_or_else(|| "a panic without words".into()) })
    }))
}

/// Some changes of the kinds that parsers trip over.
fn mutate(input: &mut Vec<u8>, dice: &mut Dice, target: &Target) {
    for _ in 0..1 + dice.below(5) {
        let at = dice.below(input.len());
        let rest = input.len() - at;
        match dice.below(8) {
            _ if input.is_empty() => *input = dice.bytes(64),
            0 => input[at] ^= 1 << dice.below(8),
            1 => input[at] = dice.odd() as u8,
            2 | 3 => {
                let width = dice.pick(&[2, 4, 8]).min(rest);
                let number = dice.odd();
                let bytes = if dice.percent(50) { number.to_le_bytes() } else { number.to_be_bytes() };
                let from = if bytes[0] == number as u8 { 0 } else { 8 - width };
                input[at..at + width].copy_from_slice(&bytes[from..from + width]);
            }
            4 => input.truncate(at),
            5 => drop(input.drain(at..at + dice.below(rest.min(32)))),
            6 => {
                let piece = input[at..at + dice.below(rest.min(64))].to_vec();
                let to = dice.below(input.len());
                drop(input.splice(to..to, piece));
            }
            _ => {
                let other = (target.make)(dice);
                let from = dice.below(other.len());
                let to = at.min(input.len());
                input.truncate(to);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
}
