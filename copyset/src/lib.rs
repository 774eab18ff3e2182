//! Raft as a pure state machine: one replica of one copyset. No IO, clock or randomness of its own.
