//! Interop, model and simulation tests.
