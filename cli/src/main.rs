//! The one `ashlar` binary.
fn main() {}
