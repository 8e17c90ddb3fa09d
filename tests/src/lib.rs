//! The harness of the end-to-end suites: a [`Cluster`] of real processes, spoken to by real clients.
//!
//! ```text
//!   test ── Cluster::start() ──▶ `sluice up` (own data directory, port 0, logs in a file)
//!     │        │  post / stream / curl / python ──▶ REST, gRPC
//!     │        └  cli("usage", ..) ───────────────▶ `sluice usage --json --data-dir ..`
//!     └── cluster.finish() ──▶ no open holds, drained, exit 0, `sluice audit` clean
//! ```
//!
//! A cluster may keep its books in a [`Postgres`] of the test's own and share it with others, send its work to a
//! [`NodeServer`], and have a [`Tap`] in between that writes down what the engine counted.
//!
//! Nothing here is imported from the product, apart from its generated gRPC code and the connection to its database:
//! what a test sees is what a customer, an operator or an auditor sees. A cluster that is dropped without [`Cluster::finish`] fails its test, so that the
//! epilogue cannot be forgotten. No assertion depends on how long something took; where a test has to wait for
//! another process it polls with [`eventually`], whose limit only says when to stop hoping.
#![forbid(unsafe_code)]

mod binaries;
mod checkpoint;
mod cluster;
mod customer;
mod dice;
mod grpc;
mod ledger;
mod load;
mod metrics;
mod node_server;
mod patience;
mod platform;
mod postgres;
mod process;
mod python;
mod receiver;
mod rest;
mod sse;
mod tap;

pub use binaries::{binary, repository, run_to_end, run_to_json};
pub use checkpoint::{bundled_model, copy_of, random_model};
pub use cluster::{Cluster, ClusterOptions};
pub use customer::{Customer, Price, Usage, pico_of};
pub use dice::{Dice, setting};
pub use ledger::Bill;
pub use load::{Caller, Fate};
pub use metrics::Metrics;
pub use node_server::NodeServer;
pub use patience::eventually;
pub use platform::Platform;
pub use postgres::{Postgres, StopMode};
pub use process::{Process, Signal};
pub use python::{focus_validator, pytest};
pub use receiver::Receiver;
pub use rest::{Reply, assert_error};
pub use sse::{Stream, Transcript};
pub use tap::Tap;
