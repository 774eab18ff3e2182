//! The control plane's messages and services (MDS, target admin).
//!
//! [`pb`] is made from `proto/`.

/// The messages and services as generated; comments are in `proto/*.proto`.
pub mod pb {
    #![allow(missing_docs, rust_2018_idioms, clippy::all)]
    tonic::include_proto!("ashlar.v1");
}
