//! Sluice's inference node: a MoE + lightning-attention model behind continuous batching.
//!
//! ```text
//!   service (gRPC) --> engine (one thread) --> scheduler (pure: queues + budgets -> batch)
//!       |                   |
//!   tokenizer,              +--> model --> kernel
//!   chat template,          +--> state (slots, KV pages)
//!   constraint              +--> sampler, constraint (masks)
//! ```
//!
//! [`node::Node`] is the whole of it; a gateway embeds one, `sluice-node serve` runs one.
#![deny(unsafe_code)]

pub mod bundled;
pub mod chat_template;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod constraint;
pub mod detokenizer;
pub mod engine;
#[allow(unsafe_code)]
pub mod kernel;
pub mod model;
pub mod node;
pub mod sampler;
pub mod scheduler;
pub mod service;
pub mod state;
pub mod tokenizer;
pub mod tool_calls;
