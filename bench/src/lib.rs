//! The fio benchmark harness behind ashlar bench.
