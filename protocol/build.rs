//! Makes the control plane's messages and services from `proto/`, with no protoc installed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=proto");
    #[cfg(feature = "control")]
    control();
}

#[cfg(feature = "control")]
fn control() {
    let files = ["proto/cluster.proto", "proto/mds.proto", "proto/admin.proto"];
    let descriptors = protox::compile(files, ["proto"]).expect("proto/ holds valid protobuf");
    tonic_prost_build::configure().compile_fds(descriptors).expect("code is made in OUT_DIR");
}
