//! Sluice's front door: any SDK in, tokens out, every one of them billed.
//!
//! ```text
//!  server ─▶ stack ─▶ auth ─▶ dialect ─▶ complete ─▶ relay ─▶ client
//!  accept    tower    key     JSON/gRPC   hold,       owns the
//!  drain     column   check   to one      route       stream until
//!                             request                 it is settled
//! ```
//! Only `dialect` knows JSON and SSE; only `error` knows status codes; only `auth` knows keys; money is the billing
//! crate's, tokens are the node's.
#![forbid(unsafe_code)]

pub mod app;
pub mod auth;
pub mod budgets;
pub mod cli;
pub mod complete;
pub mod config;
pub mod dialect;
pub mod error;
pub mod health;
pub mod metrics;
pub mod node_client;
pub mod organization;
pub mod receipts;
pub mod relay;
pub mod request;
pub mod route;
pub mod server;
pub mod stack;
pub mod store;
pub mod up;
pub mod webhooks;
