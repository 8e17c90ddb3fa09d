pub mod init;
pub mod logits;
