//! One forward pass over ragged spans: tokens of several sequences, each continuing its own state, without padding.
//!
//! ```text
//! spans   [ seq A: 200 prompt tokens | seq B: 1 token | seq C: 1 token ]   = 202 rows
//! dense   every projection, norm and expert sees the rows together
//! mixers  each sequence's rows meet its own state on the block grid
//! ```
//!
//! A row's result depends on its sequence alone, bit for bit (see [`crate::kernel`]).

use std::sync::Arc;

use super::Model;
use super::weights::{Expert, Layer, Mixer, Moe};
use crate::config::{LayerKind, ModelConfig};
use crate::kernel::{AttentionSpan, Cpu, Group, Heads, Kernel, LightningSpan, Matrix, Pick, Rotations};
use crate::state::{BLOCK_TOKENS, Sequence, Slot, StateCache};

/// Epsilon of the norm inside lightning attention: the default of its class in every published implementation.
const LIGHTNING_NORM_EPS: f32 = 1e-6;

/// Consecutive new tokens of one sequence.
pub struct Span<'a> {
    /// In at most one span of a pass, with room for the tokens.
    pub slot: &'a Slot,
    /// At least one, each below the vocabulary size.
    pub tokens: &'a [u32],
    pub logits: Logits,
}

/// Which rows of logits a span is to yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    None,
    Last,
    All,
}

/// Runs passes of one model. Owns the scratch buffers and the thread pool: one per engine thread.
pub struct Runner {
    model: Arc<Model>,
    kernel: Box<dyn Kernel>,
    buffers: Buffers,
    cost: Cost,
}

/// What passes had to move and compute at the least: the floor of their time is `bytes / bandwidth` or `multiply_adds / peak`,
/// whichever is longer. Each weight matrix counts once a pass that meets it, each state and each key and value once a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    pub weight_bytes: u64,
    pub state_bytes: u64,
    pub multiply_adds: u64,
}

impl std::ops::Sub for Cost {
    type Output = Cost;

    fn sub(self, earlier: Cost) -> Cost {
        Cost {
            weight_bytes: self.weight_bytes - earlier.weight_bytes,
            state_bytes: self.state_bytes - earlier.state_bytes,
            multiply_adds: self.multiply_adds - earlier.multiply_adds,
        }
    }
}

impl Cost {
    fn product(&mut self, matrix: &Matrix, rows: usize) {
        self.weight_bytes += matrix.bytes();
        self.multiply_adds += (rows * matrix.rows() * matrix.columns()) as u64;
    }

    /// States are read, and written where a block closes; the open block's keys and values are read.
    fn lightning(&mut self, heads: Heads, spans: &[LightningSpan<'_>]) {
        let d = heads.head_dim;
        for span in spans {
            let (open, end) = (span.position % BLOCK_TOKENS, span.position + span.rows);
            let closed = end / BLOCK_TOKENS - span.position / BLOCK_TOKENS;
            let floats = d * d * (1 + usize::from(closed > 0)) + 2 * d * (open + span.rows).min(BLOCK_TOKENS);
            self.state_bytes += (heads.heads * floats * size_of::<f32>()) as u64;
            let within: usize = (span.position..end).map(|position| position % BLOCK_TOKENS + 1).sum();
            let each_head = span.rows * d * d + 2 * d * within + closed * BLOCK_TOKENS * d * d;
            self.multiply_adds += (heads.heads * each_head) as u64;
        }
    }

    fn attention(&mut self, heads: Heads, spans: &[AttentionSpan<'_>]) {
        for span in spans {
            let end = span.position + span.rows;
            let keys_and_values = 2 * heads.kv_heads * heads.head_dim * end;
            self.state_bytes += (keys_and_values * size_of::<f32>()) as u64;
            let seen = span.rows * span.position + span.rows * (span.rows + 1) / 2;
            self.multiply_adds += (2 * heads.heads * heads.head_dim * seen) as u64;
        }
    }
}

/// Activations, row-major f32, kept from pass to pass. They only grow: to what the largest pass needed.
#[derive(Default)]
struct Buffers {
    /// The stream of hidden states and its normed value, `[rows, hidden]`.
    hidden: Vec<f32>,
    normed: Vec<f32>,
    /// What a mixer or mixture adds, `[rows, hidden]`.
    branch: Vec<f32>,
    qkv: Vec<f32>,
    gate: Vec<f32>,
    /// `[rows, heads * d]`
    attended: Vec<f32>,
    router: Vec<f32>,
    picks: Vec<Pick>,
    /// Row of each pick in the expert-sorted order.
    places: Vec<u32>,
    /// Rows in expert-sorted order: inputs, both halves, activated, outputs.
    routed: Vec<f32>,
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    expert_out: Vec<f32>,
    logits: Vec<f32>,
}

impl Runner {
    pub fn new(model: Arc<Model>, threads: usize) -> Runner {
        Runner::with_kernel(model, Box::new(Cpu::new(threads)))
    }

    pub(crate) fn with_kernel(model: Arc<Model>, kernel: Box<dyn Kernel>) -> Runner {
        Runner { model, kernel, buffers: Buffers::default(), cost: Cost::default() }
    }

    /// What all passes so far cost at the least.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Advances every span's sequence by its tokens. Returns `[rows, vocab]` logits in span order: no row, the last, or one a token,
    /// as each span asked.
    pub fn forward(&mut self, cache: &mut StateCache, spans: &[Span<'_>]) -> &[f32] {
        let mut sequences: Vec<Sequence> =
            spans.iter().map(|span| cache.take(span.slot, span.tokens.len())).collect();
        let mut pass = Pass::new(self.model.config(), spans, &sequences);
        let model = self.model.clone();
        self.embed(&model, spans);
        let (mut linear, mut softmax) = (0, 0);
        for (index, layer) in model.weights.layers.iter().enumerate() {
            pass.last_layer = index + 1 == model.weights.layers.len();
            let of_kind =
                if matches!(layer.mixer, Mixer::Lightning { .. }) { &mut linear } else { &mut softmax };
            self.layer(&model, layer, *of_kind, &mut pass, &mut sequences);
            *of_kind += 1;
        }
        for (span, mut sequence) in spans.iter().zip(sequences) {
            sequence.position += span.tokens.len();
            cache.put(span.slot, sequence);
        }
        let config = model.config();
        let Buffers { hidden, normed, logits, .. } = &mut self.buffers;
        let hidden = &hidden[..pass.rows * config.hidden_size];
        let normed = sized(normed, hidden.len());
        self.kernel.rms_norm(hidden, &model.weights.norm, config.rms_norm_eps, normed);
        let logits = sized(logits, pass.rows * config.vocab_size);
        if pass.rows > 0 {
            self.cost.product(&model.weights.head, pass.rows);
            self.kernel.matmul(normed, &model.weights.head, logits);
        }
        logits
    }

    fn embed(&mut self, model: &Model, spans: &[Span<'_>]) {
        let (hidden, vocabulary) = (model.config.hidden_size, model.config.vocab_size);
        let rows = spans.iter().map(|span| span.tokens.len()).sum::<usize>();
        let table = sized(&mut self.buffers.hidden, rows * hidden).chunks_exact_mut(hidden);
        for (row, &token) in table.zip(spans.iter().flat_map(|span| span.tokens)) {
            assert!((token as usize) < vocabulary, "token ids are below the vocabulary size");
            model.weights.embedding.read(token, row);
        }
    }

    /// `of_kind` counts the layers of the same kind before this one: its place in the state.
    fn layer(
        &mut self,
        model: &Model,
        layer: &Layer,
        of_kind: usize,
        pass: &mut Pass,
        sequences: &mut [Sequence],
    ) {
        let config = &model.config;
        let size = config.hidden_size;
        let Buffers { hidden, normed, .. } = &mut self.buffers;
        let all = pass.rows * size;
        self.kernel.rms_norm(&hidden[..all], &layer.input_norm, config.rms_norm_eps, sized(normed, all));
        let weights = match &layer.mixer {
            Mixer::Lightning { .. } => config.linear_attention,
            Mixer::Softmax { .. } => config.softmax_attention,
        };
        self.mix(config, &layer.mixer, of_kind, pass, sequences);
        if pass.rows == 0 {
            return;
        }
        let Buffers { hidden, normed, branch, .. } = &mut self.buffers;
        let all = pass.rows * size;
        let residual = if config.postnorm { &normed[..all] } else { &hidden[..all] };
        self.kernel.add_residual(residual, weights, &mut branch[..all]);
        std::mem::swap(hidden, branch);
        self.kernel.rms_norm(
            &hidden[..all],
            &layer.post_attention_norm,
            config.rms_norm_eps,
            &mut normed[..all],
        );
        self.mixture(config, &layer.moe, pass.rows);
        let Buffers { hidden, normed, branch, .. } = &mut self.buffers;
        let residual = if config.postnorm { &normed[..all] } else { &hidden[..all] };
        self.kernel.add_residual(residual, config.moe, &mut branch[..all]);
        std::mem::swap(hidden, branch);
    }

    /// `branch = mixer(normed)`. In the last layer only the rows that yield logits go on past the state.
    fn mix(
        &mut self,
        config: &ModelConfig,
        mixer: &Mixer,
        of_kind: usize,
        pass: &mut Pass,
        sequences: &mut [Sequence],
    ) {
        let (size, attention_size) = (config.hidden_size, config.attention_size());
        let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let Buffers { hidden, normed, branch, qkv, gate, attended, .. } = &mut self.buffers;
        let (kernel, cost) = (&mut *self.kernel, &mut self.cost);
        let (Mixer::Lightning { qkv: project, .. } | Mixer::Softmax { qkv: project, .. }) = mixer;
        let qkv = sized(qkv, pass.rows * project.rows());
        let attended = sized(attended, pass.rows * attention_size);
        cost.product(project, pass.rows);
        kernel.matmul(&normed[..pass.rows * size], project, qkv);
        match mixer {
            Mixer::Lightning { decay, .. } => {
                kernel.silu(qkv);
                let mut spans = pass.lightning_spans(of_kind, sequences);
                cost.lightning(heads, &spans);
                kernel.lightning(heads, decay, &mut spans, qkv, attended);
            }
            Mixer::Softmax { .. } => {
                kernel.rotate(qkv, heads.heads + heads.kv_heads, heads.head_dim, &pass.rotations);
                let mut spans = pass
                    .attention_spans(of_kind * 2 * heads.kv_heads * heads.head_dim * BLOCK_TOKENS, sequences);
                cost.attention(heads, &spans);
                kernel.attention(heads, &mut spans, qkv, attended);
            }
        }
        if pass.last_layer {
            for (buffer, width) in [(hidden, size), (&mut *normed, size)] {
                keep_rows(buffer, width, &pass.kept);
            }
            keep_rows(attended, attention_size, &pass.kept);
            pass.rows = pass.kept.len();
        }
        let attended = &mut attended[..pass.rows * attention_size];
        let branch = sized(branch, pass.rows * size);
        match mixer {
            Mixer::Lightning { gate: project, norm, out, .. } => {
                let gate = sized(gate, pass.rows * attention_size);
                cost.product(project, pass.rows);
                cost.product(out, pass.rows);
                kernel.matmul(&normed[..pass.rows * size], project, gate);
                kernel.gated_rms_norm(gate, norm, LIGHTNING_NORM_EPS, attended);
                kernel.matmul(attended, out, branch);
            }
            Mixer::Softmax { out, .. } => {
                cost.product(out, pass.rows);
                kernel.matmul(attended, out, branch);
            }
        }
    }

    /// `branch = mixture of experts(normed)`, tokens sorted by expert so that each expert's weights are read once.
    fn mixture(&mut self, config: &ModelConfig, moe: &Moe, rows: usize) {
        let (size, k) = (config.hidden_size, config.experts_per_token);
        let Buffers { normed, branch, router, picks, places, routed, gate_up, activated, expert_out, .. } =
            &mut self.buffers;
        let (kernel, cost) = (&mut *self.kernel, &mut self.cost);
        let normed = &normed[..rows * size];
        let branch = &mut branch[..rows * size];
        let router = sized(router, rows * config.experts);
        cost.product(&moe.router, rows);
        kernel.matmul(normed, &moe.router, router);
        picks.resize(rows * k, Pick::default());
        kernel.route(router, config.experts, k, picks);
        let counts = sort_by_expert(picks, config.experts, places);
        let routed = sized(routed, rows * k * size);
        for (pick, &place) in places.iter().enumerate() {
            routed[place as usize * size..][..size].copy_from_slice(&normed[pick / k * size..][..size]);
        }
        let groups = |matrix: fn(&Expert) -> &Matrix| -> Vec<Group<'_>> {
            let occupied = moe.experts.iter().zip(&counts).filter(|(_, rows)| **rows > 0);
            occupied.map(|(expert, &rows)| Group { matrix: matrix(expert), rows }).collect()
        };
        for (expert, &rows) in moe.experts.iter().zip(&counts).filter(|(_, rows)| **rows > 0) {
            cost.product(&expert.gate_up, rows);
            cost.product(&expert.down, rows);
        }
        let width = config.intermediate_size;
        let gate_up_rows = sized(gate_up, rows * k * 2 * width);
        let activated_rows = sized(activated, rows * k * width);
        let expert_out = sized(expert_out, rows * k * size);
        kernel.matmul_grouped(routed, &groups(|expert| &expert.gate_up), gate_up_rows);
        kernel.swiglu(gate_up_rows, width, activated_rows);
        kernel.matmul_grouped(activated_rows, &groups(|expert| &expert.down), expert_out);
        kernel.combine(expert_out, picks, places, k, branch);
        if let Some(shared) = &moe.shared {
            let width = shared.expert.down.columns();
            let gate_up = sized(gate_up, rows * 2 * width);
            let activated = sized(activated, rows * width);
            let expert_out = &mut expert_out[..rows * size];
            cost.product(&shared.expert.gate_up, rows);
            cost.product(&shared.expert.down, rows);
            kernel.matmul(normed, &shared.expert.gate_up, gate_up);
            kernel.swiglu(gate_up, width, activated);
            kernel.matmul(activated, &shared.expert.down, expert_out);
            kernel.blend_shared(normed, &shared.coefficient, expert_out, branch);
        }
    }
}

/// The shape of one pass.
struct Pass {
    /// Rows alive: all, then in the last layer those kept.
    rows: usize,
    /// Tokens and starting position of each span.
    spans: Vec<(usize, usize)>,
    /// Rows that yield logits, ascending.
    kept: Vec<usize>,
    rotations: Rotations,
    last_layer: bool,
}

impl Pass {
    fn new(config: &ModelConfig, spans: &[Span<'_>], sequences: &[Sequence]) -> Pass {
        let mut kept = Vec::new();
        let mut rows = 0;
        for span in spans {
            assert!(!span.tokens.is_empty(), "a span has tokens");
            rows += span.tokens.len();
            match span.logits {
                Logits::None => {}
                Logits::Last => kept.push(rows - 1),
                Logits::All => kept.extend(rows - span.tokens.len()..rows),
            }
        }
        let spans: Vec<_> = spans
            .iter()
            .zip(sequences)
            .map(|(span, sequence)| (span.tokens.len(), sequence.position))
            .collect();
        let rotations = rotations(config, &spans);
        Pass { rows, spans, kept, rotations, last_layer: false }
    }

    fn lightning_spans<'a>(&self, layer: usize, sequences: &'a mut [Sequence]) -> Vec<LightningSpan<'a>> {
        let spans = self.spans.iter().zip(sequences);
        spans
            .map(|(&(rows, position), sequence)| LightningSpan {
                state: &mut sequence.linear[layer],
                position,
                rows,
            })
            .collect()
    }

    fn attention_spans<'a>(&self, offset: usize, sequences: &'a mut [Sequence]) -> Vec<AttentionSpan<'a>> {
        let spans = self.spans.iter().zip(sequences);
        spans
            .map(|(&(rows, position), sequence)| AttentionSpan {
                pages: &mut sequence.pages,
                offset,
                position,
                rows,
            })
            .collect()
    }
}

/// Angles in f32, as the models were trained: `position * theta^(-2i / rotary_dim)`.
fn rotations(config: &ModelConfig, spans: &[(usize, usize)]) -> Rotations {
    let mut rotations = Rotations { cos: Vec::new(), sin: Vec::new(), rotary_dim: config.rotary_dim };
    if config.layers_of(LayerKind::Softmax) == 0 {
        return rotations;
    }
    let frequency =
        |pair: usize| config.rope_theta.powf(-2.0 * pair as f64 / config.rotary_dim as f64) as f32;
    let frequencies: Vec<f32> = (0..config.rotary_dim / 2).map(frequency).collect();
    for position in spans.iter().flat_map(|&(rows, first)| first..first + rows) {
        for frequency in &frequencies {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            rotations.cos.push(cos);
            rotations.sin.push(sin);
        }
    }
    rotations
}

/// Fills `places` with the rank of each pick when picks are ordered by expert, then by row; returns how many each expert got.
fn sort_by_expert(picks: &[Pick], experts: usize, places: &mut Vec<u32>) -> Vec<usize> {
    let mut counts = vec![0; experts];
    picks.iter().for_each(|pick| counts[pick.expert as usize] += 1);
    let mut next: Vec<usize> =
        counts.iter().scan(0, |sum, &count| Some(std::mem::replace(sum, *sum + count))).collect();
    places.clear();
    for pick in picks {
        let place = &mut next[pick.expert as usize];
        places.push(*place as u32);
        *place += 1;
    }
    counts
}

/// Moves the listed rows (ascending) to the front.
fn keep_rows(buffer: &mut [f32], width: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        buffer.copy_within(from * width..(from + 1) * width, to * width);
    }
}

/// The first `len` elements, growing the buffer if it never was that long.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kernel::Reference;
    use crate::model::LoadOptions;
    use crate::state::CacheLimits;

    /// The runner's wiring apart from the fast kernel: with f64 operations it gives the same model.
    #[test]
    fn both_kernels_compute_one_model() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/text-01-shared");
        let model =
            Arc::new(Model::load(&dir, &LoadOptions { threads: 1, dtype: None }).expect("a golden loads"));
        let ids: Vec<u32> = (0..70).map(|i| i * 7 % model.config().vocab_size as u32).collect();
        let run = |kernel: Box<dyn Kernel>| {
            let mut cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: ids.len() });
            let slot = cache.acquire(ids.len()).expect("room");
            let mut runner = Runner::with_kernel(model.clone(), kernel);
            let span = Span { slot: &slot, tokens: &ids, logits: Logits::All };
            let logits = runner.forward(&mut cache, &[span]).to_vec();
            cache.release(slot);
            logits
        };
        let (fast, exact) = (run(Box::new(Cpu::new(2))), run(Box::new(Reference)));
        let largest = fast.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-4, "{largest}");
    }
}
