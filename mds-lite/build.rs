//! Makes the client of etcd from `proto/`, with no protoc installed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/etcd.proto"], ["proto"]).expect("proto/ holds valid protobuf");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)
        .expect("code is made in OUT_DIR");
}
