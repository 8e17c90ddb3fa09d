//! Sluice's front door.
#![forbid(unsafe_code)]

pub mod auth;
pub mod server;
pub mod store;
