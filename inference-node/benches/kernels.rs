//! `cargo bench -p sluice-node`: the operations that a forward pass spends its time in, one thread, at the shapes of a model with hidden
//! size 1024 and 16 heads of 64. Throughput is in multiply-adds, so "Gelem/s" times two is what a peak is quoted in.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sluice_node::kernel::{AttentionSpan, Cpu, Decay, Dtype, Group, Heads, Kernel, LightningSpan, Matrix};
use sluice_node::state::{BLOCK_TOKENS, LightningState, Page};

const HIDDEN: usize = 1024;
const HEADS: Heads = Heads { heads: 16, kv_heads: 4, head_dim: 64 };

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn matrix(dtype: Dtype, rows: usize, columns: usize) -> Matrix {
    let weights = noise(rows * columns);
    Matrix::pack(dtype, rows, columns, |row, out| out.copy_from_slice(&weights[row * columns..][..columns]))
}

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul 1024 x 3072");
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        let (w, mut kernel) = (matrix(dtype, 3 * HIDDEN, HIDDEN), Cpu::new(1));
        for rows in [1, 4, 8, 32, 256] {
            let (x, mut y) = (noise(rows * HIDDEN), vec![0.0; rows * w.rows()]);
            group.throughput(Throughput::Elements((rows * w.rows() * HIDDEN) as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), rows), |bencher| {
                bencher.iter(|| kernel.matmul(black_box(&x), &w, &mut y));
            });
        }
    }
    group.finish();

    let mut group = criterion.benchmark_group("16 experts of 1024 x 2048, a row each pick");
    let experts: Vec<Matrix> = (0..16).map(|_| matrix(Dtype::Bf16, 2 * HIDDEN, HIDDEN)).collect();
    let mut kernel = Cpu::new(1);
    for rows in [16, 64, 1024] {
        let groups: Vec<Group<'_>> =
            experts.iter().map(|matrix| Group { matrix, rows: rows / experts.len() }).collect();
        let (x, mut y) = (noise(rows * HIDDEN), vec![0.0; rows * 2 * HIDDEN]);
        group.throughput(Throughput::Elements((rows * 2 * HIDDEN * HIDDEN) as u64));
        group.bench_function(BenchmarkId::new("bf16", rows), |bencher| {
            bencher.iter(|| kernel.matmul_grouped(black_box(&x), &groups, &mut y));
        });
    }
    group.finish();
}

fn mixers(criterion: &mut Criterion) {
    let Heads { heads, kv_heads, head_dim: d } = HEADS;
    let mut kernel = Cpu::new(1);
    let mut group = criterion.benchmark_group("lightning, tokens of one sequence");
    let shape = Heads { kv_heads: heads, ..HEADS };
    let decay = Decay::new(&(0..heads).map(|head| 0.5 / (head + 1) as f64).collect::<Vec<_>>());
    for rows in [1, 64, 512] {
        let mut state = LightningState {
            state: noise(heads * d * d),
            keys: noise(heads * d * BLOCK_TOKENS),
            values: noise(heads * d * BLOCK_TOKENS),
        };
        let (qkv, mut out) = (noise(rows * heads * 3 * d), vec![0.0; rows * heads * d]);
        // In the middle of a block, where a token of decode costs what it does on average.
        let position = if rows == 1 { BLOCK_TOKENS / 2 } else { 0 };
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            bencher.iter(|| {
                let mut spans = [LightningSpan { state: &mut state, position, rows }];
                kernel.lightning(shape, &decay, &mut spans, black_box(&qkv), &mut out);
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("softmax attention at 4096, tokens of one sequence");
    let page_floats = kv_heads * 2 * d * BLOCK_TOKENS;
    let mut pages: Vec<Page> = (0..128).map(|_| Page::of(noise(page_floats))).collect();
    for rows in [1, 64] {
        let (qkv, mut out) = (noise(rows * (heads + 2 * kv_heads) * d), vec![0.0; rows * heads * d]);
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            bencher.iter(|| {
                let mut spans = [AttentionSpan { pages: &mut pages, offset: 0, position: 4096, rows }];
                kernel.attention(HEADS, &mut spans, black_box(&qkv), &mut out);
            });
        });
    }
    group.finish();
}

fn rows(criterion: &mut Criterion) {
    let mut kernel = Cpu::new(1);
    let (x, weight, mut y) = (noise(64 * HIDDEN), noise(HIDDEN), vec![0.0; 64 * HIDDEN]);
    let mut group = criterion.benchmark_group("64 rows of 1024");
    group.throughput(Throughput::Elements((64 * HIDDEN) as u64));
    group.bench_function("rms_norm", |bencher| {
        bencher.iter(|| kernel.rms_norm(black_box(&x), &weight, 1e-5, &mut y));
    });
    group.bench_function("silu", |bencher| bencher.iter(|| kernel.silu(black_box(&mut y))));
    let (gate_up, mut activated) = (noise(64 * 2 * HIDDEN), vec![0.0; 64 * HIDDEN]);
    group.bench_function("swiglu", |bencher| {
        bencher.iter(|| kernel.swiglu(black_box(&gate_up), HIDDEN, &mut activated));
    });
    group.finish();
}

criterion_group!(benches, products, mixers, rows);
criterion_main!(benches);
