#![deny(unsafe_code)]
pub mod chat_template;
pub mod detokenizer;
pub mod sampler;
pub mod scheduler;
pub mod tokenizer;
