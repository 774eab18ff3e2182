//! Socket loops between the reactor and the sans-IO protocols.
