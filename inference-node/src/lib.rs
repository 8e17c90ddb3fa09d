#![deny(unsafe_code)]

pub mod checkpoint;
pub mod cli;
pub mod config;
#[allow(unsafe_code)]
pub mod kernel;
pub mod model;
pub mod state;
