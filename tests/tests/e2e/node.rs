//! `sluice-node` by itself: its commands, and its gRPC contract as a gateway uses it.

use serde_json::{Value, json};
use sluice_proto::node::v1::node_service_client::NodeServiceClient;
use sluice_proto::node::v1::{
    Cancel, DescribeRequest, FinishReason, GenerateRequest, GetLoadRequest, Grant, Sampling, Start,
    TokenizeRequest, generate_request::Command, generate_response::Event, tokenize_request::Input,
};
use sluice_tests::{
    Cluster, ClusterOptions, NodeServer, bundled_model, eventually, random_model, run_to_end, run_to_json,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

fn text_of(path: &std::path::Path) -> &str {
    path.to_str().expect("model paths are UTF-8")
}

async fn generate(model: &str, input: [&str; 2], tokens_max: u32) -> Value {
    let tokens_max = tokens_max.to_string();
    let fixed = ["generate", "--model", model, "--max-tokens", &tokens_max, "--temperature", "0", "--json"];
    run_to_json("sluice-node", fixed.into_iter().chain(input)).await
}

fn ids_of(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap_or_else(|| panic!("no ids: {value}"));
    ids.iter().map(|id| u32::try_from(id.as_u64().expect("an id")).expect("a u32")).collect()
}

#[tokio::test]
async fn generate_says_what_the_server_says() {
    let cluster = Cluster::start().await;
    let model = bundled_model();
    for prompt in ["The river", "Once upon a time", "水"] {
        let local = generate(text_of(&model), ["--prompt", prompt], 24).await;
        let body = json!({ "model": cluster.model, "prompt": prompt, "temperature": 0, "max_tokens": 24 });
        let served = cluster.post("/completions", &cluster.api_key, &body).await.ok();
        assert_eq!(local["text"], served["choices"][0]["text"], "{prompt}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn logits_lead_to_the_generated_tokens() {
    let model = random_model().await;
    let model = text_of(&model);
    let generated = generate(model, ["--ids", "5,6,7,8"], 6).await;
    let ids = ids_of(&generated["ids"]);
    assert_eq!(ids.len(), 6, "{generated}");

    let sequence: Vec<u32> = [5, 6, 7, 8].into_iter().chain(ids.iter().copied()).collect();
    let listed: Vec<String> = sequence.iter().map(u32::to_string).collect();
    let logits =
        run_to_json("sluice-node", ["logits", "--model", model, "--ids", &listed.join(","), "--json"]).await;
    let rows = logits["logits"].as_array().expect("rows");
    assert_eq!(rows.len(), sequence.len(), "one row a position");
    for (row, following) in rows[3..].iter().zip(&ids) {
        let row: Vec<f64> =
            row.as_array().expect("a row").iter().map(|x| x.as_f64().expect("finite")).collect();
        let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let argmax = row.iter().position(|&logit| logit == highest).expect("a highest");
        assert_eq!(argmax as u32, *following, "greedy takes the highest, the lowest id at a tie");
    }
}

#[tokio::test]
async fn init_is_reproducible_and_follows_its_seed() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = bundled_model().join("config.json");
    let weights = async |name: &str, seed: &str, dtype: &str| {
        let out = folder.path().join(name);
        let args =
            ["init", "--config", text_of(&config), "--seed", seed, "--dtype", dtype, "--out", text_of(&out)];
        let output = run_to_end("sluice-node", args).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let file = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").path();
        let mut files: Vec<_> = std::fs::read_dir(&out).expect("readable").map(file).collect();
        files.sort();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        files.iter().flat_map(|path| std::fs::read(path).expect("readable")).collect::<Vec<u8>>()
    };
    let first = weights("first", "1", "bf16").await;
    assert!(first.len() > 1000);
    assert!(first == weights("again", "1", "bf16").await, "the same seed, the same bytes");
    assert!(first != weights("other", "2", "bf16").await, "another seed, other weights");
    assert!(weights("wide", "1", "f32").await.len() > first.len() * 3 / 2, "f32 takes more room");
}

#[tokio::test]
async fn commands_refuse_nonsense_and_name_it() {
    let model = random_model().await;
    let model = text_of(&model);
    for (args, hint) in [
        (&["generate", "--model", "/no/such/model", "--prompt", "x"][..], "/no/such/model"),
        (&["generate", "--model", model, "--ids", "1,x"], "ids"),
        (&["generate", "--model", model, "--ids", "4000000000"], "4000000000"),
        (&["generate", "--model", model, "--prompt", "x", "--temperature=-1"], "temperature"),
        (&["generate", "--model", model], "--prompt"),
        (&["logits", "--model", model, "--ids", ""], "ids"),
        (&["init", "--config", "/no/such/config.json", "--out", "/tmp/never"], "/no/such/config.json"),
        (&["serve", "--model", model, "--listen", "nonsense"], "nonsense"),
    ] {
        let output = run_to_end("sluice-node", args).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(stderr.contains(hint) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}

/// A node of its own, and a client as the gateway has one.
pub struct Node {
    pub client: NodeServiceClient<Channel>,
    pub model: String,
    server: NodeServer,
}

impl Node {
    async fn start() -> Node {
        Node::start_with(&[]).await
    }

    /// With further arguments of `sluice-node serve`.
    pub async fn start_with(further: &[&str]) -> Node {
        let server = NodeServer::start_with(further).await;
        let client = NodeServiceClient::connect(server.url.clone()).await.expect("it accepts");
        Node { client, model: server.model.clone(), server }
    }

    fn start_command(&self, tokens_max: u32, granted: u64) -> GenerateRequest {
        command(Command::Start(Start {
            request_id: "request-1".to_owned(),
            model: self.model.clone(),
            prompt_ids: vec![5, 6, 7, 8],
            output_tokens_max: tokens_max,
            grant: Some(Grant { output_tokens: granted, is_final: false }),
            sampling: Some(Sampling { temperature: 0.0, ..Sampling::default() }),
            tenant: "tenant".to_owned(),
            ..Start::default()
        }))
    }

    pub async fn stop(self) {
        drop(self.client);
        self.server.stop().await;
    }
}

fn command(command: Command) -> GenerateRequest {
    GenerateRequest { command: Some(command) }
}

#[tokio::test]
async fn a_node_describes_itself_and_tokenizes() {
    let mut node = Node::start().await;
    let described = node.client.describe(DescribeRequest {}).await.expect("an answer").into_inner();
    assert!(!described.node_id.is_empty() && !described.version.is_empty());
    let [model] = &described.models[..] else { panic!("one model: {described:?}") };
    assert_eq!(model.name, node.model);
    assert_eq!(model.content_hash.len(), 64);
    assert!(
        model.context_tokens_max > 0
            && model.vocabulary_size > 0
            && model.parameters > model.active_parameters
    );
    assert!(model.state_bytes_per_sequence > 0 && model.cache_bytes_per_token > 0);

    let request = |model: &str| TokenizeRequest {
        model: model.to_owned(),
        input: Some(Input::Text("Hello 水".to_owned())),
    };
    let ids = node.client.tokenize(request(&node.model)).await.expect("ids").into_inner().ids;
    assert!(!ids.is_empty() && ids.iter().all(|&id| id < model.vocabulary_size));
    let refused = node.client.tokenize(request("another")).await.expect_err("an unknown model");
    assert_eq!(refused.code(), tonic::Code::NotFound);
    node.stop().await;
}

/// Frames are numbered, usage is cumulative, and the sequence never runs past its grant.
#[tokio::test]
async fn a_sequence_runs_to_its_grant_and_waits() {
    let mut node = Node::start().await;
    let (commands, receiver) = tokio::sync::mpsc::channel(8);
    commands.send(node.start_command(40, 10)).await.expect("sent");
    let mut frames =
        node.client.generate(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();

    let (mut number, mut ids, mut grant) = (0, Vec::new(), 10);
    let finished = loop {
        let frame = frames.message().await.expect("no error").expect("the end is announced");
        assert_eq!(frame.sequence_number, number, "no gaps");
        number += 1;
        let usage = frame.usage.expect("every frame counts");
        assert_eq!((usage.input_tokens, usage.cached_input_tokens), (4, 0));
        assert!(usage.output_tokens <= grant, "{usage:?} at a grant of {grant}");
        match frame.event.expect("an event") {
            Event::Started(_) => assert_eq!(number, 1),
            Event::Delta(delta) => ids.extend(delta.ids),
            Event::Finished(finished) => break finished,
        }
        if ids.len() as u64 == grant && grant < 40 {
            grant += 15;
            let raise = Grant { output_tokens: grant, is_final: false };
            commands.send(command(Command::Grant(raise))).await.expect("sent");
        }
    };
    assert_eq!(finished.reason(), FinishReason::Length);
    assert_eq!(ids.len(), 40);
    assert!(frames.message().await.expect("no error").is_none(), "the stream is closed after `finished`");

    let alone = generate(text_of(&random_model().await), ["--ids", "5,6,7,8"], 40).await;
    assert_eq!(ids, ids_of(&alone["ids"]), "a grant changes when, not what");
    node.stop().await;
}

#[tokio::test]
async fn final_grants_cancels_and_broken_streams_end_a_sequence() {
    let mut node = Node::start().await;

    // A final grant ends it at that token.
    let (commands, receiver) = tokio::sync::mpsc::channel(8);
    let Some(Command::Start(mut start)) = node.start_command(1_000, 7).command else {
        unreachable!("a start")
    };
    start.grant = Some(Grant { output_tokens: 7, is_final: true });
    commands.send(command(Command::Start(start))).await.expect("sent");
    let frames = node.client.generate(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    assert_eq!(last_of(frames).await, (FinishReason::GrantExhausted, 7));

    // A cancel ends it with the exact usage until then.
    let (commands, receiver) = tokio::sync::mpsc::channel(8);
    commands.send(node.start_command(10_000, 10_000)).await.expect("sent");
    let mut frames =
        node.client.generate(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    for _ in 0..5 {
        frames.message().await.expect("no error").expect("a frame");
    }
    commands.send(command(Command::Cancel(Cancel {}))).await.expect("sent");
    let (reason, tokens) = last_of(frames).await;
    assert_eq!(reason, FinishReason::Cancelled);
    assert!((1..10_000).contains(&tokens), "{tokens}");

    // A broken stream ends it too; the odometer holds the sum of all three.
    let (commands, receiver) = tokio::sync::mpsc::channel(8);
    commands.send(node.start_command(10_000, 10_000)).await.expect("sent");
    let mut frames =
        node.client.generate(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    frames.message().await.expect("no error").expect("a frame");
    drop((commands, frames));
    let mut client = node.client.clone();
    let load = eventually("the slot is free", async || {
        let load =
            client.get_load(GetLoadRequest {}).await.map_err(|status| status.to_string())?.into_inner();
        match load.sequences_running {
            0 => Ok(load),
            running => Err(format!("{running} running")),
        }
    })
    .await;
    assert_eq!(load.prompt_tokens_total, 3 * 4);
    assert!(load.output_tokens_total >= 7 + tokens && load.output_tokens_total < 10_000, "{load:?}");
    drop(client);
    node.stop().await;
}

async fn last_of(
    mut frames: tonic::Streaming<sluice_proto::node::v1::GenerateResponse>,
) -> (FinishReason, u64) {
    let mut last = None;
    while let Some(frame) = frames.message().await.expect("no error") {
        last = Some(frame);
    }
    let last = last.expect("frames");
    match last.event {
        Some(Event::Finished(finished)) => (finished.reason(), last.usage.expect("usage").output_tokens),
        event => panic!("the last frame is `finished`, not {event:?}"),
    }
}

/// The gateway with a node of another process gives the answers of the gateway with its own.
#[tokio::test]
async fn a_remote_node_serves_as_the_embedded_one_does() {
    let node = Node::start().await;
    let embedded =
        Cluster::start_with(ClusterOptions { model: Some(random_model().await), ..Default::default() }).await;
    let node_url = Some(node.server.url.clone());
    let remote = Cluster::start_with(ClusterOptions { node_url, ..Default::default() }).await;
    assert_eq!(remote.model, embedded.model);
    let body = embedded.question("Near or far?", 50);
    let (near, far) = tokio::join!(embedded.stream_chat(&body), remote.stream_chat(&body));
    assert_eq!((near.content, near.usage), (far.content, far.usage));
    embedded.finish().await;
    remote.finish().await;
    node.stop().await;
}
