//! The request path against nodes that misbehave on purpose: real HTTP in front, a real ledger beside, and behind it a
//! node that speaks the real contract and fails when its script says so.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::BoxStream};
use serde_json::{Value, json};
use sluice_billing::{
    AccountId, AccountKind, Billing, BillingLimits, BillingOptions, CreditGrant, Money, PriceBook,
    ReceiptKeys, UsageQuery,
};
use sluice_gateway::{
    app::{App, Limits},
    auth::{Auth, Role, Tenancy},
    config::Config,
    metrics::Metrics,
    receipts::Receipts,
    route::{NodeEndpoint, Nodes},
    server::{self, ConnectionLimits},
    stack, store,
    webhooks::{WebhookSettings, Webhooks},
};
use sluice_proto::node::v1::{
    Delta, DescribeRequest, DescribeResponse, FinishReason, Finished, GenerateRequest, GenerateResponse,
    GetLoadRequest, GetLoadResponse, Grant, ModelDescription, TokenizeRequest, TokenizeResponse, Usage,
    generate_request::Command,
    generate_response::Event,
    node_service_server::{NodeService, NodeServiceServer},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

const MODEL: &str = "scripted";
const PROMPT_TOKENS: u64 = 5;
const INPUT_PICO: i64 = 1_000_000;
const OUTPUT_PICO: i64 = 2_000_000;

/// A node that generates the same text for every token, and fails where it is told to.
#[derive(Clone)]
struct ScriptedNode {
    refuses: bool,
    dies_after: Option<u64>,
    /// Computes the prompt, then finds that no token can follow the format asked for.
    is_lost: bool,
    text: String,
    /// Tokens generated, over all sequences.
    generated: Arc<AtomicU64>,
}

impl Default for ScriptedNode {
    fn default() -> Self {
        let text = "w ".to_owned();
        ScriptedNode { refuses: false, dies_after: None, is_lost: false, text, generated: Arc::default() }
    }
}

#[tonic::async_trait]
impl NodeService for ScriptedNode {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let model = ModelDescription {
            name: MODEL.into(),
            content_hash: "0123456789abcdef".into(),
            context_tokens_max: 100_000,
            vocabulary_size: 1_000,
            created_s: 1,
            ..ModelDescription::default()
        };
        let (node_id, version) = ("scripted-1".into(), "0".into());
        Ok(Response::new(DescribeResponse { node_id, version, models: vec![model] }))
    }

    async fn get_load(&self, _: Request<GetLoadRequest>) -> Result<Response<GetLoadResponse>, Status> {
        Ok(Response::new(GetLoadResponse::default()))
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        Ok(Response::new(TokenizeResponse { ids: vec![1; PROMPT_TOKENS as usize] }))
    }

    type GenerateStream = BoxStream<'static, Result<GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<Streaming<GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        if self.refuses {
            return Err(Status::unavailable("scripted refusal"));
        }
        let (frames, outbound) = mpsc::channel(1);
        tokio::spawn(self.clone().generate_until_told(request.into_inner(), frames));
        Ok(Response::new(ReceiverStream::new(outbound).boxed()))
    }
}

impl ScriptedNode {
    async fn generate_until_told(
        self,
        mut requests: Streaming<GenerateRequest>,
        frames: mpsc::Sender<Result<GenerateResponse, Status>>,
    ) {
        let first = requests.message().await.expect("a request").and_then(|request| request.command);
        let Some(Command::Start(start)) = first else { panic!("start comes first") };
        let mut grant: Grant = start.grant.expect("a first grant");
        let (mut output_tokens, mut sequence_number) = (0, 0);
        if self.is_lost {
            drop(frames.send(Ok(frame(&mut sequence_number, None, output_tokens))).await);
            let details = ErrorDetails::with_bad_request_violation("constraint", "could not be followed");
            let lost = Status::with_error_details(Code::InvalidArgument, "constraint", details);
            drop(frames.send(Err(lost)).await);
            return;
        }
        let reason = loop {
            if output_tokens == u64::from(start.output_tokens_max) {
                break FinishReason::Length;
            }
            if output_tokens == grant.output_tokens && grant.is_final {
                break FinishReason::GrantExhausted;
            }
            if self.dies_after == Some(output_tokens) {
                drop(frames.send(Err(Status::unavailable("scripted death"))).await);
                return;
            }
            let command = match output_tokens < grant.output_tokens {
                true => tokio::time::timeout(Duration::ZERO, requests.message()).await.ok(),
                false => Some(requests.message().await),
            };
            match command.map(|message| message.ok().flatten().and_then(|request| request.command)) {
                None => {}
                Some(Some(Command::Grant(raised))) => {
                    grant = if raised.output_tokens >= grant.output_tokens { raised } else { grant };
                    continue;
                }
                Some(_) => break FinishReason::Cancelled,
            }
            output_tokens += 1;
            self.generated.fetch_add(1, Ordering::SeqCst);
            let delta = Event::Delta(Delta { text: self.text.clone(), ids: vec![7], ..Delta::default() });
            if frames.send(Ok(frame(&mut sequence_number, Some(delta), output_tokens))).await.is_err() {
                return;
            }
        };
        let finished = Event::Finished(Finished { reason: reason.into(), stop_string: String::new() });
        drop(frames.send(Ok(frame(&mut sequence_number, Some(finished), output_tokens))).await);
    }
}

fn frame(sequence_number: &mut u64, event: Option<Event>, output_tokens: u64) -> GenerateResponse {
    let usage = Usage { input_tokens: PROMPT_TOKENS, cached_input_tokens: 0, output_tokens };
    let response = GenerateResponse { sequence_number: *sequence_number, event, usage: Some(usage) };
    *sequence_number += 1;
    response
}

/// A whole gateway on a port of its own.
struct Gateway {
    app: Arc<App>,
    base: String,
    key: String,
    http: reqwest::Client,
    _folder: tempfile::TempDir,
}

impl Gateway {
    async fn start(nodes: &[ScriptedNode], credit_pico: i64, limits: Limits) -> Gateway {
        let folder = tempfile::tempdir().expect("a folder");
        let database = store::open(&Config { data_dir: folder.path().to_owned(), ..Config::default() }, true)
            .await
            .expect("a database");
        let billing = Billing::open(BillingOptions {
            database: database.clone(),
            outbox_path: folder.path().join("outbox.db"),
            gateway: "test".into(),
            limits: BillingLimits::default(),
        })
        .await
        .expect("billing opens");
        let account = AccountId::new("acct");
        billing.create_account(&account, AccountKind::Prepaid).await.expect("an account");
        let grant = CreditGrant {
            id: uuid::Uuid::now_v7(),
            account,
            amount: Money::from_pico(credit_pico),
            memo: "test".into(),
            granted_at: time::OffsetDateTime::now_utc(),
        };
        billing.credit(&grant).await.expect("credit");
        let book = format!(
            "currency = \"USD\"\neffective_from = \"2020-01-01T00:00:00Z\"\n\
             [[price]]\nmodel = \"{MODEL}\"\nmeter = \"input\"\nusd_per_million = \"1\"\n\
             [[price]]\nmodel = \"{MODEL}\"\nmeter = \"cached_input\"\nusd_per_million = \"1\"\n\
             [[price]]\nmodel = \"{MODEL}\"\nmeter = \"output\"\nusd_per_million = \"2\"\n"
        );
        billing.apply_price_book(&PriceBook::from_toml(&book).expect("a book")).await.expect("prices");

        let tenancy = Tenancy::new(database.clone());
        tenancy.ensure_org("org", "Org", "acct").await.expect("an org");
        tenancy.ensure_project("proj", "org", "Project").await.expect("a project");
        let key =
            tenancy.create_key("proj", "k", Role::User).await.expect("a key").secret.reveal().to_owned();

        let mut endpoints = Vec::new();
        for node in nodes {
            endpoints.push(NodeEndpoint::Url(serve_node(node.clone()).await));
        }
        let config = Config { data_dir: folder.path().to_path_buf(), ..Config::default() };
        let app = Arc::new(App {
            auth: Auth::new(database.clone()),
            billing,
            receipts: Receipts::open(&config).expect("a receipt key"),
            nodes: Nodes::connect(endpoints).await.expect("nodes"),
            limits,
            invoice_font: None,
            metrics: Metrics::new(),
            webhooks: Webhooks::new(database, WebhookSettings::default()).expect("the defaults are valid"),
            tracker: TaskTracker::new(),
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let base = format!("http://{}", listener.local_addr().expect("an address"));
        let router = stack::service(app.clone());
        tokio::spawn(async move {
            server::serve(listener, router, &ConnectionLimits::default(), CancellationToken::new()).await;
        });
        Gateway { app, base, key, http: reqwest::Client::new(), _folder: folder }
    }

    async fn chat(&self, tokens_max: u64, stream: bool) -> reqwest::Response {
        self.chat_with(tokens_max, stream, json!({ "include_usage": true })).await
    }

    async fn chat_with(&self, tokens_max: u64, stream: bool, stream_options: Value) -> reqwest::Response {
        let body = json!({
            "model": MODEL, "messages": [{ "role": "user", "content": "hi" }], "max_tokens": tokens_max,
            "stream": stream, "stream_options": stream_options,
        });
        let request = self.http.post(format!("{}/v1/chat/completions", self.base)).bearer_auth(&self.key);
        request.json(&body).send().await.expect("an answer")
    }

    /// After every relay has ended: requests and output tokens billed. No hold is open.
    async fn billed(&self) -> (u64, u64) {
        self.app.tracker.close();
        let wait = tokio::time::timeout(Duration::from_secs(20), self.app.tracker.wait());
        wait.await.expect("every relay ends");
        self.app.tracker.reopen();
        assert_eq!(self.app.billing.stats().holds_open, 0);
        assert_eq!(self.app.billing.stats().expired, 0);
        self.app.billing.flush().await.expect("shipped");
        let rows = self.app.billing.usage(&UsageQuery::default()).await.expect("usage");
        rows.iter().fold((0, 0), |sum, row| (sum.0 + row.requests, sum.1 + row.output_tokens))
    }
}

async fn serve_node(node: ScriptedNode) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = tonic::transport::Server::builder().add_service(NodeServiceServer::new(node));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    format!("http://{address}")
}

fn frames_of(text: &str) -> Vec<&str> {
    text.trim_end().split("\n\n").map(|frame| frame.strip_prefix("data: ").expect("a data frame")).collect()
}

const RICH: i64 = 1_000_000_000_000;

#[tokio::test]
async fn a_node_that_refuses_is_replaced_before_the_first_token() {
    let nodes = [ScriptedNode { refuses: true, ..ScriptedNode::default() }, ScriptedNode::default()];
    let gateway = Gateway::start(&nodes, RICH, Limits::default()).await;
    for stream in [false, true, false, true, false, true] {
        let response = gateway.chat(10, stream).await;
        assert_eq!(response.status(), 200, "{}", response.text().await.expect("a body"));
        drop(response.text().await.expect("the whole answer"));
    }
    assert_eq!(gateway.billed().await, (6, 60));

    let alone = Gateway::start(&nodes[..1], RICH, Limits::default()).await;
    let response = alone.chat(10, true).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(alone.billed().await, (0, 0));
}

#[tokio::test]
async fn a_node_that_dies_midway_is_told_and_what_was_delivered_is_billed() {
    let node = ScriptedNode { dies_after: Some(7), ..ScriptedNode::default() };
    let gateway = Gateway::start(&[node], RICH, Limits::default()).await;
    let response = gateway.chat(50, true).await;
    assert_eq!(response.status(), 200);
    let text = response.text().await.expect("a stream that is closed");
    let frames = frames_of(&text);
    assert_eq!(frames.last(), Some(&"[DONE]"));
    let error: Value = serde_json::from_str(frames[frames.len() - 2]).expect("JSON");
    assert_eq!(error["error"]["code"], "server_error", "{text}");
    assert_eq!(frames.iter().filter(|frame| frame.contains("\"w \"")).count(), 7);
    assert!(!text.contains("scripted death"), "internal text stays inside");
    assert_eq!(gateway.billed().await, (1, 7));

    // An answer that was to come whole never came. The node is asked again once it is up again.
    let refused = async || loop {
        let response = gateway.chat(50, false).await;
        assert_eq!(response.status(), 503);
        if gateway.app.billing.stats().voided > 0 {
            return;
        }
        tokio::task::yield_now().await;
    };
    tokio::time::timeout(Duration::from_secs(20), refused()).await.expect("the node comes up again");
    assert_eq!(gateway.billed().await, (1, 7));
}

#[tokio::test]
async fn a_format_that_cannot_be_followed_pays_for_the_prompt() {
    let node = ScriptedNode { is_lost: true, ..ScriptedNode::default() };
    let gateway = Gateway::start(&[node], RICH, Limits::default()).await;
    for (requests, streamed) in [(1, false), (2, true)] {
        let response = gateway.chat(50, streamed).await;
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.expect("JSON");
        assert_eq!(error["error"]["param"], "response_format", "{error}");
        assert_eq!(gateway.billed().await, (requests, 0));
        assert_eq!(gateway.app.billing.stats().voided, 0);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_stops_the_node_and_pays_for_what_it_generated() {
    let node = ScriptedNode { text: "x".repeat(20_000), ..ScriptedNode::default() };
    let gateway = Gateway::start(std::slice::from_ref(&node), RICH, Limits::default()).await;
    let mut body = gateway.chat(50_000, true).await.bytes_stream();
    for _ in 0..3 {
        body.next().await.expect("a frame").expect("bytes");
    }
    drop(body);
    let (requests, output_tokens) = gateway.billed().await;
    assert_eq!(requests, 1);
    assert_eq!(output_tokens, node.generated.load(Ordering::SeqCst));
    assert!(output_tokens < 50_000);
}

#[tokio::test]
async fn a_node_never_runs_far_ahead_of_a_client_that_does_not_read() {
    let node = ScriptedNode { text: "x".repeat(1 << 20), ..ScriptedNode::default() };
    let limits = Limits { client_idle_ms_max: 1_000, ..Limits::default() };
    let window = limits.grant_window_tokens;
    let buffered = limits.events_buffered_max as u64;
    let gateway = Gateway::start(std::slice::from_ref(&node), RICH, limits).await;
    let unread = gateway.chat(50_000, true).await;
    let (requests, output_tokens) = gateway.billed().await;
    assert_eq!(requests, 1, "the client that took nothing for a second is cut off, and pays");
    let sockets = 24;
    assert!(
        output_tokens <= window + buffered + sockets,
        "{output_tokens} tokens for a client that reads none"
    );
    assert_eq!(output_tokens, node.generated.load(Ordering::SeqCst));
    drop(unread);
}

#[tokio::test]
async fn generation_ends_at_the_token_the_credit_affords() {
    for affordable in [1, 63, 64, 65, 300, 700] {
        let credit = PROMPT_TOKENS as i64 * INPUT_PICO + affordable * OUTPUT_PICO + OUTPUT_PICO - 1;
        let gateway = Gateway::start(&[ScriptedNode::default()], credit, Limits::default()).await;
        let response = gateway.chat(5_000, false).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-sluice-finish-reason"], "budget");
        let body: Value = response.json().await.expect("JSON");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert_eq!(body["sluice"]["finish_reason"], "budget");
        assert_eq!(body["usage"]["completion_tokens"], affordable);
        let broke = gateway.chat(5_000, true).await;
        assert_eq!(broke.status(), 429);
        assert_eq!(broke.headers()["x-should-retry"], "false");
        assert_eq!(gateway.billed().await, (1, affordable as u64));
    }
}

/// Each token is a piece here: its cost so far is the prompt's and that of the tokens until then, and the last is the bill's.
#[tokio::test]
async fn each_piece_says_what_the_request_has_cost_so_far() {
    let gateway = Gateway::start(&[ScriptedNode::default()], RICH, Limits::default()).await;
    let response = gateway.chat_with(600, true, json!({ "include_cost": true })).await;
    let text = response.text().await.expect("the whole stream");
    let frames = frames_of(&text);
    let frames: Vec<Value> =
        frames[..frames.len() - 1].iter().map(|frame| serde_json::from_str(frame).expect("JSON")).collect();
    let cost = |value: &Value| Money::from_usd_str(value.as_str().expect("a decimal")).expect("money").pico();
    let so_far: Vec<i64> =
        frames.iter().filter_map(|frame| frame["sluice"].get("cost_usd_so_far")).map(cost).collect();
    let prompt = PROMPT_TOKENS as i64 * INPUT_PICO;
    assert_eq!(so_far, (1..=600).map(|tokens| prompt + tokens * OUTPUT_PICO).collect::<Vec<_>>());

    let end = &frames.last().expect("frames")["sluice"];
    assert_eq!(cost(&end["cost_usd"]), prompt + 600 * OUTPUT_PICO);
    let jwks = gateway.http.get(format!("{}/.well-known/sluice/jwks.json", gateway.base)).send().await;
    let jwks = jwks.expect("an answer").text().await.expect("a key set");
    let keys = ReceiptKeys::from_jwks(&jwks).expect("a key set");
    let receipt = keys.verify(end["receipt"].as_str().expect("a receipt")).expect("a good one");
    assert_eq!((receipt.quantities.output_tokens, receipt.cost.pico()), (600, cost(&end["cost_usd"])));
    assert_eq!(gateway.billed().await, (1, 600));
}

#[tokio::test]
async fn load_is_shed_while_streams_hold_their_permits() {
    let node = ScriptedNode { text: "x".repeat(1 << 20), ..ScriptedNode::default() };
    let limits = Limits { requests_in_flight_max: 1, ..Limits::default() };
    let gateway = Gateway::start(&[node], RICH, limits).await;
    let open = gateway.chat(50_000, true).await;
    assert_eq!(open.status(), 200);
    let shed = gateway.chat(1, false).await;
    assert_eq!(shed.status(), 503);
    assert_eq!(shed.headers()["retry-after"], "1");
    let error: Value = shed.json().await.expect("JSON");
    assert_eq!(error["error"]["code"], "server_error");
    let health = gateway.http.get(format!("{}/health", gateway.base)).send().await.expect("an answer");
    assert_eq!(health.status(), 200);

    drop(open);
    gateway.billed().await;
    gateway.app.draining.cancel();
    assert_eq!(gateway.chat(1, false).await.status(), 503);
    let health = gateway.http.get(format!("{}/health", gateway.base)).send().await.expect("an answer");
    assert_eq!(health.status(), 503);
}
