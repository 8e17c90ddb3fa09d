//! Models for the tests: the bundled one, a random one that never ends by itself, and copies to damage.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::binaries::{repository, run_to_json};

/// The model that `sluice up` serves by default.
pub fn bundled_model() -> PathBuf {
    let models = repository().join("inference-node/models");
    let mut found: Vec<PathBuf> = std::fs::read_dir(&models)
        .unwrap_or_else(|error| panic!("{}: {error}", models.display()))
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    found.sort();
    assert_eq!(found.len(), 1, "one model is bundled in {}: {found:?}", models.display());
    found.remove(0)
}

/// A checkpoint with random weights, made once per test run by `sluice-node init`. It has the bundled model's
/// tokenizer and no end-of-sequence token: it generates until its limit, so that budgets and hang-ups have
/// something to cut, and tokens that split UTF-8 characters are common.
pub async fn random_model() -> PathBuf {
    static MADE: OnceCell<TempDir> = OnceCell::const_new();
    let folder = MADE.get_or_init(make_random_model).await;
    folder.path().join(RANDOM_MODEL)
}

async fn make_random_model() -> TempDir {
    let bundled = bundled_model();
    let text =
        std::fs::read_to_string(bundled.join("config.json")).expect("the bundled model has a config.json");
    let mut config: Value = serde_json::from_str(&text).expect("config.json is JSON");
    let layers = ["linear_attention", "full_attention", "linear_attention"];
    for (field, value) in [
        ("num_hidden_layers", json!(layers.len())),
        ("layer_types", json!(layers)),
        ("max_position_embeddings", json!(CONTEXT_TOKENS)),
        ("eos_token_id", Value::Null),
    ] {
        config[field] = value;
    }
    let folder = TempDir::with_prefix("sluice-random-model-").expect("a temporary directory");
    let config_path = folder.path().join("config.json");
    std::fs::write(&config_path, config.to_string()).expect("the config is written");
    let out = folder.path().join(RANDOM_MODEL);
    let (config_path, out_path) = (path_text(&config_path), path_text(&out));
    run_to_json(
        "sluice-node",
        ["init", "--config", config_path, "--seed", "1", "--dtype", "bf16", "--out", out_path, "--json"],
    )
    .await;
    for entry in std::fs::read_dir(&bundled).expect("the bundled model is readable") {
        let path = entry.expect("a readable entry").path();
        let name = path.file_name().expect("files have names").to_string_lossy().into_owned();
        let is_tokenizer = name.starts_with("tokenizer") || name.starts_with("chat_template");
        if is_tokenizer {
            std::fs::copy(&path, out.join(name)).expect("the file is copied");
        }
    }
    folder
}

const RANDOM_MODEL: &str = "random-minimax";
/// The context of the random model: long enough that no test reaches it by accident.
const CONTEXT_TOKENS: u32 = 16_384;

/// A copy of a model directory, for a test to damage.
pub fn copy_of(model: &Path) -> TempDir {
    let copy = TempDir::with_prefix("sluice-damaged-model-").expect("a temporary directory");
    for entry in std::fs::read_dir(model).expect("the model is readable") {
        let path = entry.expect("a readable entry").path();
        if path.is_file() {
            std::fs::copy(&path, copy.path().join(path.file_name().expect("a name"))).expect("copied");
        }
    }
    copy
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}
