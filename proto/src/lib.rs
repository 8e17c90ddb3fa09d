//! Sluice's wire contracts, generated from the `.proto` files beside this crate.
//!
//! - [`v1`]: `sluice.v1`, the public gRPC API.
//! - [`node::v1`]: `sluice.node.v1`, what a gateway and an inference node say to each other.
//!
//! The code under `gen/` is committed; `tests/generated.rs` makes it anew and compares, with no `protoc` needed.
//! After a change to a `.proto` file: `UPDATE=1 cargo test -p sluice-proto`.
#![forbid(unsafe_code)]

/// `sluice.v1`: chat completions and models, for developers.
#[allow(clippy::all, missing_docs, rustdoc::all)]
pub mod v1 {
    include!("gen/sluice.v1.rs");
}

/// Contracts inside a deployment.
pub mod node {
    /// `sluice.node.v1`: the engine's service.
    #[allow(clippy::all, missing_docs, rustdoc::all)]
    pub mod v1 {
        include!("gen/sluice.node.v1.rs");
    }
}

/// Every descriptor of both packages, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptors.bin");
