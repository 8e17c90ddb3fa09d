//! The model against other implementations and against itself.

mod broken;
mod goldens;
mod one_result;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_node::kernel::Dtype;
use sluice_node::model::{LoadOptions, Logits, Model, Runner, Span};
use sluice_node::state::{CacheLimits, StateCache};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn load(dir: &Path, dtype: Dtype) -> Arc<Model> {
    Arc::new(Model::load(dir, &LoadOptions { threads: 1, dtype: Some(dtype) }).expect("a golden loads"))
}

/// Logits of every position of one sequence in one pass.
fn whole(model: &Arc<Model>, ids: &[u32]) -> Vec<f32> {
    let mut cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: ids.len() });
    let slot = cache.acquire(ids.len()).expect("the cache was made for it");
    let span = Span { slot: &slot, tokens: ids, logits: Logits::All };
    let logits = Runner::new(model.clone(), 1).forward(&mut cache, &[span]).to_vec();
    cache.release(slot);
    logits
}
