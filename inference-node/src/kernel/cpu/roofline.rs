//! What this machine can do at most, measured with the kernels' own instructions: the floor that a figure is held against.

use std::time::{Duration, Instant};

use super::dot::Dot;
use super::simd::Vector;
use super::{Cpu, Parts, Routine};
use crate::kernel::matrix::Dtype;
use crate::kernel::memory::Words;

/// Words read for the bandwidth: 256 MiB, beyond any cache.
const READ_WORDS: usize = 64 << 20;
/// Words of one task.
const TASK_WORDS: usize = 1 << 18;
/// Steps of one task of the peak: tens of microseconds.
const PEAK_STEPS: usize = 1 << 12;
/// Independent chains: more than the instructions' latency needs, fewer than the registers.
const CHAINS: usize = 12;
/// How long each is measured; the best of several rounds counts, since a shared machine only ever makes a round slower.
const MEASURE_AT_LEAST: Duration = Duration::from_millis(250);
const ROUNDS_MIN: usize = 3;

#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// Reading memory with all threads.
    pub read_bytes_per_second: f64,
    /// Multiplications and additions of a dtype in registers, with all threads.
    pub operations_per_second: f64,
}

impl Cpu {
    /// Takes about a second and 256 MiB.
    pub fn measure_roofline(&mut self, dtype: Dtype) -> Roofline {
        let mut words = Words::zeroed(READ_WORDS);
        // A page that was never written is the one zero page of the system: it would be read from the cache.
        words.fill(1.0f32.to_bits());
        let (isa, tasks) = (self.isa, READ_WORDS / TASK_WORDS);
        let mut sums = vec![0.0; tasks];
        let read_s = best_of(|| {
            let sums = Parts::new(&mut sums);
            self.pool.run(tasks, |task, _| {
                let words = &words[task * TASK_WORDS..][..TASK_WORDS];
                // SAFETY: each task has its own sum.
                unsafe { isa.dispatch(Read { words, sum: &mut sums.part(task, 1)[0] }) };
            });
        });
        let tasks = 64 * self.pool.threads();
        let (mut results, mut multiply_adds) = (vec![0.0; tasks], vec![0; tasks]);
        let peak_s = best_of(|| {
            let (results, counts) = (Parts::new(&mut results), Parts::new(&mut multiply_adds));
            self.pool.run(tasks, |task, _| {
                // SAFETY: each task has its own result and count.
                let (result, count) =
                    unsafe { (&mut results.part(task, 1)[0], &mut counts.part(task, 1)[0]) };
                // SAFETY: slices; the routine has no pointers.
                unsafe { isa.dispatch(Peak { dtype, seed: task as u32, result, multiply_adds: count }) };
            });
        });
        std::hint::black_box((sums, results));
        Roofline {
            read_bytes_per_second: (READ_WORDS * size_of::<u32>()) as f64 / read_s,
            operations_per_second: 2.0 * multiply_adds.iter().sum::<usize>() as f64 / peak_s,
        }
    }
}

fn best_of(mut round: impl FnMut()) -> f64 {
    let started_at = Instant::now();
    let (mut best, mut rounds) = (f64::MAX, 0);
    while rounds < ROUNDS_MIN || started_at.elapsed() < MEASURE_AT_LEAST {
        let round_started_at = Instant::now();
        round();
        best = round_started_at.elapsed().as_secs_f64().min(best);
        rounds += 1;
    }
    best
}

struct Read<'a> {
    words: &'a [u32],
    sum: &'a mut f32,
}

impl Routine for Read<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let step = 8 * V::LANES;
        // SAFETY: V's features are present; each chunk has `step` words, and ones are numbers.
        unsafe {
            let mut sums = [V::splat(0.0); 8];
            for chunk in self.words.chunks_exact(step) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(chunk.as_ptr().wrapping_add(i * V::LANES).cast()));
                }
            }
            let mut lanes = [0.0; 16];
            let mut total = V::splat(0.0);
            for sum in sums {
                total = total.add(sum);
            }
            total.store(lanes.as_mut_ptr());
            *self.sum = lanes.iter().sum();
        }
    }
}

struct Peak<'a> {
    dtype: Dtype,
    seed: u32,
    result: &'a mut f32,
    multiply_adds: &'a mut usize,
}

impl Routine for Peak<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: V's features are present.
        unsafe {
            match self.dtype {
                Dtype::F32 => self.chains::<V::F32>(1),
                Dtype::Bf16 => self.chains::<V::Bf16>(2),
                Dtype::Int8 => self.chains::<V::Int8>(4),
            }
        }
    }
}

impl Peak<'_> {
    /// # Safety
    /// D's features are present.
    #[inline(always)]
    unsafe fn chains<D: Dot>(self, per_word: usize) {
        // Small numbers of every encoding, which the compiler cannot know.
        let words = [std::hint::black_box(0x0101_0101 & (self.seed | 1)); 16];
        let (scales, sums) = ([1.0f32; 16], [0i32; 16]);
        // SAFETY: the arrays are as long as the widest register.
        unsafe {
            let (left, right) = (D::left(words.as_ptr()), D::right(words.as_ptr()));
            let mut chains = [D::zero(); CHAINS];
            for _ in 0..PEAK_STEPS {
                for chain in &mut chains {
                    *chain = D::step(left, right, *chain);
                }
            }
            let mut lanes = [0.0; 16];
            for chain in chains {
                D::finish(chain, 1.0, scales.as_ptr(), sums.as_ptr()).store(lanes.as_mut_ptr());
                *self.result += lanes[0];
            }
        }
        *self.multiply_adds = PEAK_STEPS * CHAINS * D::V::LANES * per_word;
    }
}
