//! A small client side, for tests and probes: encode requests, decode replies.
