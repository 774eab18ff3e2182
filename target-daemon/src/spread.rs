//! Spreads hosts' connections over the shards of a target.
//!
//! All shards wait on the same listeners, and the kernel gives a connection to whichever it likes. Who gets one asks here whose
//! it is to be: the shard's with the fewest that carry IO. An admin queue counts until its Connect tells what it is, so that
//! a host of one IO queue after the other does not fill one shard with admin queues and the next with all of the IO.
//!
//! Invariants: a place counts from when it is given until it is dropped; a shard gets connections only of its own until it
//! says that it serves, since one that replays its log may take long until then. Two shards that ask at the same moment may choose the
//! same; nothing but evenness depends on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a shard that does not serve yet counts more.
const CLOSED: u32 = 1 << 31;

/// One shard's view of all of them.
#[derive(Clone, Debug)]
pub struct Spread {
    queues: Arc<[AtomicU32]>,
    me: u16,
}

/// Where a connection is served; given up when dropped.
#[derive(Debug)]
pub struct Place {
    queues: Arc<[AtomicU32]>,
    shard: u16,
}

impl Spread {
    /// One for each shard of a target; none serves yet.
    pub fn over(shards: usize) -> impl Iterator<Item = Self> {
        let queues: Arc<[AtomicU32]> = (0..shards).map(|_| AtomicU32::new(CLOSED)).collect();
        (0..shards as u16).map(move |me| Self { queues: queues.clone(), me })
    }

    /// This shard serves from now on, which it says once.
    pub fn open(&self) {
        self.queues[usize::from(self.me)].fetch_sub(CLOSED, Ordering::Relaxed);
    }

    /// For the next connection: where there are fewest; here, if nowhere are fewer.
    pub fn place(&self) -> Place {
        let count =
            |shard: &u16| (self.queues[usize::from(*shard)].load(Ordering::Relaxed), *shard != self.me);
        let fewest = (0..self.queues.len() as u16).min_by_key(count);
        self.at(fewest.unwrap_or(self.me))
    }

    /// For a connection that can only be served here.
    pub fn here(&self) -> Place {
        self.at(self.me)
    }

    fn at(&self, shard: u16) -> Place {
        self.queues[usize::from(shard)].fetch_add(1, Ordering::Relaxed);
        Place { queues: self.queues.clone(), shard }
    }
}

impl Place {
    /// Which shard it is on.
    pub fn shard(&self) -> u16 {
        self.shard
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queues[usize::from(self.shard)].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Admin queue, then an IO queue, for one host after the other, wherever the kernel puts them.
    #[test]
    fn io_queues_of_hosts_with_one_each_lie_evenly_on_all_shards() {
        for shards in 1..=4 {
            let spread: Vec<_> = Spread::over(shards).collect();
            spread.iter().for_each(Spread::open);
            let mut of_shard = vec![0; shards];
            let mut io = Vec::new();
            for nth in 0..12 * shards {
                let admin = spread[nth % shards].place();
                drop(admin); // Its Connect has told what it is.
                let queue = spread[nth * 7 % shards].place();
                of_shard[usize::from(queue.shard())] += 1;
                io.push(queue);
            }
            assert_eq!(of_shard, vec![12; shards]);
        }
    }

    #[test]
    fn what_is_over_makes_room_and_whoever_asks_is_preferred_among_equals() {
        let [one, two] = Spread::over(2).collect::<Vec<_>>().try_into().unwrap();
        one.open();
        two.open();
        let first = two.place();
        assert_eq!(first.shard(), 1);
        assert_eq!(two.place().shard(), 0, "there are fewer");
        let kept = (one.place(), two.here());
        assert_eq!((kept.0.shard(), kept.1.shard()), (0, 1));
        drop(first);
        assert_eq!(one.place().shard(), 0, "one each");
        drop(kept.1);
        assert_eq!(one.place().shard(), 1);
    }

    #[test]
    fn a_shard_that_does_not_serve_yet_is_given_nothing() {
        let [one, two] = Spread::over(2).collect::<Vec<_>>().try_into().unwrap();
        one.open();
        let before: Vec<Place> = (0..3).map(|_| one.place()).collect();
        assert!(before.iter().all(|place| place.shard() == 0));
        two.open();
        assert_eq!(one.place().shard(), 1);
    }
}
