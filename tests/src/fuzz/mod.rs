//! Every decoder under bytes that anyone could have sent or stored.
//!
//! [`TARGETS`] is the one list. A target takes bytes, gives them to a decoder as its caller would,
//! and holds what comes out against its promise: nothing panics, a refusal is typed, memory stays
//! within a bound that depends on the input's length, a stream means the same however it is cut, and
//! what was decoded encodes and decodes to itself. Checksums are put right after mutation, so that
//! what lies behind them is reached.
//!
//! Two things call it: [`plain::run`], which mutates the kept corpus and what [`Target::make`] makes
//! from numbers, on any toolchain; and libFuzzer, led by coverage, where a C++ compiler is at hand
//! (`cargo xtask fuzz`). Inputs that found something are kept in `tests/fuzz/TARGET/` and run first.
//!
//! Deliberately absent: the sockets and files around the decoders (see `sim` and `tests/`).

mod config;
mod disk;
mod mds;
mod nbd;
mod nvme;
mod peer;
pub mod plain;

pub use plain::Dice;

/// One decoder.
pub struct Target {
    /// What it is called on the command line, and its folder in `tests/fuzz`.
    pub name: &'static str,
    /// For people.
    pub about: &'static str,
    /// The longest input worth trying.
    pub bytes_max: usize,
    /// Most memory that it may hold besides its input, in bytes, for an input so long.
    pub memory_max: fn(usize) -> usize,
    /// A well-formed input, drawn from numbers.
    pub make: fn(&mut Dice) -> Vec<u8>,
    /// Gives the input to the decoder; panics when a promise is broken.
    pub run: fn(&[u8]),
}

/// Every decoder that reads what this process did not write.
pub const TARGETS: &[Target] = &[
    nbd::HANDSHAKE,
    nbd::REQUESTS,
    nbd::REPLIES,
    nvme::CONTROLLER,
    nvme::HOST,
    peer::FRAMES,
    disk::LOG,
    disk::CHECKPOINT,
    disk::SUPERBLOCK,
    disk::TABLE,
    mds::REQUESTS,
    mds::MAP,
    config::TARGET,
];

/// The target of that name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Runs one input with memory watched: `held` tells what is held now and was held at most since
    /// it was asked to begin anew.
    pub fn check(&self, input: &[u8], held: &peak_alloc::PeakAlloc) {
        held.reset_peak_usage();
        let before = held.current_usage();
        (self.run)(input);
        let most = held.peak_usage().saturating_sub(before);
        let bound = (self.memory_max)(input.len());
        assert!(most <= bound, "an input of {} bytes made it hold {most} bytes, bound {bound}", input.len());
    }
}

/// Gives `bytes` to a sans-IO `step` in two pieces, as often as it takes any. `step` answers with the
/// bytes that it used, and whether it is worth asking again.
fn in_two(bytes: &[u8], cut: usize, mut step: impl FnMut(&[u8]) -> (usize, bool)) {
    let mut at = 0;
    for end in [cut.min(bytes.len()), bytes.len()] {
        loop {
            let (used, again) = step(&bytes[at..end]);
            at += used;
            assert!(at <= end, "used more than there is");
            if !again {
                break;
            }
        }
    }
}
