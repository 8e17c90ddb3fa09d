//! The committed code under `src/gen` is what the `.proto` files say. `UPDATE=1` writes it anew.
#![forbid(unsafe_code)]

use std::{fs, path::Path};

use prost::Message;

const FILES: [&str; 2] = ["sluice/node/v1/node.proto", "sluice/v1/chat.proto"];
const GENERATED: [&str; 3] = ["sluice.node.v1.rs", "sluice.v1.rs", "descriptors.bin"];

#[test]
fn committed_code_matches_the_proto_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh = tempfile::tempdir().expect("a temporary directory");
    let descriptors = protox::compile(FILES, [root]).expect("the .proto files compile");
    fs::write(fresh.path().join("descriptors.bin"), descriptors.encode_to_vec()).expect("write");
    tonic_prost_build::configure().out_dir(fresh.path()).compile_fds(descriptors).expect("code generation");

    for name in GENERATED {
        let committed = root.join("src/gen").join(name);
        let made = fs::read(fresh.path().join(name)).expect("generated file");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&committed, &made).expect("write generated code");
        }
        let found = fs::read(&committed).unwrap_or_default();
        assert!(found == made, "{name} is stale: run `UPDATE=1 cargo test -p sluice-proto`");
    }
}
