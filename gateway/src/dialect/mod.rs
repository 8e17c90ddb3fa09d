//! How clients speak: thin codecs onto one [`CompletionRequest`](crate::request::CompletionRequest) and one stream of
//! [`Event`](crate::complete::Event)s. Only this folder knows JSON, SSE and public protobuf.
//!
//! | endpoint | module |
//! | --- | --- |
//! | `POST /v1/chat/completions` | `openai_chat` |
//! | `POST /v1/completions` | `openai_completions` |
//! | `GET /v1/models`, `GET /v1/models/{name}` | `models` |
//! | `sluice.v1.ChatService`, `sluice.v1.ModelService` | `grpc` |

pub mod body;
pub mod fields;
pub mod grpc;
pub mod models;
pub mod openai;
pub mod openai_chat;
pub mod openai_completions;
pub mod openai_logprobs;
pub mod openai_shape;
pub mod sse;
