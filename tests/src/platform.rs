//! [`Platform`]: gateways, a node and a database, each a process of its own that may die alone.
//!
//! ```text
//!  gateways ──▶ node
//!     └──▶ SQLite in the data directory of the only one, or one PostgreSQL
//! ```

use crate::cluster::{Cluster, ClusterOptions};
use crate::node_server::NodeServer;
use crate::patience::eventually;
use crate::postgres::Postgres;

/// End every test with [`Platform::finish`].
pub struct Platform {
    pub gateways: Vec<Cluster>,
    pub node: NodeServer,
    pub postgres: Option<Postgres>,
}

impl Platform {
    /// One gateway with a SQLite file; `settings` are its tables in TOML.
    pub async fn on_sqlite(settings: &str) -> Platform {
        let node = NodeServer::start().await;
        let options = ClusterOptions {
            node_url: Some(node.url.clone()),
            settings: settings.to_owned(),
            ..ClusterOptions::default()
        };
        Platform { gateways: vec![Cluster::start_with(options).await], node, postgres: None }
    }

    /// Gateways on one PostgreSQL, which find it empty and start at the same moment.
    pub async fn on_postgres(gateways: usize, settings: &str) -> Platform {
        let (node, postgres) = (NodeServer::start().await, Postgres::start().await);
        let options = (0..gateways).map(|number| ClusterOptions {
            database_url: Some(postgres.url.clone()),
            node_url: Some(node.url.clone()),
            settings: format!("gateway = \"gateway-{number}\"\n{settings}"),
            ..ClusterOptions::default()
        });
        Platform { gateways: Cluster::start_together(options).await, node, postgres: Some(postgres) }
    }

    /// The first gateway.
    pub fn gateway(&self) -> &Cluster {
        &self.gateways[0]
    }

    /// Waits until every gateway has a node that takes requests.
    pub async fn serving(&self) {
        for gateway in &self.gateways {
            eventually("the node is seen", async || {
                match gateway.send(gateway.request("GET", "//health")).await {
                    reply if reply.status == 200 => Ok(()),
                    reply => Err(reply.text),
                }
            })
            .await;
        }
    }

    /// Waits until every request has ended, and its bill is in the ledger.
    pub async fn settled(&self) {
        for gateway in &self.gateways {
            gateway.settled().await;
        }
    }

    pub async fn finish(self) {
        self.settled().await;
        for gateway in self.gateways {
            gateway.finish().await;
        }
        self.node.stop().await;
    }
}
