//! The whole model as a float64 recurrence, one token at a time, straight from the checkpoint: slow, obvious, and sharing no
//! arithmetic with the engine. Tests measure the engine against it.
//!
//! It takes the equations of MiniMax-01 (arXiv 2501.08313): the state decays first, the current token is not decayed.

use crate::checkpoint::{Checkpoint, Layout, LoadError, Rows};
use crate::config::{LayerKind, ModelConfig};

/// Logits `[ids, vocab]` of one sequence from an empty state.
pub fn reference_logits(checkpoint: &Checkpoint, ids: &[u32]) -> Result<Vec<Vec<f64>>, LoadError> {
    let reference = Reference { checkpoint, layout: Layout::of(checkpoint)?, config: checkpoint.config() };
    let layers = (0..reference.config.layers.len())
        .map(|index| reference.load(index))
        .collect::<Result<Vec<_>, _>>()?;
    let embedding = dense(&[reference.layout.matrix(checkpoint, "model.embed_tokens.weight")?]);
    let head = dense(&[reference.layout.matrix(checkpoint, reference.layout.head_name())?]);
    let norm = wide(checkpoint.tensor("model.norm.weight")?.to_vec());
    let mut memories: Vec<Memory> = layers.iter().map(|_| Memory::default()).collect();
    let mut logits = Vec::new();
    for (position, &id) in ids.iter().enumerate() {
        let mut x = embedding[id as usize].clone();
        for (layer, memory) in layers.iter().zip(&mut memories) {
            x = reference.layer(layer, memory, position, x);
        }
        logits.push(times(&head, &rms_norm(&x, &norm, f64::from(reference.config.rms_norm_eps))));
    }
    Ok(logits)
}

struct Reference<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    config: &'a ModelConfig,
}

type Dense = Vec<Vec<f64>>;

struct Layer {
    kind: LayerKind,
    slopes: Vec<f64>,
    input_norm: Vec<f64>,
    /// `qkv_proj` of a lightning layer; q, k and v stacked of a softmax layer.
    qkv: Dense,
    gate: Dense,
    mixer_norm: Vec<f64>,
    out: Dense,
    post_norm: Vec<f64>,
    router: Dense,
    /// `w1` over `w3`, and `w2`.
    experts: Vec<(Dense, Dense)>,
    shared: Option<((Dense, Dense), Vec<f64>)>,
}

/// Lightning: one `[d][d]` state a head. Softmax: all keys and values so far, `[tokens][kv_heads * d]`.
#[derive(Default)]
struct Memory {
    states: Vec<Dense>,
    keys: Dense,
    values: Dense,
}

impl Reference<'_> {
    fn load(&self, index: usize) -> Result<Layer, LoadError> {
        let vector = |name: &str| {
            Ok::<_, LoadError>(wide(self.checkpoint.tensor(&self.layout.name(index, name))?.to_vec()))
        };
        let attention = |name: &str| {
            self.layout.matrix(self.checkpoint, &self.layout.name(index, &format!("self_attn.{name}.weight")))
        };
        let shared = |name: &str| self.layout.matrix(self.checkpoint, &self.layout.shared_name(index, name));
        let kind = self.config.layers[index];
        let (qkv, gate, mixer_norm, out) = match kind {
            LayerKind::Linear => (
                dense(&[attention("qkv_proj")?]),
                dense(&[attention("output_gate")?]),
                vector("self_attn.norm.weight")?,
                dense(&[attention("out_proj")?]),
            ),
            LayerKind::Softmax => {
                let qkv = dense(&[attention("q_proj")?, attention("k_proj")?, attention("v_proj")?]);
                (qkv, Vec::new(), Vec::new(), dense(&[attention("o_proj")?]))
            }
        };
        let expert = |expert| {
            let gate_up = dense(&self.layout.gate_up(self.checkpoint, index, expert)?);
            Ok((gate_up, dense(&[self.layout.down(self.checkpoint, index, expert)?])))
        };
        let shared = match self.layout.has_shared_expert() {
            true => {
                let pair =
                    (dense(&[shared("gate_proj")?, shared("up_proj")?]), dense(&[shared("down_proj")?]));
                Some((pair, vector("coefficient.weight")?))
            }
            false => None,
        };
        Ok(Layer {
            kind,
            slopes: self.config.slopes(index),
            input_norm: vector("input_layernorm.weight")?,
            qkv,
            gate,
            mixer_norm,
            out,
            post_norm: vector("post_attention_layernorm.weight")?,
            router: dense(&[self.layout.matrix(self.checkpoint, &self.layout.router_name(index))?]),
            experts: (0..self.config.experts).map(expert).collect::<Result<_, LoadError>>()?,
            shared,
        })
    }

    fn layer(&self, layer: &Layer, memory: &mut Memory, position: usize, x: Vec<f64>) -> Vec<f64> {
        let eps = f64::from(self.config.rms_norm_eps);
        let h = rms_norm(&x, &layer.input_norm, eps);
        let (mixed, weights) = match layer.kind {
            LayerKind::Linear => (self.lightning(layer, memory, &h), self.config.linear_attention),
            LayerKind::Softmax => (self.softmax(layer, memory, position, &h), self.config.softmax_attention),
        };
        let residual = if self.config.postnorm { &h } else { &x };
        let y = blend(residual, &mixed, f64::from(weights.alpha), f64::from(weights.beta));
        let g = rms_norm(&y, &layer.post_norm, eps);
        let residual = if self.config.postnorm { &g } else { &y };
        let moe = self.config.moe;
        blend(residual, &self.mixture(layer, &g), f64::from(moe.alpha), f64::from(moe.beta))
    }

    fn lightning(&self, layer: &Layer, memory: &mut Memory, h: &[f64]) -> Vec<f64> {
        let d = self.config.head_dim;
        let qkv: Vec<f64> = times(&layer.qkv, h).into_iter().map(silu).collect();
        memory.states.resize(self.config.heads, vec![vec![0.0; d]; d]);
        let mut attended = Vec::new();
        for (head, state) in memory.states.iter_mut().enumerate() {
            let [q, k, v] = [0, 1, 2].map(|part| &qkv[(3 * head + part) * d..][..d]);
            let decay = (-layer.slopes[head]).exp();
            for x in 0..d {
                (0..d).for_each(|y| state[x][y] = decay * state[x][y] + k[x] * v[y]);
            }
            attended.extend((0..d).map(|y| (0..d).map(|x| q[x] * state[x][y]).sum::<f64>()));
        }
        let gate = times(&layer.gate, h);
        let normed = rms_norm(&attended, &layer.mixer_norm, 1e-6);
        let gated: Vec<f64> = normed.iter().zip(&gate).map(|(o, g)| o / (1.0 + (-g).exp())).collect();
        times(&layer.out, &gated)
    }

    fn softmax(&self, layer: &Layer, memory: &mut Memory, position: usize, h: &[f64]) -> Vec<f64> {
        let ModelConfig { heads, kv_heads, head_dim: d, .. } = *self.config;
        let mut qkv = times(&layer.qkv, h);
        qkv.chunks_exact_mut(d).take(heads + kv_heads).for_each(|head| self.rotate(head, position));
        let (q, kv) = qkv.split_at(heads * d);
        let (k, v) = kv.split_at(kv_heads * d);
        memory.keys.push(k.to_vec());
        memory.values.push(v.to_vec());
        let mut attended = Vec::new();
        for head in 0..heads {
            let own = head / (heads / kv_heads) * d;
            let dot =
                |k: &Vec<f64>| (0..d).map(|i| q[head * d + i] * k[own + i]).sum::<f64>() / (d as f64).sqrt();
            let scores: Vec<f64> = memory.keys.iter().map(dot).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let value =
                |i: usize| weights.iter().zip(&memory.values).map(|(w, v)| w * v[own + i]).sum::<f64>();
            attended.extend((0..d).map(|i| value(i) / total));
        }
        times(&layer.out, &attended)
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = self.config.rotary_dim / 2;
        for i in 0..half {
            let angle = position as f64
                * self.config.rope_theta.powf(-2.0 * i as f64 / self.config.rotary_dim as f64);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + half] = b * angle.cos() + a * angle.sin();
        }
    }

    fn mixture(&self, layer: &Layer, g: &[f64]) -> Vec<f64> {
        let scores = times(&layer.router, g);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.config.experts_per_token);
        let total: f64 = order.iter().map(|&expert| scores[expert].exp()).sum();
        let mut sum = vec![0.0; g.len()];
        for expert in order {
            let weight = scores[expert].exp() / total;
            sum.iter_mut()
                .zip(feed_forward(&layer.experts[expert], g))
                .for_each(|(sum, y)| *sum += weight * y);
        }
        let Some((shared, coefficient)) = &layer.shared else { return sum };
        let share = 1.0 / (1.0 + (-g.iter().zip(coefficient).map(|(g, c)| g * c).sum::<f64>()).exp());
        blend(&sum, &feed_forward(shared, g), 1.0 - share, share)
    }
}

fn feed_forward((gate_up, down): &(Dense, Dense), x: &[f64]) -> Vec<f64> {
    let both = times(gate_up, x);
    let (gate, up) = both.split_at(both.len() / 2);
    times(down, &gate.iter().zip(up).map(|(&gate, up)| silu(gate) * up).collect::<Vec<_>>())
}

fn times(matrix: &Dense, x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / scale * w).collect()
}

fn blend(a: &[f64], b: &[f64], alpha: f64, beta: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| alpha * a + beta * b).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn wide(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

fn dense(pieces: &[Rows<'_>]) -> Dense {
    let row = |piece: &Rows<'_>, row: usize| {
        let mut values = vec![0.0; piece.columns()];
        piece.read(row, &mut values);
        wide(values)
    };
    pieces.iter().flat_map(|piece| (0..piece.rows).map(move |index| row(piece, index))).collect()
}
