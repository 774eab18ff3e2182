//! Interop, model and simulation tests: what they share.
//!
//! The tests themselves lie in `tests/`: `interop` runs real NBD clients against `ashlar dev`, `faults` kills, stops,
//! starves and damages its processes under load, `operator` drains and loses targets, `etcd` kills the leaders of a
//! control plane of several MDS, `nvme` attaches
//! the Linux kernel's NVMe/TCP initiator in a virtual machine. All meet the cluster as its users do: a binary, `dev.json`, URIs.
//!
//! Invariants: one cluster at a time on a machine (a file lock); a test that cannot run says SKIPPED and why, on
//! stderr and in `skipped.txt` of the target directory, which `cargo xtask test` prints; `ASHLAR_NO_SKIP=1` makes that a failure. A failing test
//! prints the tail of every log. `ASHLAR_LONG=1` runs each test at its full length.
//!
//! Further settings by environment: `ASHLAR_BIN` (the binary to test; without it a release build is made, or with
//! `ASHLAR_PROFILE=dev` a debug one), `ASHLAR_TEST_DIR` (where clusters lie; the target directory without it),
//! `ASHLAR_KEEP=1` (a failed test leaves its cluster's directory behind).

pub mod chaos;
pub mod cluster;
pub mod damage;
pub mod delay;
pub mod fuzz;
pub use bench::metrics;
pub mod nbd;
pub mod register;
pub mod several;
pub mod sim;
pub mod tools;
pub mod vm;
