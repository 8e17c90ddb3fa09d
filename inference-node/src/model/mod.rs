//! A loaded model: immutable weights, packed once for the kernels, shared by every [`Runner`].

mod reference;
mod runner;
mod weights;

use std::path::Path;

use crate::checkpoint::{Checkpoint, Layout, LoadError};
use crate::config::ModelConfig;
use crate::kernel::{Cpu, Dtype};
use crate::state::StateShape;
use weights::Weights;

pub use reference::reference_logits;
pub use runner::{Cost, Logits, Runner, Span};

#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Threads that pack the weights.
    pub threads: usize,
    /// What to store and multiply weights as. `None` is the checkpoint's own: bf16 where it is bf16, else f32.
    pub dtype: Option<Dtype>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        LoadOptions { threads, dtype: None }
    }
}

pub struct Model {
    config: ModelConfig,
    weights: Weights,
    content_hash: String,
    dtype: Dtype,
    parameters: u64,
    active_parameters: u64,
}

impl Model {
    /// Reads a Hugging Face directory: `config.json` and safetensors weights, single or sharded.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
        let checkpoint = Checkpoint::open(dir)?;
        let layout = Layout::of(&checkpoint)?;
        let parts = layout.parts();
        let parameters = parts.iter().map(|part| part.elements()).sum();
        // Of the routed experts a token meets `experts_per_token`; of a separate embedding table one row, counted as none.
        let config = checkpoint.config().clone();
        let expert = 3 * config.intermediate_size as u64 * config.hidden_size as u64;
        let idle = config.layers.len() as u64 * (config.experts - config.experts_per_token) as u64 * expert;
        let dtype = options.dtype.unwrap_or(match checkpoint.tensor(&parts[0].name)?.dtype() {
            "bf16" => Dtype::Bf16,
            _ => Dtype::F32,
        });
        Ok(Model {
            weights: Weights::load(&checkpoint, &layout, dtype, options.threads)?,
            content_hash: checkpoint.content_hash()?,
            dtype,
            parameters,
            active_parameters: parameters - idle,
            config,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// SHA-256 (hex) over configuration, tokenizer and weights: equal hashes give equal answers.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Parameters that take part in one token.
    pub fn active_parameters(&self) -> u64 {
        self.active_parameters
    }

    /// What the weights are stored and multiplied as.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Kind of arithmetic: results are bit-identical between models of one content on kernels of one name.
    pub fn kernel_name(&self) -> &'static str {
        Cpu::kind(self.dtype)
    }

    /// State of one sequence that does not grow: lightning states and open blocks.
    pub fn state_bytes_per_sequence(&self) -> u64 {
        StateShape::new(&self.config).sequence_bytes()
    }

    /// Softmax keys and values of one token.
    pub fn cache_bytes_per_token(&self) -> u64 {
        StateShape::new(&self.config).token_bytes()
    }
}
