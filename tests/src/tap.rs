//! [`Tap`]: stands between a gateway and a node, and writes down what the engine counted for each request.
//!
//! ```text
//! gateway ──▶ tap ──▶ node      every frame carries the engine's cumulative count; the last one is the truth
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::future::ready;
use futures::stream::BoxStream;
use sluice_proto::node::v1::node_service_client::NodeServiceClient;
use sluice_proto::node::v1::node_service_server::{NodeService, NodeServiceServer};
use sluice_proto::node::v1::{
    DescribeRequest, DescribeResponse, GenerateRequest, GenerateResponse, GetLoadRequest, GetLoadResponse,
    TokenizeRequest, TokenizeResponse, Usage, generate_request::Command,
};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

/// Sequences of one gateway at a time: more than any test runs.
const STREAMS_MAX: u32 = 10_000;

/// A running tap. It ends with this value.
pub struct Tap {
    /// What the gateway takes for the node's address.
    pub url: String,
    counts: Counts,
    server: JoinHandle<()>,
}

type Counts = Arc<Mutex<BTreeMap<String, Usage>>>;

struct Between {
    node: NodeServiceClient<Channel>,
    counts: Counts,
}

impl Tap {
    pub async fn on(node_url: &str) -> Tap {
        let node = NodeServiceClient::connect(node_url.to_owned()).await.expect("the node accepts");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let counts = Counts::default();
        let service = NodeServiceServer::new(Between { node, counts: counts.clone() });
        let serving = Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async { serving.await.expect("the tap serves") });
        Tap { url, counts, server }
    }

    /// What the engine last said of each request, by its id.
    pub fn counts(&self) -> BTreeMap<String, Usage> {
        self.counts.lock().expect("no code panics while it holds the counts").clone()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[tonic::async_trait]
impl NodeService for Between {
    type GenerateStream = BoxStream<'static, Result<GenerateResponse, Status>>;

    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        self.node.clone().describe(request.into_inner()).await
    }

    async fn get_load(&self, request: Request<GetLoadRequest>) -> Result<Response<GetLoadResponse>, Status> {
        self.node.clone().get_load(request.into_inner()).await
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        self.node.clone().tokenize(request.into_inner()).await
    }

    async fn generate(
        &self,
        request: Request<Streaming<GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut commands = request.into_inner();
        let first = commands.message().await?;
        let Some(GenerateRequest { command: Some(Command::Start(start)) }) = &first else {
            return Err(Status::invalid_argument("the first command is start"));
        };
        let request_id = start.request_id.clone();
        let commands = futures::stream::iter(first).chain(commands.filter_map(|command| ready(command.ok())));
        let frames = self.node.clone().generate(commands).await?.into_inner();
        let counts = self.counts.clone();
        let noted = frames.inspect(move |frame| {
            if let Ok(GenerateResponse { usage: Some(usage), .. }) = frame {
                let mut counts = counts.lock().expect("no code panics while it holds the counts");
                counts.insert(request_id.clone(), *usage);
            }
        });
        Ok(Response::new(noted.boxed()))
    }
}
