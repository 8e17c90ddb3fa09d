//! The prefix cache through the engine, with the bundled model.

use super::tests::*;
use super::*;
use crate::node::{Node, NodeOptions, StartError};
use crate::sampler::Sampling;
use proptest::prelude::*;
use std::path::Path;

fn chat(seed: u32, tokens: u32) -> Submission {
    Submission { tenant: "a".into(), ..submission(prompt(seed, tokens), 30) }
}

fn counted(node: &Node) -> (u64, u64) {
    let odometer = node.engine().odometer();
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (read(&odometer.prompt_tokens_total), read(&odometer.cached_tokens_total))
}

/// Starts a node on a folder that the engine of the last one is about to let go.
fn restart(dir: &Path, configure: impl Fn(&mut NodeOptions)) -> Node {
    for _ in 0..10_000 {
        let mut options = options();
        options.cache_dir = Some(dir.to_owned());
        configure(&mut options);
        match Node::start(options) {
            Ok(node) => return node,
            Err(StartError::Engine(EngineError::CacheDir(FolderError::Taken { .. }))) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the engine before it never ended");
}

#[tokio::test]
async fn the_same_prompt_again_computes_what_lies_past_the_last_block() {
    let node = node(|_| {});
    for (seed, tokens) in [(1, 65), (2, 64), (3, 128), (4, 300), (5, 20)] {
        let (first, before) = (generate(&node, chat(seed, tokens)).await, counted(&node));
        let cached = u64::from((tokens - 1) / 64 * 64);
        let second = generate(&node, chat(seed, tokens)).await;
        assert_eq!((&second.ids, &second.text), (&first.ids, &first.text), "{tokens} tokens");
        assert_eq!(first.usage.cached_input_tokens, 0);
        let expect = mailbox::Usage {
            input_tokens: u64::from(tokens) - cached,
            cached_input_tokens: cached,
            output_tokens: 30,
        };
        assert_eq!(second.usage, expect);
        let after = counted(&node);
        assert_eq!((after.0 - before.0, after.1 - before.1), (u64::from(tokens) - cached, cached));
    }
    let odometer = node.engine().odometer();
    assert_eq!(odometer.cache_hits_total.load(Ordering::Relaxed), 3);
    assert!(odometer.cache_ram_bytes.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn the_next_turn_continues_where_the_last_ended() {
    let node = node(|_| {});
    let first = chat(1, 100);
    let answer = generate(&node, first.clone()).await;
    let turn = |ids: &[u32]| [&first.prompt_ids[..], ids, &prompt(9, 20)[..]].concat();
    let next = Submission { prompt_ids: turn(&answer.ids), ..chat(0, 1) };
    let warm = generate(&node, next.clone()).await;
    // The last token that was sampled was never computed.
    assert_eq!(warm.usage.cached_input_tokens, 100 + 30 - 1);
    let cold = self::node(|options| options.cache_ram_bytes = 0);
    let cold = generate(&cold, next).await;
    assert_eq!((warm.ids, warm.text), (cold.ids, cold.text));
    // An answer that was edited goes on from before the edit.
    let mut edited = answer.ids.clone();
    edited[10] ^= 1;
    let edited = generate(&node, Submission { prompt_ids: turn(&edited), ..chat(0, 1) }).await;
    assert_eq!(edited.usage.cached_input_tokens, 64);
}

#[tokio::test]
async fn what_one_tenant_sent_another_cannot_find() {
    let node = node(|_| {});
    generate(&node, chat(1, 200)).await;
    let other = generate(&node, Submission { tenant: "b".into(), ..chat(1, 200) }).await;
    assert_eq!(other.usage.cached_input_tokens, 0);
}

#[tokio::test]
async fn several_choices_compute_their_prompt_once() {
    let node = node(|_| {});
    let choices = (0..6).map(|seed| {
        let sampling = Sampling::new(1.0, 1.0, 0, seed).expect("valid");
        generate(&node, Submission { sampling, ..chat(1, 1000) })
    });
    let choices = futures::future::join_all(choices).await;
    let cached: Vec<u64> = choices.iter().map(|choice| choice.usage.cached_input_tokens).collect();
    assert_eq!(cached, [0, 960, 960, 960, 960, 960]);
    assert_eq!(counted(&node), (1000 + 5 * 40, 5 * 960));
    // What each says is what it says alone.
    let alone = self::node(|options| (options.cache_ram_bytes, options.slots) = (0, 1));
    for (seed, choice) in choices.iter().enumerate() {
        let sampling = Sampling::new(1.0, 1.0, 0, seed as u64).expect("valid");
        assert_eq!(generate(&alone, Submission { sampling, ..chat(1, 1000) }).await.ids, choice.ids);
    }
}

#[tokio::test]
async fn nobody_waits_for_a_sequence_that_is_gone() {
    let node = node(|options| (options.slots, options.step_tokens_max) = (4, 16));
    let maker = node.engine().submit(chat(1, 4000)).await.expect("there is room");
    let waiting = futures::future::join_all((0..3).map(|_| generate(&node, chat(1, 4000))));
    let leave = async {
        while node.engine().odometer().sequences_waiting.load(Ordering::Relaxed) < 3 {
            tokio::task::yield_now().await;
        }
        drop(maker);
    };
    let (outcomes, ()) = tokio::join!(waiting, leave);
    let cached = outcomes.iter().map(|outcome| outcome.usage.cached_input_tokens);
    assert_eq!(cached.filter(|&tokens| tokens < 3968).count(), 1, "one of them took its place");
    assert!(outcomes.iter().all(|outcome| outcome.ids == outcomes[0].ids));
}

#[tokio::test]
async fn the_wait_is_bounded() {
    let node = node(|options| {
        (options.slots, options.step_tokens_max, options.cache_wait_ms) = (4, 16, 0);
        (options.cache_grid_tokens, options.cache_turns_max) = (0, 0);
    });
    let together = futures::future::join_all((0..2).map(|_| generate(&node, chat(1, 3000)))).await;
    assert_eq!(together[0].ids, together[1].ids);
    assert_eq!(together.iter().map(|outcome| outcome.usage.cached_input_tokens).sum::<u64>(), 0);
}

#[tokio::test]
async fn held_sequences_count_as_waiting_and_end_like_others() {
    let node = node(|options| {
        (options.slots, options.step_tokens_max, options.waiting_max) = (1, 2, 2);
        (options.cache_grid_tokens, options.cache_turns_max) = (0, 0);
    });
    let maker = node.engine().submit(chat(1, 4000)).await.expect("there is room");
    let held = node.engine().submit(chat(1, 4000)).await.expect("there is room");
    let other = node.engine().submit(chat(1, 4000)).await.expect("there is room");
    let refusal = node.engine().submit(chat(1, 4000)).await.map(drop);
    assert!(matches!(refusal, Err(Refusal::QueueFull { waiting: 2, .. })), "{refusal:?}");
    held.remote().cancel();
    assert_eq!(collect(held).await.ending, Ending::Cancelled);
    let deadline = Some(Instant::now() + Duration::from_millis(1));
    let late = generate(&node, Submission { deadline, ..chat(1, 4000) }).await;
    assert_eq!((late.ending, late.usage), (Ending::Deadline, mailbox::Usage::default()));
    drop((maker, other));
    assert_eq!(generate(&node, chat(2, 5)).await.ending, Ending::Length);
}

#[tokio::test]
async fn a_parked_session_resumes_after_a_restart_with_one_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cache");
    let whole = Submission { output_tokens_max: 60, ..chat(1, 150) };
    let expect = generate(&node(|options| options.cache_ram_bytes = 0), whole.clone()).await;
    let node = restart(&dir, |_| {});
    let grant = Grant { output_tokens: 25, is_final: true };
    let first = generate(&node, Submission { grant, ..whole.clone() }).await;
    assert_eq!((first.ids.len(), first.ending), (25, Ending::GrantExhausted));
    node.drain().await;
    drop(node);

    let node = restart(&dir, |_| {});
    let rest = generate(&node, Submission { resume_ids: first.ids.clone(), ..whole }).await;
    assert_eq!([first.ids, rest.ids].concat(), expect.ids);
    assert_eq!(first.text + &rest.text, expect.text);
    assert_eq!(rest.usage.cached_input_tokens, 150);
    assert_eq!(counted(&node), (1, 150 + 24), "the last token alone is computed");
}

/// What is parked just behind the prompt is one token too deep for the same prompt: the next token comes from its last.
#[tokio::test]
async fn the_last_token_of_a_prompt_is_computed() {
    let node = node(|_| {});
    for tokens in [100, 128] {
        let one = Submission { output_tokens_max: 1, ..chat(tokens, tokens) };
        let first = generate(&node, one.clone()).await;
        let again = generate(&node, one.clone()).await;
        assert_eq!((again.ids, again.usage.cached_input_tokens), (first.ids.clone(), 64), "{tokens} tokens");
        let resumed = Submission { resume_ids: first.ids, output_tokens_max: 20, ..one };
        let resumed = generate(&node, resumed).await;
        assert_eq!(resumed.usage.cached_input_tokens, u64::from(tokens));
    }
}

#[tokio::test]
async fn files_that_vanish_under_a_node_cost_time_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cache");
    let first = restart(&dir, |_| {});
    let expect = generate(&first, chat(1, 200)).await;
    first.drain().await;
    drop(first);
    let node = restart(&dir, |_| {});
    for entry in std::fs::read_dir(&dir).expect("readable") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some() {
            std::fs::remove_file(path).expect("removed");
        }
    }
    let next = [&prompt(1, 200)[..], &expect.ids, &prompt(2, 10)[..]].concat();
    let outcome = generate(&node, Submission { prompt_ids: next.clone(), ..chat(1, 200) }).await;
    assert_eq!(outcome.usage.cached_input_tokens, 0);
    let cold = self::node(|options| options.cache_ram_bytes = 0);
    assert_eq!(outcome.ids, generate(&cold, Submission { prompt_ids: next, ..chat(1, 200) }).await.ids);
}

#[tokio::test]
async fn another_models_folder_is_of_no_use() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cache");
    let first = restart(&dir, |_| {});
    let expect = generate(&first, chat(1, 200)).await;
    first.drain().await;
    drop(first);
    // The same weights under a config that says something else.
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("made");
    for entry in std::fs::read_dir(options().model_dir).expect("readable") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), model.join(entry.file_name())).expect("copied");
    }
    let config = std::fs::read_to_string(model.join("config.json")).expect("readable");
    std::fs::write(model.join("config.json"), config + "\n").expect("written");
    let other = restart(&dir, |options| options.model_dir = model.clone());
    let outcome = generate(&other, chat(1, 200)).await;
    assert_eq!((outcome.ids, outcome.usage.cached_input_tokens), (expect.ids, 0));
}

#[derive(Debug, Clone)]
enum Happening {
    /// Prompts that arrive together: how much of a common text, and what follows.
    Arrive(Vec<(usize, u32, bool)>),
    Restart,
}

fn happening() -> impl Strategy<Value = Happening> {
    let prompt = (1usize..300, 0u32..4, any::<bool>());
    prop_oneof![
        5 => prop::collection::vec(prompt, 1..5).prop_map(Happening::Arrive),
        1 => Just(Happening::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    /// Whatever came before, whatever was evicted: the tokens of an engine that caches nothing, and every prompt token counted in
    /// one class.
    #[test]
    fn a_cache_changes_when_not_what(
        happenings in prop::collection::vec(happening(), 2..5),
        ram_bytes in prop_oneof![Just(600_000u64), Just(2_000_000), Just(1 << 30)],
        disk_bytes in prop_oneof![Just(0u64), Just(1_000_000), Just(1 << 30)],
        step_tokens_max in prop_oneof![Just(9usize), Just(70), Just(512)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let folder = tempfile::tempdir().expect("a folder");
            let dir = folder.path().join("cache");
            let configure = |options: &mut NodeOptions| {
                (options.cache_ram_bytes, options.cache_disk_bytes) = (ram_bytes, disk_bytes);
                (options.step_tokens_max, options.cache_grid_tokens) = (step_tokens_max, 128);
            };
            let cold = node(|options| options.cache_ram_bytes = 0);
            let mut warm = restart(&dir, configure);
            for happening in happenings {
                let Happening::Arrive(prompts) = happening else {
                    warm.drain().await;
                    drop(warm);
                    warm = restart(&dir, configure);
                    continue;
                };
                let submissions: Vec<Submission> = prompts.iter().map(|&(fork, own, is_other)| {
                    let common = &prompt(77, 300)[..fork];
                    let prompt_ids = [common, &prompt(own, own * 31)].concat();
                    let tenant = if is_other { "b" } else { "a" }.into();
                    Submission { prompt_ids, tenant, output_tokens_max: 20, ..chat(0, 1) }
                }).collect();
                let outcomes = submissions.iter().map(|submission| generate(&warm, submission.clone()));
                let outcomes = futures::future::join_all(outcomes).await;
                for (submission, outcome) in submissions.iter().zip(outcomes) {
                    let expect = generate(&cold, submission.clone()).await;
                    prop_assert_eq!(&outcome.ids, &expect.ids);
                    prop_assert_eq!(&outcome.text, &expect.text);
                    let usage = outcome.usage;
                    prop_assert_eq!(usage.input_tokens + usage.cached_input_tokens, submission.prompt_ids.len() as u64);
                    prop_assert!(usage.input_tokens > 0, "the last token is computed");
                }
                let odometer = warm.engine().odometer();
                prop_assert!(odometer.cache_ram_bytes.load(Ordering::Relaxed) <= ram_bytes);
                prop_assert!(odometer.cache_disk_bytes.load(Ordering::Relaxed) <= disk_bytes);
            }
            Ok::<(), TestCaseError>(())
        })?;
    }
}
