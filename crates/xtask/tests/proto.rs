//! The committed gRPC code is what the proto gives. `UPDATE=1 cargo test -p xtask --test proto` writes it
//! anew; the crate that has that code need not compile for it.
#![allow(clippy::unwrap_used)]

use std::path::Path;

#[test]
fn the_committed_code_is_what_the_proto_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let protos = root.join("../../proto");
    let descriptors = protox::compile(["cortex/control/v1/control.proto"], [&protos]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure().out_dir(out.path()).compile_fds(descriptors).unwrap();
    let fresh = std::fs::read_to_string(out.path().join("cortex.control.v1.rs")).unwrap();
    let path = root.join("../control/src/generated/cortex.control.v1.rs");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == fresh, "the generated code is stale: run UPDATE=1 cargo test -p xtask --test proto");
}
