//! Continuous batching is invisible: whatever else is in the batch, an answer is the one it would be alone.

use futures::future::join_all;
use serde_json::{Value, json};
use sluice_tests::{Cluster, ClusterOptions, random_model};

const STREAMS: u64 = 32;

/// Prompts and limits of different lengths, so that sequences join and leave the batch all the time; half of them
/// greedy, half sampled with a seed.
fn request(cluster: &Cluster, number: u64) -> Value {
    let story = "The river ran past the mill. ".repeat(1 + (number as usize * 7) % 20);
    let mut body = cluster.question(&format!("{number}: {story}"), 8 + (number as u32 * 5) % 40);
    if number % 2 == 1 {
        body["temperature"] = json!(1.0);
        body["top_p"] = json!(0.95);
        body["seed"] = json!(number);
    }
    body
}

async fn alone_and_together(cluster: Cluster) {
    let mut alone = Vec::new();
    for number in 0..STREAMS {
        alone.push(cluster.stream_chat(&request(&cluster, number)).await);
    }
    let together = join_all((0..STREAMS).map(|number| {
        let body = request(&cluster, number);
        let cluster = &cluster;
        async move { cluster.stream_chat(&body).await }
    }))
    .await;
    for (number, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(alone.content, together.content, "stream {number}");
        assert_eq!(alone.finish_reason, together.finish_reason, "stream {number}");
        assert_eq!(alone.usage(), together.usage(), "stream {number}");
    }
    let distinct: std::collections::BTreeSet<&str> = alone.iter().map(|one| one.content.as_str()).collect();
    assert!(distinct.len() > STREAMS as usize / 2, "the prompts lead to different answers: {distinct:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn thirty_two_streams_of_the_bundled_model_equal_themselves_alone() {
    alone_and_together(Cluster::start().await).await;
}

#[tokio::test]
async fn thirty_two_streams_of_a_random_model_equal_themselves_alone() {
    let options = ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() };
    alone_and_together(Cluster::start_with(options).await).await;
}

/// A long prompt that is prefilled in chunks beside running streams changes none of them, nor they it.
#[tokio::test]
async fn a_long_prompt_beside_running_streams() {
    let cluster = Cluster::start().await;
    let long =
        cluster.question(&"A mill stands by the river, and the river turns the mill. ".repeat(120), 16);
    let short = cluster.question("What is a mill?", 48);
    let (long_alone, short_alone) = (cluster.stream_chat(&long).await, cluster.stream_chat(&short).await);

    let mut running = cluster.open_chat(&short).await;
    running.read_frames(3).await;
    let (long_beside, more, running) =
        tokio::join!(cluster.stream_chat(&long), cluster.stream_chat(&short), running.finish());
    assert_eq!(long_beside.content, long_alone.content);
    assert_eq!(more.content, short_alone.content);
    assert_eq!(running.content, short_alone.content);
    cluster.finish().await;
}
