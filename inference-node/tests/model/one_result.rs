//! One result, whatever served it: bits, not tolerances.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use sluice_node::kernel::Dtype;
use sluice_node::model::{Logits, Model, Runner, Span};
use sluice_node::state::{CacheLimits, Slot, StateCache};

use crate::{golden, load, whole};

const MODELS: [&str; 4] = ["linear-first", "odd-heads", "only-softmax", "m1-prenorm"];

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::Int8];

/// Each model in each dtype.
fn model(index: usize) -> Arc<Model> {
    static LOADED: OnceLock<Vec<Arc<Model>>> = OnceLock::new();
    let kinds = MODELS.iter().flat_map(|name| DTYPES.map(|dtype| load(&golden(name), dtype)));
    LOADED.get_or_init(|| kinds.collect())[index].clone()
}

/// What each step of a run takes from each sequence: token counts, some zero.
#[derive(Debug, Clone)]
struct Plan {
    model: usize,
    threads: usize,
    sequences: Vec<Vec<u32>>,
    chunks: Vec<usize>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let sequence = prop::collection::vec(0u32..60, 1..180);
    // Mostly decode steps, some chunks that stop short of, at and beyond the block grid.
    let chunk = prop_oneof![3 => Just(1usize), 2 => 0usize..9, 1 => 60usize..70, 1 => 100usize..180];
    let sequences = prop::collection::vec(sequence, 1..4);
    (0..MODELS.len() * DTYPES.len(), 1usize..4, sequences, prop::collection::vec(chunk, 1..40))
        .prop_map(|(model, threads, sequences, chunks)| Plan { model, threads, sequences, chunks })
}

struct Running<'a> {
    ids: &'a [u32],
    slot: Slot,
    logits: Vec<f32>,
}

/// Runs all sequences together as planned; returns each one's logits.
fn run(plan: &Plan, runner: &mut Runner, cache: &mut StateCache) -> Vec<Vec<f32>> {
    let vocabulary = runner.model().config().vocab_size;
    let mut running: Vec<Running<'_>> = plan
        .sequences
        .iter()
        .map(|ids| Running {
            ids,
            slot: cache.acquire(ids.len()).expect("the cache has room"),
            logits: Vec::new(),
        })
        .collect();
    let mut chunks = plan.chunks.iter().copied().chain([1]).cycle();
    while running.iter().any(|sequence| cache.position(&sequence.slot) < sequence.ids.len()) {
        let mut taken = Vec::new();
        for (index, sequence) in running.iter().enumerate() {
            let rest = &sequence.ids[cache.position(&sequence.slot)..];
            let count = chunks.next().expect("a cycle has no end").min(rest.len());
            if count > 0 {
                taken.push((index, &rest[..count]));
            }
        }
        let span =
            |&(index, tokens): &(usize, _)| Span { slot: &running[index].slot, tokens, logits: Logits::All };
        let spans: Vec<Span<'_>> = taken.iter().map(span).collect();
        let mut rows = runner.forward(cache, &spans).chunks_exact(vocabulary);
        for (index, tokens) in taken {
            running[index].logits.extend(rows.by_ref().take(tokens.len()).flatten());
        }
    }
    running
        .into_iter()
        .map(|sequence| {
            cache.release(sequence.slot);
            sequence.logits
        })
        .collect()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn batch_chunks_threads_and_reused_slots_change_no_bit(plan in plan()) {
        let model = model(plan.model);
        let alone: Vec<Vec<f32>> = plan.sequences.iter().map(|ids| whole(&model, ids)).collect();
        let mut cache = StateCache::new(model.config(), CacheLimits { slots: 3, tokens: 3 * 192 });
        let mut runner = Runner::new(model, plan.threads);
        for _ in 0..2 {
            let together = run(&plan, &mut runner, &mut cache);
            for (together, alone) in together.iter().zip(&alone) {
                prop_assert!(same_bits(together, alone));
            }
        }
    }

    #[test]
    fn asking_for_fewer_rows_changes_none(plan in plan()) {
        let model = model(plan.model);
        let vocabulary = model.config().vocab_size;
        let mut cache = StateCache::new(model.config(), CacheLimits { slots: 3, tokens: 3 * 192 });
        let slots: Vec<Slot> =
            plan.sequences.iter().map(|ids| cache.acquire(ids.len()).expect("the cache has room")).collect();
        let asked = [Logits::Last, Logits::None, Logits::All];
        let spans = slots.iter().zip(&plan.sequences).zip(asked);
        let spans: Vec<_> = spans.map(|((slot, tokens), logits)| Span { slot, tokens, logits }).collect();
        let mut expected = Vec::new();
        for (ids, asked) in plan.sequences.iter().zip(asked) {
            let all = whole(&model, ids);
            match asked {
                Logits::None => {}
                Logits::Last => expected.extend_from_slice(&all[all.len() - vocabulary..]),
                Logits::All => expected.extend(all),
            }
        }
        let mut runner = Runner::new(model, plan.threads);
        prop_assert!(same_bits(runner.forward(&mut cache, &spans), &expected));
        drop(spans);
        slots.into_iter().for_each(|slot| cache.release(slot));
    }
}
