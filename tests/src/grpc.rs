//! The public gRPC API, through the generated client.

use serde_json::Value;
use sluice_proto::v1::chat_service_client::ChatServiceClient;
use sluice_proto::v1::{
    ChatMessage, ChatParameters, CreateChatCompletionRequest, CreateChatCompletionResponse, Role,
    StreamChatCompletionRequest, StreamChatCompletionResponse,
};
use tonic::{Streaming, metadata::MetadataMap};

use crate::cluster::Cluster;

impl Cluster {
    /// Streams the answer to a chat request given in its REST form, up to `messages_max` messages, then hangs up.
    /// Returns the last message read.
    pub async fn grpc_stream(
        &self,
        key: &str,
        body: &Value,
        messages_max: usize,
    ) -> Option<StreamChatCompletionResponse> {
        let mut stream = self.open_grpc(key, body).await;
        let mut last = None;
        for _ in 0..messages_max {
            match stream.message().await.expect("the stream is not cut") {
                Some(message) => last = Some(message),
                None => break,
            }
        }
        last
    }

    /// Streams the answer to its end: every message, and the trailers.
    pub async fn grpc_messages(
        &self,
        key: &str,
        body: &Value,
    ) -> (Vec<StreamChatCompletionResponse>, MetadataMap) {
        let (mut stream, mut messages) = (self.open_grpc(key, body).await, Vec::new());
        while let Some(message) = stream.message().await.expect("the stream is not cut") {
            messages.push(message);
        }
        (messages, stream.trailers().await.expect("trailers").unwrap_or_default())
    }

    /// The whole answer, with headers and trailers.
    pub async fn grpc_answer(&self, key: &str, body: &Value) -> (CreateChatCompletionResponse, MetadataMap) {
        let mut client = ChatServiceClient::connect(self.grpc_url.clone()).await.expect("the server accepts");
        let request = with_key(key, CreateChatCompletionRequest { parameters: Some(parameters(body)) });
        let response = client.create_chat_completion(request).await;
        let response =
            response.unwrap_or_else(|status| panic!("no answer: {status:?}\nlog:\n{}", self.log()));
        let (metadata, answer, _) = response.into_parts();
        (answer, metadata)
    }

    async fn open_grpc(&self, key: &str, body: &Value) -> Streaming<StreamChatCompletionResponse> {
        let mut client = ChatServiceClient::connect(self.grpc_url.clone()).await.expect("the server accepts");
        let request = with_key(key, StreamChatCompletionRequest { parameters: Some(parameters(body)) });
        match client.stream_chat_completion(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => panic!("no stream: {status:?}\nlog:\n{}", self.log()),
        }
    }
}

fn with_key<T>(key: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let authorization = format!("Bearer {key}").parse().expect("keys are ASCII");
    request.metadata_mut().insert("authorization", authorization);
    request
}

fn parameters(body: &Value) -> ChatParameters {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let messages = body["messages"].as_array().into_iter().flatten().map(|message| ChatMessage {
        role: match message["role"].as_str() {
            Some("system") => Role::System.into(),
            Some("assistant") => Role::Assistant.into(),
            _ => Role::User.into(),
        },
        content: text(&message["content"]),
        name: String::new(),
    });
    ChatParameters {
        model: text(&body["model"]),
        messages: messages.collect(),
        output_tokens_max: body["max_tokens"].as_u64().map(|tokens| tokens as u32),
        temperature: body["temperature"].as_f64().map(|temperature| temperature as f32),
        seed: body["seed"].as_u64(),
        include_cost: body["stream_options"]["include_cost"] == true,
        ..ChatParameters::default()
    }
}
