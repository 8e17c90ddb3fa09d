//! Sluice's front door.
#![forbid(unsafe_code)]

pub mod app;
pub mod auth;
pub mod complete;
pub mod dialect;
pub mod error;
pub mod health;
pub mod metrics;
pub mod node_client;
pub mod relay;
pub mod request;
pub mod route;
pub mod server;
pub mod stack;
pub mod store;
