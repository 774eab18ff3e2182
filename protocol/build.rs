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
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it"));
    let bytes = prost::Message::encode_to_vec(&descriptors);
    std::fs::write(out.join("descriptors.bin"), bytes).expect("OUT_DIR can be written");
    tonic_prost_build::configure().compile_fds(descriptors).expect("code is made in OUT_DIR");
}
