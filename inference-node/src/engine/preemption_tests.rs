//! Sequences whose state is moved out of a slot and back: the same tokens, and every way to end.

use super::*;

/// One token is enough of a turn.
fn restless(slots: usize) -> Node {
    node(|options| {
        options.slots = slots;
        options.preempt_after_tokens = 1;
    })
}

fn preemptions(node: &Node) -> u64 {
    node.engine().odometer().preemptions_total.load(Ordering::Relaxed)
}

async fn until_suspended(node: &Node) {
    while preemptions(node) == 0 {
        tokio::task::yield_now().await;
    }
}

fn with_priority(priority: Priority, submission: Submission) -> Submission {
    Submission { priority, tenant: format!("{priority:?}").into(), ..submission }
}

async fn each_alone() -> Vec<Outcome> {
    let alone = node(|options| options.slots = 1);
    let mut outcomes = Vec::new();
    for submission in varied() {
        outcomes.push(generate(&alone, submission).await);
    }
    outcomes
}

#[tokio::test]
async fn interrupted_by_higher_priorities_it_is_the_same() {
    let expect = each_alone().await;
    for step_tokens_max in [7, 512] {
        let node = node(|options| {
            (options.slots, options.preempt_after_tokens) = (1, 1);
            options.step_tokens_max = step_tokens_max;
        });
        for (submission, expect) in varied().into_iter().zip(&expect) {
            let start = node.engine().submit(with_priority(Priority::Batch, submission));
            let mut batch = std::pin::pin!(collect(start.await.expect("there is room")));
            let mut seed = 0;
            let outcome = loop {
                seed += 1;
                let urgent = with_priority(Priority::High, super::submission(prompt(seed, 5), 3));
                tokio::select! {
                    biased;
                    outcome = &mut batch => break outcome,
                    urgent = generate(&node, urgent) => assert_eq!(urgent.ids.len(), 3),
                }
            };
            assert_eq!(&outcome, expect);
        }
        assert!(preemptions(&node) >= 10, "{} preemptions", preemptions(&node));
    }
}

#[tokio::test]
async fn tenants_that_take_turns_get_what_each_gets_alone() {
    let expect = each_alone().await;
    for slots in [1, 2, 4] {
        let node = node(|options| {
            options.slots = slots;
            (options.preempt_after_tokens, options.preempt_lag_tokens) = (1, 0);
        });
        let tenants = varied()
            .into_iter()
            .enumerate()
            .map(|(index, submission)| Submission { tenant: format!("tenant-{index}").into(), ..submission });
        let together = tenants.map(|submission| generate(&node, submission));
        assert_eq!(futures::future::join_all(together).await, expect, "{slots} slots");
        assert!(preemptions(&node) >= 10, "{} preemptions with {slots} slots", preemptions(&node));
    }
}

#[tokio::test]
async fn grants_in_small_change_are_kept_to_while_others_take_the_slots() {
    let expect = each_alone().await;
    let node = node(|options| {
        (options.slots, options.grant_patience_ms, options.preempt_after_tokens) = (2, 0, 1);
    });
    let stingy = async |(submission, step): (Submission, u64)| {
        let (mut granted, mut ids) = (0, Vec::new());
        let grant = Grant { output_tokens: granted, is_final: false };
        let start = node.engine().submit(Submission { grant, ..submission });
        let mut answer = start.await.expect("there is room");
        // Nobody has a grant yet: whoever has a slot must give it to those that wait.
        until_suspended(&node).await;
        loop {
            while (ids.len() as u64) < granted {
                let delivery = answer.next().await.expect("granted tokens come");
                ids.extend(delivery.ids);
                assert!(ids.len() as u64 <= granted && delivery.usage.output_tokens <= granted);
                if delivery.ending.is_some() {
                    return ids;
                }
            }
            granted += step;
            answer.remote().raise_grant(Grant { output_tokens: granted, is_final: false });
        }
    };
    let together = varied().into_iter().zip([1, 2, 3, 5, 7, 11]).map(stingy);
    let together = futures::future::join_all(together).await;
    assert!(together.iter().eq(expect.iter().map(|outcome| &outcome.ids)));
}

#[tokio::test]
async fn who_lets_its_grant_run_out_gives_its_slot_away_and_gets_another() {
    let alone = generate(&node(|_| {}), submission(prompt(3, 70), 30)).await;
    let node = node(|options| (options.slots, options.grant_patience_ms) = (1, 0));
    let grant = Grant { output_tokens: 2, is_final: false };
    let start = node.engine().submit(Submission { grant, ..submission(prompt(3, 70), 30) });
    let idle = start.await.expect("there is room");
    assert_eq!(generate(&node, submission(prompt(4, 5), 20)).await.ids.len(), 20);
    idle.remote().raise_grant(ALL);
    assert_eq!((collect(idle).await, preemptions(&node)), (alone, 1));
}

/// A batch sequence that is suspended, and the urgent one that has its slot for good.
async fn suspended(node: &Node, batch: Submission) -> (Answer, Answer) {
    let batch = node.engine().submit(with_priority(Priority::Batch, batch)).await.expect("there is room");
    let urgent = with_priority(Priority::High, super::submission(prompt(2, 5), 100_000));
    let urgent = node.engine().submit(urgent).await.expect("there is room");
    until_suspended(node).await;
    (batch, urgent)
}

#[tokio::test]
async fn a_suspended_sequence_ends_like_any_other() {
    let node = restless(1);
    let (batch, urgent) = suspended(&node, submission(prompt(1, 10), 100_000)).await;
    batch.remote().cancel();
    let outcome = collect(batch).await;
    assert_eq!(outcome.ending, Ending::Cancelled);
    assert_eq!(outcome.usage.output_tokens, outcome.ids.len() as u64);
    drop(urgent);

    let node = restless(1);
    let deadline = Some(Instant::now() + Duration::from_secs(1));
    let start = Submission { deadline, ..submission(prompt(1, 10), 100_000) };
    let (batch, _urgent) = suspended(&node, start).await;
    assert_eq!(collect(batch).await.ending, Ending::Deadline);

    let node = self::node(|options| {
        (options.slots, options.grant_patience_ms, options.grant_idle_ms) = (1, 0, 500);
    });
    let grant = Grant { output_tokens: 2, is_final: false };
    let (batch, _urgent) = suspended(&node, Submission { grant, ..submission(prompt(1, 10), 9) }).await;
    let outcome = collect(batch).await;
    assert_eq!((outcome.ids.len(), outcome.ending), (2, Ending::GrantTimeout));
}

#[tokio::test]
async fn without_memory_for_it_nobody_is_suspended() {
    let node = node(|options| {
        (options.slots, options.preempt_after_tokens, options.suspended_bytes_max) = (1, 1, 0);
    });
    let batch = with_priority(Priority::Batch, super::submission(prompt(1, 10), 60));
    let batch = node.engine().submit(batch).await.expect("there is room");
    let urgent = with_priority(Priority::High, super::submission(prompt(2, 5), 3));
    assert_eq!(generate(&node, urgent).await.ids.len(), 3);
    assert_eq!((collect(batch).await.ids.len(), preemptions(&node)), (60, 0));
}
