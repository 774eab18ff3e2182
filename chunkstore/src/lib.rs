//! What a shard stores and how: log, slots, overlay, checkpoint, recovery, as pure planning.
