//! What is billed is what the engine counted, however a request ends.

use futures::future::join_all;
use serde_json::{Value, json};
use sluice_tests::{Cluster, ClusterOptions, random_model};

/// More tokens than a client that hangs up early can have been sent.
const MANY_TOKENS: u32 = 12_000;

async fn endless() -> Cluster {
    Cluster::start_with(ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() })
        .await
}

fn question(cluster: &Cluster) -> Value {
    let mut body = cluster.question("Where does the river end?", MANY_TOKENS);
    body["temperature"] = json!(1.0);
    body
}

/// After `act`, everything the engine computed has been billed: prompt and output, token by token.
async fn billed_is_computed(cluster: &Cluster, act: impl AsyncFnOnce(&Cluster)) -> u64 {
    let (usage, odometer) = (cluster.usage(&[]).await, cluster.metrics().await);
    act(cluster).await;
    cluster.settled().await;
    let now = cluster.metrics().await;
    let computed = now.node_output_tokens() - odometer.node_output_tokens();
    let prompts = now.node_prompt_tokens() - odometer.node_prompt_tokens();
    let billed = cluster.usage_of_requests(usage.requests + 1).await;
    assert_eq!(billed.output_tokens - usage.output_tokens, computed, "output tokens billed, and computed");
    assert_eq!(billed.input_tokens - usage.input_tokens, prompts, "prompt tokens billed, and computed");
    let cached = now.node_cached_tokens() - odometer.node_cached_tokens();
    assert_eq!(
        billed.cached_input_tokens - usage.cached_input_tokens,
        cached,
        "cached tokens billed, and restored"
    );
    let cost = cluster.price().await.of_classes(prompts, cached, computed);
    assert_eq!(billed.cost_pico - usage.cost_pico, cost);
    computed
}

#[tokio::test]
async fn a_hang_up_stops_the_engine_and_bills_what_was_generated() {
    let cluster = endless().await;
    for frames in [1, 2, 10, 100] {
        let computed = billed_is_computed(&cluster, async |cluster| {
            let mut stream = cluster.open_chat(&question(cluster)).await;
            stream.read_frames(frames).await;
            drop(stream);
        })
        .await;
        assert!(computed >= 1, "{frames} frames were read");
        assert!(computed < u64::from(MANY_TOKENS), "the engine went on after {frames} frames");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_hang_up_over_grpc_does_the_same() {
    let cluster = endless().await;
    let computed = billed_is_computed(&cluster, async |cluster| {
        cluster.grpc_stream(&cluster.api_key, &question(cluster), 5).await;
    })
    .await;
    assert!((1..u64::from(MANY_TOKENS)).contains(&computed), "{computed}");
    cluster.finish().await;
}

/// The client of a whole answer can go too: it is waited for by nobody.
#[tokio::test]
async fn a_hang_up_before_a_whole_answer_stops_the_engine() {
    let cluster = endless().await;
    let before = cluster.metrics().await;
    let body = question(&cluster);
    let waiting = cluster.chat(&body);
    let started = sluice_tests::eventually("the engine has begun", async || {
        match cluster.metrics().await.node_output_tokens() > before.node_output_tokens() {
            true => Ok(()),
            false => Err("no token yet".to_owned()),
        }
    });
    let mut waiting = Box::pin(waiting);
    tokio::select! {
        reply = &mut waiting => panic!("it was to be interrupted: {reply:?}"),
        () = started => {}
    }
    drop(waiting);
    cluster.settled().await;
    let computed = cluster.metrics().await.node_output_tokens() - before.node_output_tokens();
    assert!(computed < u64::from(MANY_TOKENS), "the engine went on for nobody");
    assert_eq!(cluster.usage_of_requests(1).await.output_tokens, computed);
    cluster.finish().await;
}

/// The engine may have begun before it can be told to stop. Then that is billed, and what never began is not.
#[tokio::test]
async fn clients_that_leave_at_once_pay_for_what_was_computed() {
    let cluster = endless().await;
    let (usage, odometer) = (cluster.usage(&[]).await, cluster.metrics().await);
    for number in 0..60 {
        let patience = std::time::Duration::from_micros(150 * number);
        let mut body = question(&cluster);
        body["stream"] = json!(number % 2 == 0);
        let _ = tokio::time::timeout(patience, cluster.chat(&body)).await;
    }
    sluice_tests::eventually("what was computed is billed", async || {
        let (now, billed) = (cluster.metrics().await, cluster.usage(&[]).await);
        let computed = (
            now.node_prompt_tokens() - odometer.node_prompt_tokens(),
            now.node_output_tokens() - odometer.node_output_tokens(),
        );
        let billed = (billed.input_tokens - usage.input_tokens, billed.output_tokens - usage.output_tokens);
        match now.holds_open() == 0 && computed == billed {
            true => Ok(()),
            false => Err(format!("computed {computed:?}, billed {billed:?}")),
        }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn forty_clients_leave_at_different_moments() {
    let cluster = endless().await;
    let (usage, odometer) = (cluster.usage(&[]).await, cluster.metrics().await);
    join_all((0..40).map(|number| {
        let cluster = &cluster;
        async move {
            let mut stream = cluster.open_chat(&question(cluster)).await;
            stream.read_frames(1 + number * 3).await;
        }
    }))
    .await;
    cluster.settled().await;
    let computed = cluster.metrics().await.node_output_tokens() - odometer.node_output_tokens();
    let billed = cluster.usage_of_requests(usage.requests + 40).await;
    assert_eq!(billed.output_tokens - usage.output_tokens, computed);
    assert_eq!(billed.requests - usage.requests, 40);
    assert!(computed < 40 * u64::from(MANY_TOKENS));
    cluster.finish().await;
}

/// Tokens held back for a stop string, or inside a character, were computed: they are counted, and reported.
#[tokio::test]
async fn a_stop_string_is_billed_as_reported() {
    let cluster = endless().await;
    billed_is_computed(&cluster, async |cluster| {
        let mut body = cluster.question("Where does the river end?", 60);
        body["temperature"] = json!(1.5);
        body["seed"] = json!(5);
        let text = cluster.chat(&body).await.content();
        let at = text.char_indices().nth(text.chars().count() / 2).expect("some text").0;
        let stop: String = text[at..].chars().take(2).collect();
        body["stop"] = json!(stop);
        let (_, completion) = cluster.stream_chat(&body).await.usage();
        assert!((1..60).contains(&completion), "{completion}");
    })
    .await;
    cluster.finish().await;
}
