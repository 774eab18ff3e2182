//! The storage daemon: shards, the driver that joins them to the reactor, exports, metrics.
