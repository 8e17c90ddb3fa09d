//! Where a request runs: the nodes, what they serve, and which of them takes the next one.
//!
//! Of two nodes drawn at random from those that are up and serve the model, the one with fewer outstanding tokens is
//! taken: nearly as good as the least loaded of all, and gateways that don't know of each other don't herd.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use sluice_proto::node::v1::ModelDescription;
use tonic::transport::{Channel, Endpoint};

use crate::{
    error::{ApiError, RETRY_AFTER},
    node_client::NodeClient,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a node is.
pub enum NodeEndpoint {
    /// `http://host:port` of a remote node.
    Url(String),
    /// A connection that exists already: the node in this process.
    Channel { name: String, channel: Channel },
}

/// Why the nodes cannot be used at all. A node that is merely down is not an error: it may come up.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no inference node is configured: name at least one, such as http://10.0.0.7:50051")]
    NoNodes,
    #[error("nodes: '{url}' is not the address of a node: write it as http://HOST:PORT")]
    Address { url: String },
}

/// Every node of this gateway. Cheap to clone; clones share one view.
#[derive(Clone)]
pub struct Nodes(Arc<Inner>);

struct Inner {
    nodes: Vec<Arc<NodeClient>>,
    draws: AtomicU64,
}

impl Nodes {
    /// Connects to every node, and waits until each has answered once or is known to be down.
    pub async fn connect(endpoints: Vec<NodeEndpoint>) -> Result<Nodes, ConnectError> {
        if endpoints.is_empty() {
            return Err(ConnectError::NoNodes);
        }
        let channels = endpoints.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let nodes =
            join_all(channels.into_iter().map(|(name, channel)| NodeClient::start(name, channel))).await;
        let seed = uuid::Uuid::now_v7().as_u64_pair().1;
        Ok(Nodes(Arc::new(Inner { nodes, draws: AtomicU64::new(seed) })))
    }

    pub fn nodes(&self) -> &[Arc<NodeClient>] {
        &self.0.nodes
    }

    /// Every model that any node serves, by name; of nodes that are down, what they served last.
    pub fn models(&self) -> Vec<ModelDescription> {
        let seen = self.0.nodes.iter().map(|node| node.seen());
        let mut models: Vec<_> = seen
            .flat_map(|seen| seen.models.iter().map(|model| (**model).clone()).collect::<Vec<_>>())
            .collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models.dedup_by(|a, b| a.name == b.name);
        models
    }

    pub fn model(&self, name: &str) -> Result<Arc<ModelDescription>, ApiError> {
        let seen = self.0.nodes.iter().map(|node| node.seen());
        let best = seen.filter(|seen| seen.model(name).is_some()).max_by_key(|seen| seen.takes_requests());
        best.and_then(|seen| seen.model(name).cloned()).ok_or_else(|| self.unroutable(name))
    }

    /// Whether any request could be served at the moment.
    pub fn any_up(&self) -> bool {
        self.0.nodes.iter().any(|node| node.seen().takes_requests())
    }

    /// Takes a node for a request of about `tokens` tokens, none of those in `tried`.
    pub fn assign(
        &self,
        model: &str,
        tokens: u64,
        tried: &[Arc<NodeClient>],
    ) -> Result<Assignment, ApiError> {
        let candidates: Vec<&Arc<NodeClient>> = self
            .0
            .nodes
            .iter()
            .filter(|node| !tried.iter().any(|other| Arc::ptr_eq(node, other)))
            .filter(|node| {
                let seen = node.seen();
                seen.takes_requests() && seen.model(model).is_some()
            })
            .collect();
        if candidates.is_empty() {
            return Err(self.unroutable(model));
        }
        let (first, second) = self.draw_two(candidates.len());
        let node = [candidates[first], candidates[second]]
            .into_iter()
            .min_by_key(|node| node.busy_tokens())
            .expect("two nodes were drawn");
        node.outstanding_tokens.fetch_add(tokens, Ordering::Relaxed);
        Ok(Assignment { node: node.clone(), tokens })
    }

    /// Asks every node for its load now, rather than within a second.
    pub async fn refresh(&self) {
        join_all(self.0.nodes.iter().filter(|node| node.seen().reachable).map(|node| node.check(false)))
            .await;
    }

    /// Two different indices below `count`, where there are two.
    fn draw_two(&self, count: usize) -> (usize, usize) {
        let random = split_mix(self.0.draws.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed));
        let first = (random as u32 as usize) % count;
        let step = 1 + (random >> 32) as usize % (count - 1).max(1);
        (first, (first + step) % count)
    }

    /// Why no node takes a request for `model`: nobody knows the model, or those who do are down.
    fn unroutable(&self, model: &str) -> ApiError {
        let down = self.0.nodes.iter().any(|node| {
            let seen = node.seen();
            seen.model(model).is_some() || (seen.models.is_empty() && !seen.reachable)
        });
        match down {
            true => ApiError::NodesDown { model: model.to_owned(), retry_after: RETRY_AFTER },
            false => ApiError::ModelNotFound { model: model.to_owned() },
        }
    }
}

/// A node that a request runs on; its tokens count as outstanding there until this is dropped.
#[must_use]
pub struct Assignment {
    node: Arc<NodeClient>,
    tokens: u64,
}

impl Assignment {
    pub fn node(&self) -> &Arc<NodeClient> {
        &self.node
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.node.outstanding_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

fn open(endpoint: NodeEndpoint) -> Result<(String, Channel), ConnectError> {
    match endpoint {
        NodeEndpoint::Channel { name, channel } => Ok((name, channel)),
        NodeEndpoint::Url(url) => {
            let refuse = || ConnectError::Address { url: url.clone() };
            let endpoint = Endpoint::from_shared(url.clone()).map_err(|_| refuse())?;
            if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
                return Err(refuse());
            }
            let channel = endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .connect_lazy();
            Ok((url, channel))
        }
    }
}

/// SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
fn split_mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_none_is_refused_and_a_node_that_is_down_is_not() {
        let connect = async |url: &str| Nodes::connect(vec![NodeEndpoint::Url(url.to_owned())]).await;
        for url in ["10.0.0.7", "not an address", "ftp://host:1"] {
            let error = connect(url).await.err().expect("no address").to_string();
            assert!(error.contains(url), "{error}");
        }
        assert!(matches!(Nodes::connect(vec![]).await.err(), Some(ConnectError::NoNodes)));
        let nodes = connect("http://127.0.0.1:1").await.expect("it may come up");
        assert!(!nodes.any_up());
        assert!(matches!(nodes.model("any"), Err(ApiError::NodesDown { .. })));
    }

    #[tokio::test]
    async fn two_different_nodes_are_drawn() {
        let nodes = Nodes(Arc::new(Inner { nodes: vec![], draws: AtomicU64::new(7) }));
        assert_eq!(nodes.draw_two(1), (0, 0));
        let mut drawn = [0; 5];
        for _ in 0..1000 {
            let (first, second) = nodes.draw_two(5);
            assert_ne!(first, second);
            drawn[first] += 1;
        }
        assert!(drawn.iter().all(|&count| count > 120), "{drawn:?}");
    }
}
