//! One inference node, as the gateway knows it: its connection, what it serves, how busy it is, whether it answers.
//!
//! A background task asks the node each second; a failed request marks it down at once. Down, it gets no requests
//! until it has described itself anew, since it may have come back as another process with other models.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use sluice_proto::node::v1::{
    Cancel, DescribeRequest, GenerateRequest, GenerateResponse, GetLoadRequest, GetLoadResponse, Grant,
    ModelDescription, Start, TokenizeRequest, generate_request::Command,
    node_service_client::NodeServiceClient, tokenize_request::Input,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tracing::{info, warn};

/// How often a node is asked how it is.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A node that takes longer to say how it is, is down.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Checks between two full descriptions of a node that stays up.
const CHECKS_PER_DESCRIPTION: u64 = 30;
/// Room for a prompt of a million ids.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Commands on their way to the node; grants are cumulative, so few are ever needed.
const COMMANDS_MAX: usize = 16;

pub struct NodeClient {
    name: String,
    client: NodeServiceClient<Channel>,
    seen: ArcSwap<Seen>,
    /// Prompt and expected output tokens of requests this gateway has running there.
    pub(crate) outstanding_tokens: AtomicU64,
}

/// What a node last said of itself.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub reachable: bool,
    /// Kept while the node is down: they tell "down" from "never heard of".
    pub models: Vec<Arc<ModelDescription>>,
    pub load: GetLoadResponse,
}

impl Seen {
    pub fn model(&self, name: &str) -> Option<&Arc<ModelDescription>> {
        self.models.iter().find(|model| model.name == name)
    }

    pub fn takes_requests(&self) -> bool {
        self.reachable && !self.load.draining
    }
}

impl NodeClient {
    /// Asks the node once, then keeps asking in the background for as long as the client lives.
    pub(crate) async fn start(name: String, channel: Channel) -> Arc<NodeClient> {
        let client = NodeServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let node = Arc::new(NodeClient {
            name,
            client,
            seen: ArcSwap::default(),
            outstanding_tokens: AtomicU64::new(0),
        });
        node.check(true).await;
        tokio::spawn(watch(Arc::downgrade(&node)));
        node
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn seen(&self) -> Arc<Seen> {
        self.seen.load_full()
    }

    /// This gateway's own requests, and prompts of others.
    pub fn busy_tokens(&self) -> u64 {
        self.outstanding_tokens.load(Ordering::Relaxed) + self.seen.load().load.prompt_tokens_pending
    }

    /// A request failed in a way that says the node is not there: none goes to it until it answers again.
    pub fn mark_down(&self, status: &Status) {
        if matches!(status.code(), Code::Unavailable | Code::Unknown) {
            self.unreachable(status);
        }
    }

    /// Cancel safe.
    pub async fn tokenize(&self, model: &str, input: Input) -> Result<Vec<u32>, Status> {
        let request = TokenizeRequest { model: model.to_owned(), input: Some(input) };
        Ok(self.client.clone().tokenize(request).await?.into_inner().ids)
    }

    /// Starts a sequence. Dropping the future, or what it returns, cancels it on the node.
    pub async fn generate(&self, start: Start) -> Result<Sequence, Status> {
        let (commands, outbound) = mpsc::channel(COMMANDS_MAX);
        let first = GenerateRequest { command: Some(Command::Start(start)) };
        commands.try_send(first).expect("a new channel has room");
        let response = self.client.clone().generate(ReceiverStream::new(outbound)).await?;
        Ok(Sequence { commands, responses: response.into_inner(), next_number: 0 })
    }

    /// Asks the node how it is, and for what it serves where `describe` says so or it was down.
    pub(crate) async fn check(&self, describe: bool) {
        match tokio::time::timeout(CHECK_TIMEOUT, self.ask(describe)).await {
            Ok(Ok(seen)) => {
                if !self.seen.load().reachable {
                    let models =
                        seen.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(",");
                    info!(node = self.name, models, "node is up");
                }
                self.seen.store(Arc::new(seen));
            }
            Ok(Err(status)) => self.unreachable(&status),
            Err(_) => self.unreachable(&Status::deadline_exceeded("no answer in time")),
        }
    }

    async fn ask(&self, describe: bool) -> Result<Seen, Status> {
        let before = self.seen.load_full();
        let mut client = self.client.clone();
        let models = if describe || !before.reachable {
            let description = client.describe(DescribeRequest {}).await?.into_inner();
            description.models.into_iter().map(Arc::new).collect()
        } else {
            before.models.clone()
        };
        let load = client.get_load(GetLoadRequest {}).await?.into_inner();
        Ok(Seen { reachable: true, models, load })
    }

    fn unreachable(&self, status: &Status) {
        let before = self.seen.load_full();
        if before.reachable {
            warn!(node = self.name, code = ?status.code(), error = status.message(), "node is down");
            self.seen.store(Arc::new(Seen { reachable: false, ..(*before).clone() }));
        }
    }
}

async fn watch(node: Weak<NodeClient>) {
    let mut interval = tokio::time::interval(CHECK_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval.tick().await;
    for check in 1_u64.. {
        interval.tick().await;
        let Some(node) = node.upgrade() else { return };
        node.check(check.is_multiple_of(CHECKS_PER_DESCRIPTION)).await;
    }
}

/// One sequence on a node. Dropped, the node cancels it.
pub struct Sequence {
    commands: mpsc::Sender<GenerateRequest>,
    responses: Streaming<GenerateResponse>,
    next_number: u64,
}

impl Sequence {
    /// Raises the grant. `false`: earlier commands still wait for the node; say it again later.
    pub fn grant(&self, grant: Grant) -> bool {
        self.commands.try_send(GenerateRequest { command: Some(Command::Grant(grant)) }).is_ok()
    }

    /// Ends the sequence; the node answers with `finished` and the exact usage.
    pub async fn cancel(&self) {
        // A node that is gone needs no telling.
        drop(self.commands.send(GenerateRequest { command: Some(Command::Cancel(Cancel {})) }).await);
    }

    /// The next frame. Cancel safe. The node's last frame is `finished`: an end before it is an error.
    pub async fn next(&mut self) -> Result<GenerateResponse, Status> {
        let Some(response) = self.responses.message().await? else {
            return Err(Status::unknown("the node closed the stream before it had finished"));
        };
        if response.sequence_number != self.next_number {
            let message =
                format!("frame {} came where {} was due", response.sequence_number, self.next_number);
            return Err(Status::data_loss(message));
        }
        self.next_number += 1;
        Ok(response)
    }
}
