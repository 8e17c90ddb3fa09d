//! A weight matrix in the order and the encoding that the kernels read.

use half::bf16;

use super::memory::Words;

/// Output columns of one panel: two AVX-512 or four AVX2 registers.
pub(super) const PANEL: usize = 32;

/// What weights are stored and multiplied as. Sums, norms, states and everything between two matrices stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Dtype {
    /// f32 weights and activations.
    F32,
    /// bf16 weights; activations are rounded to bf16 where they meet them; products are summed in f32.
    Bf16,
    /// int8 weights, one scale an output; activations are rounded to int8, one scale a row; products are summed exactly.
    Int8,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::Int8 => "int8",
        }
    }

    pub fn from_name(name: &str) -> Option<Dtype> {
        [Dtype::F32, Dtype::Bf16, Dtype::Int8].into_iter().find(|dtype| dtype.name() == name)
    }

    /// Weights of consecutive inputs that share a 32-bit word.
    pub(super) fn per_word(self) -> usize {
        match self {
            Dtype::F32 => 1,
            Dtype::Bf16 => 2,
            Dtype::Int8 => 4,
        }
    }
}

/// The largest magnitude of an int8 weight or activation: -128 is not used, so that the range is symmetric.
pub(super) const INT8_MAX: f32 = 127.0;

/// `[n, k]` weights packed into panels `[n / PANEL][words of k][PANEL]`, so that a multiplication walks memory forwards. A word holds
/// one f32, two bf16 or four int8 weights of one output and consecutive inputs, the first in the lowest bits. What is
/// missing to a whole word or panel is zero.
pub struct Matrix {
    rows: usize,
    columns: usize,
    dtype: Dtype,
    words: Words,
    /// int8: the value of 1 in each output, `[panels * PANEL]`; else empty.
    scales: Vec<f32>,
    /// int8: the sum of each output's weights, `[panels * PANEL]`; else empty.
    sums: Vec<i32>,
}

impl Matrix {
    /// Packs `rows` rows; `read(row, out)` fills one row of `columns` weights.
    pub fn pack(
        dtype: Dtype,
        rows: usize,
        columns: usize,
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Matrix {
        let (panels, per_word) = (rows.div_ceil(PANEL), dtype.per_word());
        let width = columns.next_multiple_of(per_word);
        let mut words = Words::zeroed(panels * width / per_word * PANEL);
        let (mut scales, mut sums) = (Vec::new(), Vec::new());
        let mut block = vec![0.0; PANEL * width];
        for (panel, words) in words.chunks_exact_mut((width / per_word * PANEL).max(1)).enumerate() {
            for (lane, row) in block.chunks_exact_mut(width).enumerate() {
                match panel * PANEL + lane {
                    index if index < rows => read(index, &mut row[..columns]),
                    _ => row.fill(0.0),
                }
                if dtype == Dtype::Int8 {
                    let (scale, sum) = quantize(row);
                    scales.push(scale);
                    sums.push(sum);
                }
            }
            for (step, words) in words.chunks_exact_mut(PANEL).enumerate() {
                for (word, row) in words.iter_mut().zip(block.chunks_exact(width)) {
                    *word = encode(dtype, &row[step * per_word..][..per_word]);
                }
            }
        }
        Matrix { rows, columns, dtype, words, scales, sums }
    }

    /// Outputs (n).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs (k).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Outputs, inputs, dtype.
    pub(super) fn shape(&self) -> (usize, usize, Dtype) {
        (self.rows, self.columns, self.dtype)
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes that a multiplication reads.
    pub fn bytes(&self) -> u64 {
        (size_of_val(&*self.words) + size_of_val(&*self.scales) + size_of_val(&*self.sums)) as u64
    }

    /// One weight as it was stored, for the reference kernel.
    pub(super) fn weight(&self, row: usize, column: usize) -> f32 {
        let per_word = self.dtype.per_word();
        let (panel, lane, part) = (row / PANEL, row % PANEL, column % per_word);
        let word = self.panel(panel)[column / per_word * PANEL + lane];
        match self.dtype {
            Dtype::F32 => f32::from_bits(word),
            Dtype::Bf16 => bf16::from_bits((word >> (16 * part)) as u16).to_f32(),
            Dtype::Int8 => f32::from((word >> (8 * part)) as u8 as i8) * self.scales[row],
        }
    }

    /// Panel `index` as `[words of k][PANEL]`.
    pub(super) fn panel(&self, index: usize) -> &[u32] {
        let len = self.words_per_row() * PANEL;
        &self.words[index * len..][..len]
    }

    /// Scales and sums of a panel's outputs; empty unless int8.
    pub(super) fn panel_scales(&self, index: usize) -> (&[f32], &[i32]) {
        match self.dtype {
            Dtype::Int8 => (&self.scales[index * PANEL..][..PANEL], &self.sums[index * PANEL..][..PANEL]),
            _ => (&[], &[]),
        }
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn words_per_row(&self) -> usize {
        self.columns.div_ceil(self.dtype.per_word())
    }
}

/// Turns a row into whole numbers of -127 to 127; returns what 1 stands for, and their sum.
fn quantize(row: &mut [f32]) -> (f32, i32) {
    let largest = row.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    let scale = largest / INT8_MAX;
    let mut sum = 0;
    for weight in row {
        *weight = if scale > 0.0 { (*weight / scale).round_ties_even() } else { 0.0 };
        sum += *weight as i32;
    }
    (scale, sum)
}

fn encode(dtype: Dtype, weights: &[f32]) -> u32 {
    match dtype {
        Dtype::F32 => weights[0].to_bits(),
        Dtype::Bf16 => {
            let bits = |weight: f32| u32::from(bf16::from_f32(weight).to_bits());
            bits(weights[0]) | bits(weights[1]) << 16
        }
        Dtype::Int8 => u32::from_le_bytes(std::array::from_fn(|part| weights[part] as i8 as u8)),
    }
}
