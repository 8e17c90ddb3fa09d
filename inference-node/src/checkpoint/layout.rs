//! Where each weight of the model lives in a checkpoint: the two tensor naming generations behind one face.
//!
//! | weight | transformers 5 | official code, older transformers |
//! | --- | --- | --- |
//! | router | `mlp.gate.weight` | `block_sparse_moe.gate.weight` |
//! | experts | `mlp.experts.{gate_up_proj,down_proj}` `[E, 2I, H]`, `[E, H, I]` | `block_sparse_moe.experts.E.{w1,w3,w2}.weight` |
//! | shared expert | none | `shared_mlp.{gate,up,down}_proj.weight`, `coefficient.weight` |
//!
//! `w1` is the gated half and `w3` the other; fused, `w1` stands above `w3`.

use std::collections::BTreeSet;

use super::{Checkpoint, LoadError, Tensor};
use crate::config::{Family, LayerKind, ModelConfig};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    Fused,
    Split,
}

#[derive(Clone, Debug)]
pub struct Layout {
    config: ModelConfig,
    /// Module name of the mixture in every layer: `mlp` or `block_sparse_moe`.
    moe: &'static str,
    experts: Experts,
    /// Width of the shared expert, when there is one.
    shared: Option<usize>,
}

/// A tensor that the model needs. Shapes are row-major, last dimension fastest.
#[derive(Clone, Debug)]
pub struct Part {
    pub name: String,
    pub shape: Vec<usize>,
}

/// `rows` rows of a tensor, seen as a matrix over its last dimension.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub tensor: Tensor<'a>,
    pub first: usize,
    pub rows: usize,
}

impl Rows<'_> {
    pub fn columns(&self) -> usize {
        self.tensor.shape.last().copied().unwrap_or(1)
    }

    pub fn read(&self, row: usize, out: &mut [f32]) {
        self.tensor.read((self.first + row) * self.columns(), out);
    }
}

impl Layout {
    /// The layout a new checkpoint of this configuration is written in.
    pub fn native(config: &ModelConfig) -> Layout {
        let (moe, experts) = match config.family {
            Family::Transformers => ("mlp", Experts::Fused),
            Family::Official => ("block_sparse_moe", Experts::Split),
        };
        Layout { config: config.clone(), moe, experts, shared: config.shared_intermediate_size }
    }

    /// Finds the layout of an existing checkpoint and checks every tensor in it: names, shapes, dtypes, no surplus.
    pub fn of(checkpoint: &Checkpoint) -> Result<Layout, LoadError> {
        let config = checkpoint.config();
        let native = Layout::native(config);
        let holds = |moe: &str, tensor: &str| checkpoint.contains(&format!("model.layers.0.{moe}.{tensor}"));
        let known = ["mlp", "block_sparse_moe"];
        let moe = known.into_iter().find(|moe| holds(moe, "gate.weight")).unwrap_or(native.moe);
        let experts = match (holds(moe, "experts.gate_up_proj"), holds(moe, "experts.0.w1.weight")) {
            (true, _) => Experts::Fused,
            (false, true) => Experts::Split,
            (false, false) => native.experts,
        };
        let mut layout = Layout { moe, experts, ..native };
        layout.shared = layout.shared_width(checkpoint)?;
        let mut names = BTreeSet::new();
        for part in layout.parts() {
            checkpoint.shaped(&part.name, &part.shape)?.checked()?;
            names.insert(part.name);
        }
        if config.tied_embeddings {
            names.insert("lm_head.weight".to_owned());
        }
        checkpoint.reject_extra(&names)?;
        Ok(layout)
    }

    /// The published modeling file builds the shared expert as wide as a routed one, servers take `shared_intermediate_size`:
    /// the file may follow either.
    fn shared_width(&self, checkpoint: &Checkpoint) -> Result<Option<usize>, LoadError> {
        let Some(declared) = self.shared else { return Ok(None) };
        let found = checkpoint.tensor(&self.shared_name(0, "gate_proj"))?.shape[0];
        Ok(Some(if found == self.config.intermediate_size { found } else { declared }))
    }

    pub fn has_shared_expert(&self) -> bool {
        self.shared.is_some()
    }

    /// Every tensor of the model, in the order a new file holds them.
    pub fn parts(&self) -> Vec<Part> {
        let config = &self.config;
        let hidden = config.hidden_size;
        let mut parts = Vec::new();
        let mut part = |name: String, shape: &[usize]| parts.push(Part { name, shape: shape.to_vec() });
        part("model.embed_tokens.weight".to_owned(), &[config.vocab_size, hidden]);
        for layer in 0..config.layers.len() {
            part(self.name(layer, "input_layernorm.weight"), &[hidden]);
            for (name, rows, columns) in self.attention_shapes(layer) {
                part(self.name(layer, &format!("self_attn.{name}.weight")), &[rows, columns]);
            }
            if config.layers[layer] == LayerKind::Linear {
                part(self.name(layer, "self_attn.norm.weight"), &[config.attention_size()]);
            }
            part(self.name(layer, "post_attention_layernorm.weight"), &[hidden]);
            part(self.router_name(layer), &[config.experts, hidden]);
            let (experts, width) = (config.experts, config.intermediate_size);
            match self.experts {
                Experts::Fused => {
                    part(self.fused_name(layer, "gate_up_proj"), &[experts, 2 * width, hidden]);
                    part(self.fused_name(layer, "down_proj"), &[experts, hidden, width]);
                }
                Experts::Split => {
                    for expert in 0..experts {
                        part(self.split_name(layer, expert, "w1"), &[width, hidden]);
                        part(self.split_name(layer, expert, "w2"), &[hidden, width]);
                        part(self.split_name(layer, expert, "w3"), &[width, hidden]);
                    }
                }
            }
            if let Some(shared) = self.shared {
                part(self.shared_name(layer, "gate_proj"), &[shared, hidden]);
                part(self.shared_name(layer, "up_proj"), &[shared, hidden]);
                part(self.shared_name(layer, "down_proj"), &[hidden, shared]);
                part(self.name(layer, "coefficient.weight"), &[1, hidden]);
            }
        }
        part("model.norm.weight".to_owned(), &[hidden]);
        if !config.tied_embeddings {
            part("lm_head.weight".to_owned(), &[config.vocab_size, hidden]);
        }
        parts
    }

    pub fn head_name(&self) -> &'static str {
        if self.config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" }
    }

    pub fn name(&self, layer: usize, tensor: &str) -> String {
        format!("model.layers.{layer}.{tensor}")
    }

    pub fn router_name(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.gate.weight", self.moe)
    }

    pub fn matrix<'c>(&self, checkpoint: &'c Checkpoint, name: &str) -> Result<Rows<'c>, LoadError> {
        let tensor = checkpoint.tensor(name)?;
        Ok(Rows { tensor, first: 0, rows: tensor.shape[0] })
    }

    /// `w1` over `w3` of one expert: `[2 * intermediate, hidden]` in one or two pieces.
    pub fn gate_up<'c>(
        &self,
        checkpoint: &'c Checkpoint,
        layer: usize,
        expert: usize,
    ) -> Result<Vec<Rows<'c>>, LoadError> {
        let rows = 2 * self.config.intermediate_size;
        match self.experts {
            Experts::Fused => {
                let tensor = checkpoint.tensor(&self.fused_name(layer, "gate_up_proj"))?;
                Ok(vec![Rows { tensor, first: expert * rows, rows }])
            }
            Experts::Split => ["w1", "w3"]
                .into_iter()
                .map(|weight| self.matrix(checkpoint, &self.split_name(layer, expert, weight)))
                .collect(),
        }
    }

    /// `w2` of one expert: `[hidden, intermediate]`.
    pub fn down<'c>(
        &self,
        checkpoint: &'c Checkpoint,
        layer: usize,
        expert: usize,
    ) -> Result<Rows<'c>, LoadError> {
        match self.experts {
            Experts::Fused => {
                let rows = self.config.hidden_size;
                let tensor = checkpoint.tensor(&self.fused_name(layer, "down_proj"))?;
                Ok(Rows { tensor, first: expert * rows, rows })
            }
            Experts::Split => self.matrix(checkpoint, &self.split_name(layer, expert, "w2")),
        }
    }

    pub fn shared_name(&self, layer: usize, projection: &str) -> String {
        format!("model.layers.{layer}.shared_mlp.{projection}.weight")
    }

    fn fused_name(&self, layer: usize, weight: &str) -> String {
        format!("model.layers.{layer}.{}.experts.{weight}", self.moe)
    }

    fn split_name(&self, layer: usize, expert: usize, weight: &str) -> String {
        format!("model.layers.{layer}.{}.experts.{expert}.{weight}.weight", self.moe)
    }

    fn attention_shapes(&self, layer: usize) -> Vec<(&'static str, usize, usize)> {
        let (hidden, all) = (self.config.hidden_size, self.config.attention_size());
        let kv = self.config.kv_heads * self.config.head_dim;
        match self.config.layers[layer] {
            LayerKind::Linear => {
                vec![("qkv_proj", 3 * all, hidden), ("output_gate", all, hidden), ("out_proj", hidden, all)]
            }
            LayerKind::Softmax => {
                vec![
                    ("q_proj", all, hidden),
                    ("k_proj", kv, hidden),
                    ("v_proj", kv, hidden),
                    ("o_proj", hidden, all),
                ]
            }
        }
    }
}
