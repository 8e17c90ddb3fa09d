//! Every instruction set this machine has against the f64 reference: outputs and final states, ragged lengths, odd sizes.

use super::*;
use crate::kernel::Reference;

fn isas() -> Vec<Isa> {
    #[cfg(target_arch = "x86_64")]
    let known = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Dot];
    #[cfg(not(target_arch = "x86_64"))]
    let known = [Isa::Portable];
    let best = known.iter().position(|&isa| isa == Isa::detect()).expect("detect returns a known set");
    known[..=best].to_vec()
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::Int8];

/// Reproducible numbers in -1..1.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn matrix(dtype: Dtype, rows: usize, columns: usize, seed: u32) -> Matrix {
    let weights = noise(rows * columns, seed);
    Matrix::pack(dtype, rows, columns, |row, out| out.copy_from_slice(&weights[row * columns..][..columns]))
}

/// Sums of n products in another order differ by about sqrt(n) roundings of numbers of order one.
fn assert_close(found: &[f32], expected: &[f32], terms: usize, what: &str) {
    assert_eq!(found.len(), expected.len());
    let allowed = 4e-7 * (terms as f32).sqrt().max(1.0);
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= allowed * b.abs().max(1.0), "{what} [{i}]: {a} and {b}, allowed {allowed}");
    }
}

fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
}

#[test]
fn matmul_equals_the_reference_and_rows_do_not_see_each_other() {
    for (isa, dtype) in isas().into_iter().flat_map(|isa| DTYPES.map(|dtype| (isa, dtype))) {
        for (n, k) in [(1, 1), (8, 7), (31, 64), (32, 5), (33, 203), (100, 48), (300, 98)] {
            let w = matrix(dtype, n, k, 7);
            for m in [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 49, 100, 193] {
                let x = noise(m * k, m as u32);
                let (mut found, mut expected) = (vec![0.0; m * n], vec![0.0; m * n]);
                Cpu::with(isa, 3).matmul(&x, &w, &mut found);
                Reference.matmul(&x, &w, &mut expected);
                assert_close(&found, &expected, k, &format!("{isa:?} {dtype:?} {m}x{n}x{k}"));
                let mut alone = vec![0.0; n];
                for row in [0, m / 2, m - 1] {
                    Cpu::with(isa, 1).matmul(&x[row * k..][..k], &w, &mut alone);
                    assert_same_bits(&alone, &found[row * n..][..n], "one row alone");
                }
            }
        }
    }
}

#[test]
fn grouped_matmul_equals_one_by_one() {
    let (n, k, rows) = (70, 40, [3, 0, 1, 60]);
    let x = noise(64 * k, 1);
    for (isa, dtype) in isas().into_iter().flat_map(|isa| DTYPES.map(|dtype| (isa, dtype))) {
        let matrices: Vec<Matrix> = (0..4).map(|seed| matrix(dtype, n, k, seed)).collect();
        let groups: Vec<Group<'_>> =
            matrices.iter().zip(rows).map(|(matrix, rows)| Group { matrix, rows }).collect();
        let mut kernel = Cpu::with(isa, 2);
        let (mut grouped, mut single) = (vec![0.0; 64 * n], vec![0.0; 64 * n]);
        kernel.matmul_grouped(&x, &groups, &mut grouped);
        let mut row = 0;
        for group in groups.iter().filter(|group| group.rows > 0) {
            let rows = row..row + group.rows;
            kernel.matmul(
                &x[rows.start * k..rows.end * k],
                group.matrix,
                &mut single[rows.start * n..rows.end * n],
            );
            row = rows.end;
        }
        assert_same_bits(&grouped, &single, "groups");
    }
}

#[test]
fn row_operations_equal_the_reference() {
    for isa in isas() {
        for width in [1, 8, 15, 16, 40, 257] {
            let rows = 70;
            let (x, other, weight) = (noise(rows * width, 1), noise(rows * width, 2), noise(width, 3));
            let mut kernel = Cpu::with(isa, 2);
            let both = |apply: &mut dyn FnMut(&mut dyn Kernel, &mut [f32]), what: &str, kernel: &mut Cpu| {
                let (mut found, mut expected) = (x.clone(), x.clone());
                apply(kernel, &mut found);
                apply(&mut Reference, &mut expected);
                assert_close(&found, &expected, 4 * width, &format!("{isa:?} {what} {width}"));
            };
            both(&mut |kernel, y| kernel.rms_norm(&other, &weight, 1e-5, y), "rms_norm", &mut kernel);
            both(
                &mut |kernel, y| kernel.gated_rms_norm(&other, &weight, 1e-6, y),
                "gated_rms_norm",
                &mut kernel,
            );
            both(&mut |kernel, y| kernel.silu(y), "silu", &mut kernel);
            let weights = Residual { alpha: 3.5, beta: 0.7 };
            both(&mut |kernel, y| kernel.add_residual(&other, weights, y), "add_residual", &mut kernel);
            both(&mut |kernel, y| kernel.blend_shared(&other, &weight, &x, y), "blend_shared", &mut kernel);
            let gate_up = noise(rows * 2 * width, 4);
            both(&mut |kernel, y| kernel.swiglu(&gate_up, width, y), "swiglu", &mut kernel);
        }
    }
}

#[test]
fn the_exponential_is_accurate_over_its_range() {
    struct Exp<'a>(&'a mut [f32]);
    impl Routine for Exp<'_> {
        #[inline(always)]
        unsafe fn run<V: simd::Vector>(self) {
            let x = self.0.as_mut_ptr();
            // SAFETY: one slice, in place.
            unsafe { rows::zip::<V, rows::ExpLess>(x, x, x, 0.0, self.0.len()) }
        }
    }
    let inputs: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0).collect();
    for isa in isas() {
        let mut found = inputs.clone();
        // SAFETY: the routine has no pointers of its own.
        unsafe { isa.dispatch(Exp(&mut found)) };
        for (x, found) in inputs.iter().zip(found) {
            let exact = f64::from(*x).exp();
            assert!((f64::from(found) - exact).abs() < 2.5e-7 * exact, "{isa:?} exp({x}) = {found}");
        }
    }
}

#[test]
fn routing_takes_the_largest_and_breaks_ties_by_index() {
    for isa in isas() {
        let mut picks = vec![Pick::default(); 2];
        Cpu::with(isa, 1).route(&[0.0, 2.0, -1.0, 2.0, 1.0], 5, 2, &mut picks);
        assert_eq!(picks, [Pick { expert: 1, weight: 0.5 }, Pick { expert: 3, weight: 0.5 }]);
        let logits = noise(37 * 9, 5);
        let (mut found, mut expected) = (vec![Pick::default(); 37 * 3], vec![Pick::default(); 37 * 3]);
        Cpu::with(isa, 1).route(&logits, 9, 3, &mut found);
        Reference.route(&logits, 9, 3, &mut expected);
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.expert, expected.expert);
            assert!((found.weight - expected.weight).abs() < 1e-6);
        }
    }
}

/// Cuts of the same rows: whole, one by one, and unevenly.
fn cuts(rows: usize) -> Vec<Vec<usize>> {
    let mut uneven = Vec::new();
    let mut left = rows;
    for step in [1, 5, 60, 2, 64, 17, 100].into_iter().cycle() {
        if left == 0 {
            break;
        }
        uneven.push(left.min(step));
        left -= left.min(step);
    }
    vec![vec![rows], vec![1; rows], uneven]
}

fn lightning(
    kernel: &mut dyn Kernel,
    shape: Heads,
    qkv: &[f32],
    cut: &[usize],
) -> (Vec<f32>, LightningState) {
    let Heads { heads, head_dim: d, .. } = shape;
    let decay = Decay::new(&(0..heads).map(|head| 0.9 / (head * head + 1) as f64).collect::<Vec<_>>());
    let mut state = LightningState {
        state: vec![0.0; heads * d * d],
        keys: vec![0.0; heads * d * BLOCK_TOKENS],
        values: vec![0.0; heads * d * BLOCK_TOKENS],
    };
    let mut out = vec![0.0; qkv.len() / 3];
    let mut position = 0;
    for &rows in cut {
        let (width, end) = (heads * d, position + rows);
        let mut spans = [LightningSpan { state: &mut state, position, rows }];
        let qkv = &qkv[position * 3 * width..end * 3 * width];
        kernel.lightning(shape, &decay, &mut spans, qkv, &mut out[position * width..end * width]);
        position = end;
    }
    (out, state)
}

#[test]
fn lightning_attention_equals_the_reference_however_it_is_cut() {
    for isa in isas() {
        for (heads, d, rows) in [(3, 8, 1), (1, 20, 63), (2, 16, 64), (3, 33, 65), (2, 64, 300)] {
            let shape = Heads { heads, kv_heads: heads, head_dim: d };
            let qkv = noise(rows * heads * 3 * d, rows as u32);
            let (expected, expected_state) = lightning(&mut Reference, shape, &qkv, &[rows]);
            let (whole, _) = lightning(&mut Cpu::with(isa, 1), shape, &qkv, &[rows]);
            for cut in cuts(rows) {
                let (out, state) = lightning(&mut Cpu::with(isa, 2), shape, &qkv, &cut);
                assert_same_bits(&out, &whole, "cut");
                assert_close(&out, &expected, 200 * d, "output");
                assert_close(&state.state, &expected_state.state, 200 * d, "state");
            }
        }
    }
}

fn attention(kernel: &mut dyn Kernel, shape: Heads, qkv: &[f32], cut: &[usize]) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim: d } = shape;
    let width = (heads + 2 * kv_heads) * d;
    let rows = qkv.len() / width;
    // Two layers' worth, of which the second is used, full of another sequence's numbers.
    let page = || crate::state::Page::of(vec![100.0; 2 * kv_heads * 2 * d * BLOCK_TOKENS]);
    let mut pages: Vec<_> = (0..rows.div_ceil(BLOCK_TOKENS)).map(|_| page()).collect();
    let mut out = vec![0.0; rows * heads * d];
    let mut position = 0;
    for &rows in cut {
        let end = position + rows;
        let offset = kv_heads * 2 * d * BLOCK_TOKENS;
        let mut spans = [AttentionSpan { pages: &mut pages, offset, position, rows }];
        let (qkv, out) =
            (&qkv[position * width..end * width], &mut out[position * heads * d..end * heads * d]);
        kernel.attention(shape, &mut spans, qkv, out);
        position = end;
    }
    out
}

#[test]
fn softmax_attention_equals_the_reference_however_it_is_cut() {
    for isa in isas() {
        for (heads, kv_heads, d, rows) in
            [(4, 2, 8, 1), (3, 1, 20, 63), (2, 2, 16, 64), (8, 2, 33, 65), (4, 1, 64, 300)]
        {
            let shape = Heads { heads, kv_heads, head_dim: d };
            let qkv: Vec<f32> = noise(rows * (heads + 2 * kv_heads) * d, 3).iter().map(|x| 3.0 * x).collect();
            let expected = attention(&mut Reference, shape, &qkv, &[rows]);
            let whole = attention(&mut Cpu::with(isa, 1), shape, &qkv, &[rows]);
            for cut in cuts(rows) {
                let out = attention(&mut Cpu::with(isa, 2), shape, &qkv, &cut);
                assert_same_bits(&out, &whole, "cut");
                assert_close(&out, &expected, 16 * d, "output");
            }
        }
    }
}
