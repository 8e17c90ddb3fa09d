//! Models for the tests: the bundled one, a random one that never ends by itself, and copies to damage.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::binaries::{binary, profile_dir, repository, run_to_end};

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

/// A checkpoint with random weights, made by `sluice-node init` and kept in the target directory until that program
/// changes. It has the bundled model's tokenizer and no end-of-sequence token: it generates until its limit, so that
/// budgets and hang-ups have something to cut, and tokens that split UTF-8 characters are common.
pub async fn random_model() -> PathBuf {
    static MADE: OnceCell<PathBuf> = OnceCell::const_new();
    MADE.get_or_init(make_random_model).await.clone()
}

const RANDOM_MODEL: &str = "random-minimax";
/// The context of the random model: long enough that no test reaches it by accident.
const CONTEXT_TOKENS: u32 = 16_384;

async fn make_random_model() -> PathBuf {
    let config = random_config();
    let program = std::fs::metadata(binary("sluice-node")).expect("the program has metadata");
    let mut hasher = DefaultHasher::new();
    (&config, program.len(), program.modified().expect("a time of change")).hash(&mut hasher);
    let parent = profile_dir().join("test-models").join(format!("{:016x}", hasher.finish()));
    let finished = parent.join(RANDOM_MODEL);
    if finished.is_dir() {
        return finished;
    }

    // Made beside its place and moved there whole: another test run may be doing the same.
    std::fs::create_dir_all(&parent).expect("the target directory is writable");
    let making = TempDir::new_in(&parent).expect("the target directory is writable");
    let (config_path, out) = (making.path().join("config.json"), making.path().join(RANDOM_MODEL));
    std::fs::write(&config_path, &config).expect("the config is written");
    let text = |path: &Path| path.to_str().expect("target paths are UTF-8").to_owned();
    let (from, to) = (text(&config_path), text(&out));
    let args = ["init", "--config", &from, "--seed", "1", "--dtype", "bf16", "--out", &to];
    let output = run_to_end("sluice-node", args).await;
    assert!(output.status.success(), "sluice-node {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    for path in files_of(&bundled_model()) {
        let name = path.file_name().expect("files have names").to_string_lossy();
        if name.starts_with("tokenizer") || name.starts_with("chat_template") {
            std::fs::copy(&path, out.join(&*name)).expect("the file is copied");
        }
    }
    let moved = std::fs::rename(&out, &finished);
    assert!(moved.is_ok() || finished.is_dir(), "{}: {moved:?}", finished.display());
    finished
}

/// The bundled model's shape, with fewer layers and no end of sequence.
fn random_config() -> String {
    let text = std::fs::read_to_string(bundled_model().join("config.json")).expect("config.json is readable");
    let mut config: Value = serde_json::from_str(&text).expect("config.json is JSON");
    let layers = ["linear_attention", "full_attention", "linear_attention"];
    for (field, value) in [
        ("num_hidden_layers", json!(layers.len())),
        ("layer_types", json!(layers)),
        ("max_position_embeddings", json!(CONTEXT_TOKENS)),
        ("eos_token_id", Value::Null),
        // A head of its own: tied to the embeddings, random weights repeat the last token for ever.
        ("tie_word_embeddings", json!(false)),
    ] {
        config[field] = value;
    }
    config.to_string()
}

/// A copy of a model directory, for a test to damage.
pub fn copy_of(model: &Path) -> TempDir {
    let copy = TempDir::with_prefix("sluice-damaged-model-").expect("a temporary directory");
    for path in files_of(model) {
        std::fs::copy(&path, copy.path().join(path.file_name().expect("files have names"))).expect("copied");
    }
    copy
}

fn files_of(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.expect("a readable entry").path()).filter(|path| path.is_file()).collect()
}
