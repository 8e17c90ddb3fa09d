//! Damaged checkpoints fail to load with the name of what is wrong.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use sluice_node::model::{LoadOptions, Model};

use crate::golden;

fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(golden(name)).expect("a golden") {
        let entry = entry.expect("readable");
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("copied");
    }
    dir
}

/// The whole message of the load error, sources included.
fn failure(dir: &Path) -> String {
    let Err(error) = Model::load(dir, &LoadOptions { threads: 1, dtype: None }) else { panic!("it loaded") };
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}

fn rewrite(dir: &Path, change: impl FnOnce(&mut BTreeMap<String, TensorView<'_>>)) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("whole");
    let mut tensors: BTreeMap<String, TensorView<'_>> = tensors.tensors().into_iter().collect();
    change(&mut tensors);
    serialize_to_file(tensors, None, &path).expect("written");
}

fn check(change: impl FnOnce(&mut BTreeMap<String, TensorView<'_>>), expect: &[&str]) {
    let dir = copy_of("softmax-first");
    rewrite(dir.path(), change);
    let message = failure(dir.path());
    assert!(expect.iter().all(|part| message.contains(part)), "{message}");
}

const NORM: &str = "model.layers.1.self_attn.norm.weight";

#[test]
fn a_missing_tensor_is_named() {
    check(|tensors| drop(tensors.remove(NORM)), &[NORM, "missing"]);
}

#[test]
fn a_surplus_tensor_is_named() {
    let name = "model.layers.1.self_attn.q_norm.weight";
    let add = |tensors: &mut BTreeMap<String, TensorView<'_>>| {
        let norm = tensors[NORM].clone();
        tensors.insert(name.to_owned(), norm);
    };
    check(add, &[name, "not part of the model"]);
}

#[test]
fn a_misshaped_tensor_is_named_with_both_shapes() {
    let half = |tensors: &mut BTreeMap<String, TensorView<'_>>| {
        let norm = &tensors[NORM];
        let size = norm.shape()[0] / 2;
        let data = &norm.data()[..norm.data().len() / 2];
        // The data outlives the view because both borrow from the file's bytes.
        let data: &'static [u8] = Vec::leak(data.to_vec());
        tensors.insert(NORM.to_owned(), TensorView::new(norm.dtype(), vec![size], data).expect("consistent"));
    };
    check(half, &[NORM, "has shape", "implies"]);
}

#[test]
fn an_unsupported_dtype_is_named() {
    let retype = |tensors: &mut BTreeMap<String, TensorView<'_>>| {
        let norm = &tensors[NORM];
        let data: &'static [u8] = Vec::leak(norm.data().to_vec());
        tensors.insert(
            NORM.to_owned(),
            TensorView::new(Dtype::I16, norm.shape().to_vec(), data).expect("consistent"),
        );
    };
    check(retype, &[NORM, "i16"]);
}

#[test]
fn a_truncated_file_names_the_tensor_it_ends_in() {
    let dir = copy_of("softmax-first");
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).expect("weights");
    std::fs::write(&path, &bytes[..bytes.len() - 10]).expect("written");
    let message = failure(dir.path());
    assert!(message.contains("truncated inside tensor `model."), "{message}");
}

#[test]
fn a_file_cut_in_its_header_is_refused() {
    let dir = copy_of("softmax-first");
    std::fs::write(dir.path().join("model.safetensors"), [200, 0, 0, 0, 0, 0, 0, 0, b'{']).expect("written");
    assert!(failure(dir.path()).contains("not a whole safetensors file"));
}

#[test]
fn a_missing_shard_is_named() {
    let dir = copy_of("sharded-f16");
    std::fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).expect("removed");
    assert!(failure(dir.path()).contains("model-00002-of-00003.safetensors"));
}

#[test]
fn an_index_that_leaves_the_directory_is_refused() {
    let dir = copy_of("sharded-f16");
    let index = br#"{"weight_map": {"model.norm.weight": "../../secret.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).expect("written");
    assert!(failure(dir.path()).contains("no file name for `model.norm.weight`"));
}

#[test]
fn a_directory_without_weights_says_what_it_looked_for() {
    let dir = copy_of("softmax-first");
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    assert!(failure(dir.path()).contains("model.safetensors.index.json"));
}
