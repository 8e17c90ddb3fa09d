//! The fast kernel: f32 on packed panels, the instruction set chosen once, work spread over a small pool.
//!
//! Every operation is a [`Routine`] written once over [`simd::Vector`] and instantiated per instruction set. Splitting work
//! between threads never splits a sum, so it never changes a result.

mod dot;
mod matmul;
mod mixers;
mod roofline;
mod rows;
mod simd;
#[cfg(test)]
mod tests;
mod tile;

use std::marker::PhantomData;

use super::matrix::PANEL;
use super::pool::Pool;
use super::{AttentionSpan, Decay, Dtype, Group, Heads, Kernel, LightningSpan, Matrix, Pick, Rotations};
use crate::config::Residual;
use crate::state::{BLOCK_TOKENS, LightningState};
use matmul::{EncodeStrip, MatrixTask, STRIP};
use mixers::{AttentionGroup, LightningHead, LightningTask};
pub use roofline::Roofline;

/// Rows of activations that one matrix task takes: they stay in the second-level cache while panels stream by.
const TASK_ROWS: usize = 8 * STRIP;
/// Multiply-adds below which a task is not worth handing out.
const TASK_MULTIPLY_ADDS: usize = 1 << 16;
/// Tasks of one product that a thread finds, at the least: at the end of a product the others wait for half a task.
const TASKS_PER_THREAD: usize = 32;
/// Elements below which an elementwise task is not worth handing out.
const TASK_ELEMENTS: usize = 1 << 13;
/// Rows of one sequence that an attention task takes, so that a page is read once for all of them.
const ATTENTION_ROWS: usize = 16;

pub struct Cpu {
    isa: Isa,
    pool: Pool,
    /// One buffer a pool thread.
    scratch: Vec<Vec<f32>>,
    /// First task and first row of each group.
    first_tasks: Vec<(usize, usize)>,
    encoded: Encoded,
}

/// Activations as the matrix that is next wants them, in strips.
#[derive(Default)]
struct Encoded {
    words: Vec<u32>,
    /// `[rows]`
    scales: Vec<f32>,
    /// First row and rows of each strip.
    strips: Vec<(usize, usize)>,
    /// One buffer a pool thread.
    scratch: Vec<Vec<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With VNNI and bf16 dot products.
    #[cfg(target_arch = "x86_64")]
    Avx512Dot,
}

/// Work that is written over any vector width.
trait Routine {
    /// Implementations are `#[inline(always)]`, so that they are compiled with the features of the function that dispatched them.
    ///
    /// # Safety
    /// The CPU has V's features, and what the implementing struct says about its pointers holds.
    unsafe fn run<V: simd::Vector>(self);
}

impl Isa {
    fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            let products = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
            if avx512 && products && is_x86_feature_detected!("avx512vl") {
                return Isa::Avx512Dot;
            }
            if avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    fn name(self, dtype: Dtype) -> &'static str {
        let names = match self {
            Isa::Portable => ["cpu-portable-f32", "cpu-portable-bf16", "cpu-portable-int8"],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => ["cpu-avx2-f32", "cpu-avx2-bf16", "cpu-avx2-int8"],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => ["cpu-avx512-f32", "cpu-avx512-bf16", "cpu-avx512-int8"],
            // f32 is the same arithmetic with and without the dot products.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Dot => ["cpu-avx512-f32", "cpu-avx512dot-bf16", "cpu-avx512dot-int8"],
        };
        names[dtype as usize]
    }

    /// Words of activations that meet one word of weights.
    fn words_per_step(self, dtype: Dtype) -> usize {
        match (self, dtype) {
            (_, Dtype::F32) => 1,
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Dot, _) => 1,
            _ => 2,
        }
    }

    /// # Safety
    /// What the routine's struct says about its pointers holds. (An `Isa` other than portable is only made by `detect`.)
    #[inline]
    unsafe fn dispatch<R: Routine>(self, routine: R) {
        // SAFETY: `detect` found the features.
        unsafe {
            match self {
                Isa::Portable => routine.run::<simd::Portable>(),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => run_avx2(routine),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => run_avx512(routine),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Dot => run_avx512_dot(routine),
            }
        }
    }
}

/// # Safety
/// As for [`Routine::run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<R: Routine>(routine: R) {
    // SAFETY: passed on.
    unsafe { routine.run::<simd::Avx2>() }
}

/// # Safety
/// As for [`Routine::run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
unsafe fn run_avx512<R: Routine>(routine: R) {
    // SAFETY: passed on.
    unsafe { routine.run::<simd::Avx512>() }
}

/// # Safety
/// As for [`Routine::run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
unsafe fn run_avx512_dot<R: Routine>(routine: R) {
    // SAFETY: passed on.
    unsafe { routine.run::<simd::Avx512Dot>() }
}

/// A slice whose disjoint parts are written by several tasks.
#[derive(Clone, Copy)]
struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a Parts only hands out disjoint sub-slices of a slice it borrowed exclusively (the contract of `part`).
unsafe impl<T: Send> Sync for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Parts { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// # Safety
    /// No two live parts overlap.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's contract")]
    unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first + len <= self.len, "a part lies inside its slice");
        // SAFETY: inside the borrowed slice; exclusive by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }

    /// The address of one element, for routines that write rows with a stride.
    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "a part lies inside its slice");
        // SAFETY: inside the slice.
        unsafe { self.start.add(index) }
    }
}

impl Cpu {
    pub fn new(threads: usize) -> Cpu {
        Cpu::with(Isa::detect(), threads)
    }

    fn with(isa: Isa, threads: usize) -> Cpu {
        let pool = Pool::new(threads);
        let scratch = vec![Vec::new(); pool.threads()];
        let encoded = Encoded { scratch: vec![Vec::new(); pool.threads()], ..Encoded::default() };
        Cpu { isa, pool, scratch, first_tasks: Vec::new(), encoded }
    }

    /// The kind of arithmetic of this machine's [`Cpu`] on matrices of `dtype`: results are bit-identical within one kind.
    pub fn kind(dtype: Dtype) -> &'static str {
        Isa::detect().name(dtype)
    }

    /// Calls `task` on ranges of rows that together cover `rows`, several at a time when they are worth it.
    fn each_rows(&mut self, rows: usize, width: usize, task: impl Fn(usize, usize) + Sync) {
        let rows_per_task = (TASK_ELEMENTS / width.max(1)).max(1);
        let tasks = rows.div_ceil(rows_per_task);
        self.pool.run(tasks, |index, _| {
            let first = index * rows_per_task;
            task(first, rows_per_task.min(rows - first));
        });
    }

    fn reserve_scratch(&mut self, floats: usize) {
        self.scratch
            .iter_mut()
            .filter(|buffer| buffer.len() < floats)
            .for_each(|buffer| buffer.resize(floats, 0.0));
    }
}

/// How a group of rows against one matrix is cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    panels: usize,
    panels_per_task: usize,
}

impl Cut {
    fn new(matrix: &Matrix, rows: usize, threads: usize) -> Cut {
        let panels = matrix.panels();
        let work_per_panel = PANEL * matrix.columns() * rows.clamp(1, TASK_ROWS);
        let enough = (TASK_MULTIPLY_ADDS / work_per_panel.max(1)).max(1);
        Cut { panels, panels_per_task: enough.max(panels / (TASKS_PER_THREAD * threads)).min(panels.max(1)) }
    }

    fn tasks(&self, rows: usize) -> usize {
        rows.div_ceil(TASK_ROWS) * self.panels.div_ceil(self.panels_per_task)
    }
}

impl Encoded {
    /// Encodes `x` for `groups`, whose matrices have one dtype; returns the words of a row.
    fn fill(&mut self, isa: Isa, pool: &mut Pool, x: &[f32], groups: &[Group<'_>]) -> usize {
        let (dtype, columns) = (groups[0].matrix.dtype(), groups[0].matrix.columns());
        let stride = groups[0].matrix.words_per_row() * isa.words_per_step(dtype);
        let rows = x.len() / columns;
        self.strips.clear();
        let mut first = 0;
        for group in groups {
            let strips = (first..first + group.rows).step_by(STRIP);
            self.strips.extend(strips.map(|row| (row, STRIP.min(first + group.rows - row))));
            first += group.rows;
        }
        self.words.resize(self.words.len().max(rows * stride), 0);
        self.scales.resize(self.scales.len().max(rows), 0.0);
        let (words, scales) = (Parts::new(&mut self.words), Parts::new(&mut self.scales));
        let (strips, scratch) = (&self.strips, Parts::new(&mut self.scratch));
        let strips_per_task = (TASK_ELEMENTS / (STRIP * columns)).max(1);
        pool.run(strips.len().div_ceil(strips_per_task), |task, thread| {
            // SAFETY: each thread has its own scratch.
            let scratch = unsafe { &mut scratch.part(thread, 1)[0] };
            scratch.resize(scratch.len().max(stride), 0);
            for &(row, rows) in strips.iter().skip(task * strips_per_task).take(strips_per_task) {
                // SAFETY: strips are disjoint.
                unsafe {
                    isa.dispatch(EncodeStrip {
                        dtype,
                        x: &x[row * columns..(row + rows) * columns],
                        rows,
                        words: words.part(row * stride, rows * stride),
                        scales: scales.part(row, rows),
                        scratch,
                    });
                }
            }
        });
        stride
    }
}

impl Kernel for Cpu {
    fn matmul(&mut self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        let rows = x.len() / w.columns();
        self.matmul_grouped(x, &[Group { matrix: w, rows }], y);
    }

    fn matmul_grouped(&mut self, x: &[f32], groups: &[Group<'_>], y: &mut [f32]) {
        let Some(shape) = groups.first().map(|group| group.matrix.shape()) else { return };
        let (n, k, _) = shape;
        let rows: usize = groups.iter().map(|group| group.rows).sum();
        assert!(groups.iter().all(|group| group.matrix.shape() == shape), "groups differ in weights alone");
        assert!(x.len() == rows * k && y.len() == rows * n, "activations match the matrix");
        let rows_max = groups.iter().map(|group| group.rows).max().unwrap_or(0);
        let cut = Cut::new(groups[0].matrix, rows_max, self.pool.threads());
        self.first_tasks.clear();
        let (mut tasks, mut first_row) = (0, 0);
        for group in groups {
            self.first_tasks.push((tasks, first_row));
            tasks += cut.tasks(group.rows);
            first_row += group.rows;
        }
        let stride = self.encoded.fill(self.isa, &mut self.pool, x, groups);
        let (isa, first_tasks, encoded, y) = (self.isa, &self.first_tasks, &self.encoded, Parts::new(y));
        let columns_of_tasks = cut.panels.div_ceil(cut.panels_per_task);
        self.pool.run(tasks, |task, _| {
            let index = first_tasks.partition_point(|&(first, _)| first <= task) - 1;
            let (group, (first_task, group_row)) = (&groups[index], first_tasks[index]);
            // Panels outside, rows inside: the rows of a group meet a panel while it is in the cache.
            let row_tasks = group.rows.div_ceil(TASK_ROWS);
            let (panel_task, row_task) = ((task - first_task) / row_tasks, (task - first_task) % row_tasks);
            debug_assert!(panel_task < columns_of_tasks);
            let first = row_task * TASK_ROWS;
            let rows = TASK_ROWS.min(group.rows - first);
            let row = group_row + first;
            let panels = panel_task * cut.panels_per_task;
            let task = MatrixTask {
                matrix: group.matrix,
                words: &encoded.words[row * stride..(row + rows) * stride],
                row_scales: &encoded.scales[row..row + rows],
                y: y.at(row * n),
                rows,
                panels: panels..cut.panels.min(panels + cut.panels_per_task),
            };
            // SAFETY: tasks differ in rows or panels, so they write disjoint elements of y, all inside it (asserted above).
            unsafe { isa.dispatch(task) };
        });
    }

    fn rms_norm(&mut self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let (isa, width, y) = (self.isa, weight.len(), Parts::new(y));
        self.each_rows(x.len() / width, width, |first, rows| {
            let (start, len) = (first * width, rows * width);
            // SAFETY: row ranges are disjoint.
            unsafe {
                isa.dispatch(rows::RmsNorm { x: &x[start..start + len], weight, eps, y: y.part(start, len) })
            }
        });
    }

    fn gated_rms_norm(&mut self, gate: &[f32], weight: &[f32], eps: f32, x: &mut [f32]) {
        let (isa, width, rows, x) = (self.isa, weight.len(), x.len() / weight.len(), Parts::new(x));
        self.each_rows(rows, width, |first, rows| {
            let (start, len) = (first * width, rows * width);
            // SAFETY: row ranges are disjoint.
            unsafe {
                isa.dispatch(rows::GatedRmsNorm {
                    gate: &gate[start..start + len],
                    weight,
                    eps,
                    x: x.part(start, len),
                });
            }
        });
    }

    fn silu(&mut self, x: &mut [f32]) {
        let (isa, len, x) = (self.isa, x.len(), Parts::new(x));
        self.each_rows(len, 1, |first, len| {
            // SAFETY: ranges are disjoint.
            unsafe { isa.dispatch(rows::Silu(x.part(first, len))) }
        });
    }

    fn swiglu(&mut self, gate_up: &[f32], width: usize, y: &mut [f32]) {
        let (isa, rows, y) = (self.isa, y.len() / width, Parts::new(y));
        self.each_rows(rows, width, |first, rows| {
            let gate_up = &gate_up[first * 2 * width..(first + rows) * 2 * width];
            // SAFETY: row ranges are disjoint.
            unsafe { isa.dispatch(rows::SwiGlu { gate_up, width, y: y.part(first * width, rows * width) }) }
        });
    }

    fn add_residual(&mut self, residual: &[f32], weights: Residual, branch: &mut [f32]) {
        assert_eq!(residual.len(), branch.len());
        let (isa, len, branch) = (self.isa, branch.len(), Parts::new(branch));
        self.each_rows(len, 1, |first, len| {
            let residual = &residual[first..first + len];
            // SAFETY: ranges are disjoint.
            unsafe { isa.dispatch(rows::AddResidual { residual, weights, branch: branch.part(first, len) }) }
        });
    }

    fn route(&mut self, logits: &[f32], experts: usize, k: usize, picks: &mut [Pick]) {
        self.reserve_scratch(experts);
        let scratch = &mut self.scratch[0][..experts];
        // SAFETY: slices; the routine has no pointers.
        unsafe { self.isa.dispatch(rows::Route { logits, experts, k, picks, scratch }) }
    }

    fn combine(&mut self, x: &[f32], picks: &[Pick], places: &[u32], k: usize, y: &mut [f32]) {
        let rows = picks.len() / k;
        let (isa, width, y) = (self.isa, y.len() / rows.max(1), Parts::new(y));
        self.each_rows(rows, width * k, |first, rows| {
            let (picks, places) =
                (&picks[first * k..(first + rows) * k], &places[first * k..(first + rows) * k]);
            // SAFETY: row ranges are disjoint.
            unsafe {
                isa.dispatch(rows::Combine {
                    x,
                    picks,
                    places,
                    k,
                    width,
                    y: y.part(first * width, rows * width),
                })
            }
        });
    }

    fn blend_shared(&mut self, x: &[f32], coefficient: &[f32], shared: &[f32], y: &mut [f32]) {
        // SAFETY: slices; the routine has no pointers.
        unsafe { self.isa.dispatch(rows::BlendShared { x, coefficient, shared, y }) }
    }

    fn rotate(&mut self, x: &mut [f32], heads: usize, head_dim: usize, rotations: &Rotations) {
        let half = rotations.rotary_dim / 2;
        let rows = rotations.cos.len() / half;
        let row_width = x.len() / rows.max(1);
        let (isa, x) = (self.isa, Parts::new(x));
        self.each_rows(rows, heads * head_dim, |first, rows| {
            let tables = first * half..(first + rows) * half;
            let routine = rows::Rotate {
                // SAFETY: row ranges are disjoint.
                x: unsafe { x.part(first * row_width, rows * row_width) },
                row_width,
                heads,
                head_dim,
                cos: &rotations.cos[tables.clone()],
                sin: &rotations.sin[tables],
                half,
            };
            // SAFETY: the routine has no pointers.
            unsafe { isa.dispatch(routine) }
        });
    }

    fn lightning(
        &mut self,
        shape: Heads,
        decay: &Decay,
        spans: &mut [LightningSpan<'_>],
        qkv: &[f32],
        out: &mut [f32],
    ) {
        let Heads { heads, head_dim: d, .. } = shape;
        self.reserve_scratch(d.max(BLOCK_TOKENS) * BLOCK_TOKENS);
        let (isa, scratch) = (self.isa, Parts::new(&mut self.scratch));
        let out = Parts::new(out);
        let (mut work, mut row) = (Vec::with_capacity(spans.len() * heads), 0);
        for span in spans {
            let LightningState { state, keys, values } = &mut *span.state;
            let states = state.chunks_exact_mut(d * d);
            let blocks =
                keys.chunks_exact_mut(d * BLOCK_TOKENS).zip(values.chunks_exact_mut(d * BLOCK_TOKENS));
            work.extend(states.zip(blocks).enumerate().map(|(head, (state, (keys, values)))| {
                LightningHead {
                    head_dim: d,
                    powers: decay.powers(head),
                    reversed: decay.reversed(head),
                    state,
                    keys,
                    values,
                    position: span.position,
                    qkv: &qkv[(row * heads + head) * 3 * d..],
                    qkv_stride: heads * 3 * d,
                    out: out.at((row * heads + head) * d),
                    out_stride: heads * d,
                    rows: span.rows,
                }
            }));
            row += span.rows;
        }
        assert_eq!(row * heads * d, out.len, "spans cover the rows");
        let work = Parts::new(&mut work);
        self.pool.run(work.len, |task, thread| {
            // SAFETY: each task has its own head of its own sequence (and so its own columns of `out`), each thread its own scratch.
            unsafe {
                let (head, scratch) = (&mut work.part(task, 1)[0], &mut scratch.part(thread, 1)[0]);
                isa.dispatch(LightningTask { head, scratch });
            }
        });
    }

    fn attention(&mut self, shape: Heads, spans: &mut [AttentionSpan<'_>], qkv: &[f32], out: &mut [f32]) {
        let Heads { heads, kv_heads, head_dim: d } = shape;
        let (group, row_width) = (heads / kv_heads, (heads + 2 * kv_heads) * d);
        let mut row = 0;
        let mut work = Vec::new();
        for (index, span) in spans.iter_mut().enumerate() {
            for i in 0..span.rows {
                let kv = &qkv[(row + i) * row_width + heads * d..][..2 * kv_heads * d];
                store_keys_and_values(span, i, kv, d);
            }
            for first in (0..span.rows).step_by(ATTENTION_ROWS) {
                work.extend((0..kv_heads).map(|kv_head| (index, kv_head, first, row + first)));
            }
            row += span.rows;
        }
        assert_eq!(row * heads * d, out.len(), "spans cover the rows");
        self.reserve_scratch(ATTENTION_ROWS * group * (2 * d + BLOCK_TOKENS + 2));
        let (isa, scratch, out) = (self.isa, Parts::new(&mut self.scratch), Parts::new(out));
        let spans = &*spans;
        self.pool.run(work.len(), |task, thread| {
            let (index, kv_head, first, row) = work[task];
            let span = &spans[index];
            let routine = AttentionGroup {
                head_dim: d,
                heads: group,
                pages: span.pages,
                page_offset: span.offset + kv_head * 2 * d * BLOCK_TOKENS,
                position: span.position + first,
                rows: ATTENTION_ROWS.min(span.rows - first),
                q: &qkv[row * row_width + kv_head * group * d..],
                q_stride: row_width,
                out: out.at((row * heads + kv_head * group) * d),
                out_stride: heads * d,
                // SAFETY: each thread has its own scratch.
                scratch: unsafe { &mut scratch.part(thread, 1)[0] },
            };
            // SAFETY: tasks differ in rows or heads, so they write disjoint elements of `out`.
            unsafe { isa.dispatch(routine) };
        });
    }
}

/// Row `i` of a span into its page: keys transposed, values as they are. `kv` is `[{k, v}, kv_heads, d]`.
fn store_keys_and_values(span: &mut AttentionSpan<'_>, i: usize, kv: &[f32], d: usize) {
    let position = span.position + i;
    let token = position % BLOCK_TOKENS;
    let (keys, values) = kv.split_at(kv.len() / 2);
    let page = &mut span.pages[position / BLOCK_TOKENS].0[span.offset..];
    let heads =
        page.chunks_exact_mut(2 * d * BLOCK_TOKENS).zip(keys.chunks_exact(d).zip(values.chunks_exact(d)));
    for (page, (k, v)) in heads {
        let (page_keys, page_values) = page.split_at_mut(d * BLOCK_TOKENS);
        page_keys.iter_mut().skip(token).step_by(BLOCK_TOKENS).zip(k).for_each(|(to, &k)| *to = k);
        page_values[token * d..][..d].copy_from_slice(v);
    }
}
