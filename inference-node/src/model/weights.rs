//! Weights in the shape in which a forward pass meets them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use half::{bf16, f16};

use crate::checkpoint::{Checkpoint, Layout, LoadError, Rows, Tensor};
use crate::config::LayerKind;
use crate::kernel::{Decay, Dtype, Matrix};

pub(super) struct Weights {
    pub embedding: Embedding,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    /// `[vocab, hidden]`
    pub head: Matrix,
}

pub(super) struct Layer {
    pub input_norm: Vec<f32>,
    pub mixer: Mixer,
    pub post_attention_norm: Vec<f32>,
    pub moe: Moe,
}

pub(super) enum Mixer {
    Lightning {
        /// `[heads, {q, k, v}, d]` outputs.
        qkv: Matrix,
        gate: Matrix,
        norm: Vec<f32>,
        out: Matrix,
        decay: Decay,
    },
    Softmax {
        /// `[{heads, kv_heads, kv_heads}, d]` outputs.
        qkv: Matrix,
        out: Matrix,
    },
}

pub(super) struct Moe {
    /// `[experts, hidden]`
    pub router: Matrix,
    pub experts: Vec<Expert>,
    pub shared: Option<SharedExpert>,
}

pub(super) struct Expert {
    /// `[2 * width, hidden]`: the gated half above the other.
    pub gate_up: Matrix,
    /// `[hidden, width]`
    pub down: Matrix,
}

pub(super) struct SharedExpert {
    pub expert: Expert,
    /// `[hidden]`
    pub coefficient: Vec<f32>,
}

/// Embedding rows in their dtype on disk: a pass reads one row a token, so converting them beforehand would only cost memory.
pub(super) struct Embedding {
    hidden: usize,
    values: EmbeddingValues,
}

enum EmbeddingValues {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Weights {
    /// Packs layers on `threads` threads. Every tensor was checked by [`Layout::of`].
    pub fn load(
        checkpoint: &Checkpoint,
        layout: &Layout,
        dtype: Dtype,
        threads: usize,
    ) -> Result<Weights, LoadError> {
        let config = checkpoint.config();
        let layers =
            in_parallel(config.layers.len(), threads, |index| Layer::load(checkpoint, layout, dtype, index));
        Ok(Weights {
            embedding: Embedding::load(checkpoint.tensor("model.embed_tokens.weight")?),
            layers: layers.into_iter().collect::<Result<_, _>>()?,
            norm: checkpoint.tensor("model.norm.weight")?.to_vec(),
            head: pack(dtype, &[layout.matrix(checkpoint, layout.head_name())?]),
        })
    }
}

impl Layer {
    fn load(
        checkpoint: &Checkpoint,
        layout: &Layout,
        dtype: Dtype,
        index: usize,
    ) -> Result<Layer, LoadError> {
        let config = checkpoint.config();
        let vector = |name: &str| Ok::<_, LoadError>(checkpoint.tensor(&layout.name(index, name))?.to_vec());
        let rows =
            |name: &str| layout.matrix(checkpoint, &layout.name(index, &format!("self_attn.{name}.weight")));
        let mixer = match config.layers[index] {
            LayerKind::Linear => Mixer::Lightning {
                qkv: pack(dtype, &[rows("qkv_proj")?]),
                gate: pack(dtype, &[rows("output_gate")?]),
                norm: vector("self_attn.norm.weight")?,
                out: pack(dtype, &[rows("out_proj")?]),
                decay: Decay::new(&config.slopes(index)),
            },
            LayerKind::Softmax => Mixer::Softmax {
                qkv: pack(dtype, &[rows("q_proj")?, rows("k_proj")?, rows("v_proj")?]),
                out: pack(dtype, &[rows("o_proj")?]),
            },
        };
        let expert = |expert| {
            Ok(Expert {
                gate_up: pack(dtype, &layout.gate_up(checkpoint, index, expert)?),
                down: pack(dtype, &[layout.down(checkpoint, index, expert)?]),
            })
        };
        let moe = Moe {
            // Near-ties between experts are decided here: the router stays f32.
            router: pack(Dtype::F32, &[layout.matrix(checkpoint, &layout.router_name(index))?]),
            experts: (0..config.experts).map(expert).collect::<Result<_, LoadError>>()?,
            shared: SharedExpert::load(checkpoint, layout, dtype, index)?,
        };
        Ok(Layer {
            input_norm: vector("input_layernorm.weight")?,
            mixer,
            post_attention_norm: vector("post_attention_layernorm.weight")?,
            moe,
        })
    }
}

impl SharedExpert {
    fn load(
        checkpoint: &Checkpoint,
        layout: &Layout,
        dtype: Dtype,
        layer: usize,
    ) -> Result<Option<SharedExpert>, LoadError> {
        if !layout.has_shared_expert() {
            return Ok(None);
        }
        let rows = |projection| layout.matrix(checkpoint, &layout.shared_name(layer, projection));
        Ok(Some(SharedExpert {
            expert: Expert {
                gate_up: pack(dtype, &[rows("gate_proj")?, rows("up_proj")?]),
                down: pack(dtype, &[rows("down_proj")?]),
            },
            coefficient: checkpoint.tensor(&layout.name(layer, "coefficient.weight"))?.to_vec(),
        }))
    }
}

impl Embedding {
    fn load(table: Tensor<'_>) -> Embedding {
        let values = table.to_vec();
        let values = match table.dtype() {
            "f16" => EmbeddingValues::F16(values.into_iter().map(f16::from_f32).collect()),
            "bf16" => EmbeddingValues::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            _ => EmbeddingValues::F32(values),
        };
        Embedding { hidden: table.shape[1], values }
    }

    pub fn read(&self, token: u32, out: &mut [f32]) {
        let row = token as usize * self.hidden..(token as usize + 1) * self.hidden;
        match &self.values {
            EmbeddingValues::F32(values) => out.copy_from_slice(&values[row]),
            EmbeddingValues::F16(values) => {
                out.iter_mut().zip(&values[row]).for_each(|(out, x)| *out = x.to_f32())
            }
            EmbeddingValues::Bf16(values) => {
                out.iter_mut().zip(&values[row]).for_each(|(out, x)| *out = x.to_f32())
            }
        }
    }
}

/// One matrix of the pieces stacked.
fn pack(dtype: Dtype, pieces: &[Rows<'_>]) -> Matrix {
    let rows = pieces.iter().map(|piece| piece.rows).sum();
    Matrix::pack(dtype, rows, pieces[0].columns(), |mut row, out| {
        for piece in pieces {
            if row < piece.rows {
                return piece.read(row, out);
            }
            row -= piece.rows;
        }
    })
}

/// `task(0), task(1), ...` in order, computed by a few threads.
fn in_parallel<T: Send>(tasks: usize, threads: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (next, (sender, receiver)) = (AtomicUsize::new(0), mpsc::channel());
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, tasks) {
            let (next, task, sender) = (&next, &task, sender.clone());
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= tasks || sender.send((index, task(index))).is_err() {
                        return;
                    }
                }
            });
        }
    });
    drop(sender);
    let mut done: Vec<(usize, T)> = receiver.into_iter().collect();
    done.sort_by_key(|&(index, _)| index);
    done.into_iter().map(|(_, result)| result).collect()
}
