//! The engine with the bundled model: one result whatever the company, and every end of a sequence.

#[path = "engine/preemption_tests.rs"]
mod preemption;

use super::*;
use crate::node::{Node, NodeOptions};
use sluice_proto::node::v1::tokenize_request::Input;
use sluice_proto::node::v1::{ChatMessage, ChatPrompt};
use std::path::Path;

pub(super) fn options() -> NodeOptions {
    let mut options = NodeOptions::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sluice-demo"));
    options.threads = 1;
    options.slots = 8;
    options
}

pub(super) fn node(configure: impl FnOnce(&mut NodeOptions)) -> Node {
    let mut options = options();
    configure(&mut options);
    Node::start(options).expect("the bundled model starts")
}

const ALL: Grant = Grant { output_tokens: u64::MAX, is_final: true };

pub(super) fn submission(prompt_ids: Vec<u32>, output_tokens_max: usize) -> Submission {
    Submission {
        grant: ALL,
        ignore_end_of_sequence: true,
        tenant: "test".into(),
        ..Submission::new(prompt_ids, output_tokens_max)
    }
}

pub(super) fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|position| 4 + (seed * 7919 + position * 104_729) % 4000).collect()
}

#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub ids: Vec<u32>,
    pub text: String,
    pub usage: mailbox::Usage,
    pub ending: Ending,
}

pub(super) async fn collect(mut answer: Answer) -> Outcome {
    let (mut ids, mut text) = (Vec::new(), String::new());
    loop {
        let delivery = answer.next().await.expect("an ending comes before the end");
        ids.extend(delivery.ids);
        text.push_str(&delivery.text);
        if let Some(ending) = delivery.ending {
            assert_eq!(answer.next().await, None);
            return Outcome { ids, text, usage: delivery.usage, ending };
        }
    }
}

pub(super) async fn generate(node: &Node, submission: Submission) -> Outcome {
    collect(node.engine().submit(submission).await.expect("there is room")).await
}

/// Prompts on both sides of the block grid, greedy and sampled.
fn varied() -> Vec<Submission> {
    [1, 5, 63, 64, 65, 190]
        .iter()
        .zip(0u32..)
        .map(|(&tokens, seed)| {
            let temperature = if seed % 2 == 0 { 0.0 } else { 0.9 };
            let sampling = Sampling::new(temperature, 0.95, 50, u64::from(seed)).expect("valid");
            Submission {
                sampling,
                tenant: format!("tenant-{}", seed % 3).into(),
                ..submission(prompt(seed, tokens), 40)
            }
        })
        .collect()
}

#[tokio::test]
async fn a_sequence_is_the_same_in_any_company_and_any_chunks() {
    let alone = node(|options| options.slots = 1);
    let mut expect = Vec::new();
    for submission in varied() {
        expect.push(generate(&alone, submission).await);
    }
    for (slots, step_tokens_max, threads) in [(8, 512, 2), (6, 7, 1), (3, 50, 1)] {
        let busy = node(|options| {
            (options.slots, options.step_tokens_max, options.threads) = (slots, step_tokens_max, threads);
        });
        let together = varied().into_iter().map(|submission| generate(&busy, submission));
        assert_eq!(
            futures::future::join_all(together).await,
            expect,
            "{slots} slots, steps of {step_tokens_max}"
        );
    }
}

#[tokio::test]
async fn a_resumed_sequence_goes_on_with_the_same_tokens_and_text() {
    let node = node(|_| {});
    for (submission, stops) in varied().into_iter().zip([&["e"][..], &[]].into_iter().cycle()) {
        let stop_strings: Arc<[String]> = stops.iter().map(|stop| format!("{stop} th")).collect();
        let submission = Submission { stop_strings: stop_strings.clone(), ..submission };
        let whole = generate(&node, submission.clone()).await;
        for cut in [1, 2, 7, 20, whole.ids.len()] {
            let cut = cut.min(whole.ids.len());
            let resume_ids = whole.ids[..cut].to_vec();
            let mut detokenizer = crate::detokenizer::Detokenizer::new(stop_strings.clone());
            let mut sent = String::new();
            for &id in &resume_ids {
                detokenizer.push(node.service().tokenizer().bytes(id), &mut sent);
            }
            let rest = generate(&node, Submission { resume_ids, ..submission.clone() }).await;
            assert_eq!(rest.ids, whole.ids[cut..], "cut at {cut}");
            if cut < whole.ids.len() {
                assert_eq!(sent + &rest.text, whole.text, "cut at {cut}");
            }
            assert_eq!(rest.ending, whole.ending, "cut at {cut}");
            // Classes aside: of what was resumed, much is in the cache.
            let counted =
                |usage: mailbox::Usage| (usage.input_tokens + usage.cached_input_tokens, usage.output_tokens);
            assert_eq!(counted(rest.usage), counted(whole.usage), "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn a_cancelled_sequence_stops_within_a_step_and_counts_exactly() {
    let node = node(|_| {});
    let mut answer = node.engine().submit(submission(prompt(1, 10), 100_000)).await.expect("there is room");
    let first = answer.next().await.expect("a first token");
    answer.remote().cancel();
    let steps_then = node.engine().odometer().steps_total.load(Ordering::Relaxed);
    let rest = collect(answer).await;
    let odometer = node.engine().odometer();
    assert_eq!(rest.ending, Ending::Cancelled);
    assert!(odometer.steps_total.load(Ordering::Relaxed) <= steps_then + 1);
    let tokens = (first.ids.len() + rest.ids.len()) as u64;
    assert_eq!(
        rest.usage,
        mailbox::Usage { input_tokens: 10, cached_input_tokens: 0, output_tokens: tokens }
    );
    assert_eq!(odometer.output_tokens_total.load(Ordering::Relaxed), tokens);
    assert_eq!(odometer.prompt_tokens_total.load(Ordering::Relaxed), 10);
}

#[tokio::test]
async fn a_client_that_is_gone_frees_its_slot() {
    let node = node(|options| options.slots = 1);
    let gone = node.engine().submit(submission(prompt(1, 10), 100_000)).await.expect("there is room");
    drop(gone);
    assert_eq!(generate(&node, submission(prompt(2, 10), 3)).await.ids.len(), 3);
}

#[tokio::test]
async fn a_sequence_never_passes_its_grant() {
    let node = node(|_| {});
    let grant = |output_tokens, is_final| Grant { output_tokens, is_final };
    let start = Submission { grant: grant(3, false), ..submission(prompt(3, 70), 100) };
    let mut answer = node.engine().submit(start).await.expect("there is room");
    let mut ids = 0;
    while ids < 3 {
        ids += answer.next().await.expect("granted tokens").ids.len();
    }
    // Another sequence runs many steps beside it; the one at its grant stands still.
    generate(&node, submission(prompt(4, 5), 20)).await;
    answer.remote().raise_grant(grant(2, false));
    answer.remote().raise_grant(grant(5, true));
    let rest = collect(answer).await;
    assert_eq!((ids + rest.ids.len(), rest.usage.output_tokens, rest.ending), (5, 5, Ending::GrantExhausted));

    let nothing = Submission { grant: grant(0, true), ..submission(prompt(3, 5), 100) };
    let outcome = generate(&node, nothing).await;
    assert_eq!((outcome.ids.len(), outcome.ending), (0, Ending::GrantExhausted));
}

#[tokio::test]
async fn a_slot_is_held_for_a_bounded_time() {
    let node = node(|options| (options.slots, options.grant_idle_ms) = (1, 20));
    let grant = Grant { output_tokens: 2, is_final: false };
    let idle = generate(&node, Submission { grant, ..submission(prompt(3, 5), 100) }).await;
    assert_eq!((idle.ids.len(), idle.ending), (2, Ending::GrantTimeout));
    assert_eq!(generate(&node, submission(prompt(3, 5), 4)).await.ending, Ending::Length);
}

#[tokio::test]
async fn a_deadline_ends_a_sequence_wherever_it_stands() {
    let node = node(|options| options.slots = 1);
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let running = node.engine().submit(Submission { deadline, ..submission(prompt(1, 5), 100_000) });
    let waiting = node.engine().submit(Submission { deadline, ..submission(prompt(2, 5), 100_000) });
    let (running, waiting) = tokio::join!(running, waiting);
    let running = collect(running.expect("there is room")).await;
    let waiting = collect(waiting.expect("there is room")).await;
    assert_eq!((running.ending, waiting.ending), (Ending::Deadline, Ending::Deadline));
    assert_eq!(running.usage.output_tokens, running.ids.len() as u64);
    assert_eq!(waiting.usage, mailbox::Usage::default());
}

#[tokio::test]
async fn text_ends_before_a_stop_string_and_with_a_stop_id() {
    let node = node(|_| {});
    let message = ChatMessage {
        role: "user".into(),
        content: "What is linear attention?".into(),
        ..Default::default()
    };
    let chat = Input::Chat(ChatPrompt { messages: vec![message], tools_json: String::new() });
    let chat = node.service().encode(chat).expect("it renders");
    let whole =
        generate(&node, Submission { ignore_end_of_sequence: false, ..submission(chat.clone(), 100) }).await;
    assert_eq!(whole.ending, Ending::Stop { stop_string: None }, "the model ends its answer: {}", whole.text);
    let word = whole.text.split(' ').nth(3).expect("an answer of some words").to_owned();

    let stop_strings: Arc<[String]> = Arc::new(["never said".to_owned(), word.clone()]);
    let stopped = generate(&node, Submission { stop_strings, ..submission(chat.clone(), 100) }).await;
    assert_eq!(Some(stopped.text.as_str()), whole.text.split(&word).next());
    assert_eq!(stopped.ending, Ending::Stop { stop_string: Some(word) });
    assert!(whole.ids.starts_with(&stopped.ids));
    assert_eq!(stopped.usage.output_tokens, stopped.ids.len() as u64);

    let stopped = generate(&node, Submission { stop_ids: vec![whole.ids[4]], ..submission(chat, 100) }).await;
    assert_eq!((&stopped.ids[..], stopped.ending), (&whole.ids[..5], Ending::Stop { stop_string: None }));
    assert!(whole.text.starts_with(&stopped.text));
}

#[tokio::test]
async fn wild_bytes_come_out_as_whole_characters() {
    let node = node(|_| {});
    let sampling = Sampling::new(20.0, 1.0, 0, 5).expect("valid");
    let outcome = generate(&node, Submission { sampling, ..submission(prompt(1, 3), 400) }).await;
    let tokenizer = node.service().tokenizer();
    let bytes: Vec<u8> = outcome.ids.iter().flat_map(|&id| tokenizer.bytes(id)).copied().collect();
    assert_eq!(outcome.text, String::from_utf8_lossy(&bytes));
    assert!(outcome.text.contains(char::REPLACEMENT_CHARACTER), "hot enough to sample lone bytes");
}

#[tokio::test]
async fn a_client_that_does_not_read_delays_nobody() {
    let node = node(|_| {});
    let mut slow = node.engine().submit(submission(prompt(1, 5), 50)).await.expect("there is room");
    let fast = generate(&node, submission(prompt(2, 5), 60)).await;
    assert_eq!(fast.ids.len(), 60);
    let pile = slow.next().await.expect("everything at once");
    assert_eq!((pile.ids.len(), pile.ending), (50, Some(Ending::Length)));
}

#[tokio::test]
async fn a_full_node_refuses_with_a_wait() {
    let node = node(|options| (options.slots, options.waiting_max) = (1, 2));
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(node.engine().submit(submission(prompt(1, 5), 100_000)).await.expect("there is room"));
    }
    let refusal = node.engine().submit(submission(prompt(1, 5), 1)).await.map(drop);
    assert!(matches!(refusal, Err(Refusal::QueueFull { waiting: 2, retry_after }) if !retry_after.is_zero()));
    drop(held);
    assert_eq!(generate(&node, submission(prompt(1, 5), 1)).await.ids.len(), 1);
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_once() {
    let node = node(|options| options.cache_tokens = Some(1024));
    let refusal = node.engine().submit(submission(prompt(1, 5), 100_000)).await.map(drop);
    assert_eq!(refusal, Err(Refusal::TooLarge { tokens: 100_005 }));
}
