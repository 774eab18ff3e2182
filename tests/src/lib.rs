//! Interop, model and simulation tests: what they share.
//!
//! The tests themselves lie in `tests/`: `interop` runs real NBD clients against `ashlar dev`, `faults` kills, stops,
//! starves and damages its processes under load. Both meet the cluster as its users do: a binary, `dev.json`, URIs.
//!
//! Invariants: one cluster at a time on a machine (a file lock); a test that cannot run says SKIPPED and why, on
//! stderr and in `skipped.txt` of the target directory; `ASHLAR_NO_SKIP=1` makes that a failure. A failing test
//! prints the tail of every log. `ASHLAR_LONG=1` runs each test at its full length.

pub mod cluster;
pub mod damage;
pub mod metrics;
pub mod register;
pub mod tools;
