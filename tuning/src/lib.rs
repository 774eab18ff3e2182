//! The tuning checks behind ashlar tune.
