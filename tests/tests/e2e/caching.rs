//! What was computed once is not computed again: counted in a class of its own, billed at its own price, and the same text.

use serde_json::{Value, json};
use sluice_proto::node::v1::{
    GenerateRequest, GetLoadRequest, Grant, Start, Usage, generate_request::Command, generate_response::Event,
};
use sluice_tests::{Cluster, run_to_end, run_to_json};
use tokio_stream::wrappers::ReceiverStream;

use crate::node::Node;

/// Several blocks of the state grid long.
fn long_question(cluster: &Cluster) -> Value {
    let content = "The river rises in the hills and runs past the mill to the sea. ".repeat(12);
    cluster.question(&content, 12)
}

#[tokio::test]
async fn a_repeated_prompt_is_answered_alike_and_billed_as_cached() {
    let cluster = Cluster::start().await;
    let (usage, metrics) = (cluster.usage(&[]).await, cluster.metrics().await);
    let question = long_question(&cluster);
    let first = cluster.chat(&question).await;
    let second = cluster.chat(&question).await;
    let (prompt, completion) = first.usage();
    assert_eq!(second.usage(), (prompt, completion));
    assert_eq!(second.content(), first.content());
    assert_eq!(first.cached_tokens(), 0);
    let cached = second.cached_tokens();
    assert!(cached >= 64 && cached < prompt, "{cached} of {prompt}");

    // A stream says the same.
    let streamed = cluster.stream_chat(&question).await;
    assert_eq!((streamed.content.clone(), streamed.usage()), (first.content(), (prompt, completion)));
    let last = streamed.frames.last().expect("a usage chunk");
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], json!(cached));

    // The next turn finds the whole turn before it.
    let mut next = question.clone();
    let turns = next["messages"].as_array_mut().expect("messages");
    turns.push(json!({ "role": "assistant", "content": first.content() }));
    turns.push(json!({ "role": "user", "content": "And then?" }));
    let next = cluster.chat(&next).await;
    assert!(next.cached_tokens() >= cached, "{} after {cached}", next.cached_tokens());

    // Another customer finds nothing.
    let customer = cluster.customer("other", Some(1_000_000_000_000)).await;
    assert_eq!(cluster.post("/chat/completions", &customer.key, &question).await.cached_tokens(), 0);

    cluster.settled().await;
    let billed = cluster.usage_of_requests(usage.requests + 5).await;
    let now = cluster.metrics().await;
    let restored = 2 * cached + next.cached_tokens();
    assert_eq!(billed.cached_input_tokens - usage.cached_input_tokens, restored);
    assert_eq!(now.node_cached_tokens() - metrics.node_cached_tokens(), restored, "billed is restored");
    let computed = now.node_prompt_tokens() - metrics.node_prompt_tokens();
    assert_eq!(billed.input_tokens - usage.input_tokens, computed, "billed is computed");
    assert_eq!(computed + restored, 4 * prompt + next.usage().0);
    let price = cluster.price().await;
    assert!(price.cached_input_pico < price.input_pico);
    let cost = price.of_classes(computed, restored, billed.output_tokens - usage.output_tokens);
    assert_eq!(billed.cost_pico - usage.cost_pico, cost);
    cluster.finish().await;
}

/// Tokens of a sequence, and the last usage.
async fn generate(node: &mut Node, start: Start) -> (Vec<u32>, Usage) {
    let (commands, receiver) = tokio::sync::mpsc::channel(1);
    let start = GenerateRequest { command: Some(Command::Start(start)) };
    commands.send(start).await.expect("sent");
    let mut frames =
        node.client.generate(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    let (mut ids, mut usage) = (Vec::new(), Usage::default());
    while let Some(frame) = frames.message().await.expect("no error") {
        usage = frame.usage.expect("every frame counts");
        if let Some(Event::Delta(delta)) = frame.event {
            ids.extend(delta.ids);
        }
    }
    (ids, usage)
}

#[tokio::test]
async fn a_session_outlasts_its_node() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cache");
    let dir = dir.to_str().expect("temporary paths are UTF-8");
    let mut node = Node::start_with(&["--cache-dir", dir]).await;
    let start = Start {
        model: node.model.clone(),
        prompt_ids: (0..150).map(|i| 5 + i * 7 % 90).collect(),
        output_tokens_max: 40,
        grant: Some(Grant { output_tokens: 15, is_final: true }),
        tenant: "tenant".to_owned(),
        ..Start::default()
    };
    let (first, usage) = generate(&mut node, start.clone()).await;
    assert_eq!((first.len(), usage.input_tokens, usage.cached_input_tokens), (15, 150, 0));
    node.stop().await;

    let listed = run_to_json("sluice-node", ["cache", "inspect", "--dir", dir, "--json"]).await;
    let files = listed["files"].as_array().expect("files");
    assert!(files.iter().all(|file| file["valid"] == json!(true)), "{listed}");
    let tokens = |file: &&Value| file["kind"] == "checkpoint" && file["tokens"] == json!(150 + 14);
    assert_eq!(
        files.iter().filter(tokens).count(),
        1,
        "all but the last token, which was never computed: {listed}"
    );
    let bytes: u64 = files.iter().filter_map(|file| file["bytes"].as_u64()).sum();
    assert_eq!(listed["totals"]["bytes"], json!(bytes));
    let table = run_to_end("sluice-node", ["cache", "inspect", "--dir", dir]).await;
    assert!(
        table.status.success() && String::from_utf8_lossy(&table.stdout).contains("1 checkpoints"),
        "{table:?}"
    );

    let mut node = Node::start_with(&["--cache-dir", dir]).await;
    let grant = Some(Grant { output_tokens: 40, is_final: true });
    let resumed = Start { resume_ids: first.clone(), grant, ..start.clone() };
    let (rest, usage) = generate(&mut node, resumed).await;
    assert_eq!((usage.input_tokens, usage.cached_input_tokens, usage.output_tokens), (0, 150, 40));
    let load = node.client.get_load(GetLoadRequest {}).await.expect("an answer").into_inner();
    assert_eq!((load.prompt_tokens_total, load.cached_tokens_total), (1, 150 + 14));
    assert_eq!((load.cache_hits_total, load.cache_misses_total), (1, 0));
    assert!(load.cache_ram_bytes > 0 && load.cache_disk_bytes > 0 && load.state_bytes > 0, "{load:?}");

    let mut cold = Node::start_with(&["--cache-ram-bytes", "0"]).await;
    let (whole, usage) = generate(&mut cold, Start { grant, ..start }).await;
    assert_eq!((usage.input_tokens, usage.cached_input_tokens), (150, 0));
    assert_eq!([first, rest].concat(), whole);
    node.stop().await;
    cold.stop().await;
}

#[tokio::test]
async fn cache_options_refuse_nonsense_and_name_it() {
    let model = sluice_tests::bundled_model();
    let model = model.to_str().expect("UTF-8");
    for (args, hint) in [
        (&["cache", "inspect", "--dir", "/no/such/folder"][..], "--cache-dir"),
        (&["cache", "inspect", "--dir", "/etc"], "holds other things"),
        (&["serve", "--model", model, "--cache-grid-tokens", "100"], "cache-grid-tokens"),
        (&["serve", "--model", model, "--cache-dir", "/proc/nowhere"], "--cache-dir"),
    ] {
        let output = run_to_end("sluice-node", args).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(stderr.contains(hint) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}
