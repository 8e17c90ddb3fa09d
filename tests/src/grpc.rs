//! The public gRPC API, through the generated client.

use serde_json::Value;
use sluice_proto::v1::chat_service_client::ChatServiceClient;
use sluice_proto::v1::{
    ChatMessage, ChatParameters, Role, StreamChatCompletionRequest, StreamChatCompletionResponse,
};

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
        let mut client = ChatServiceClient::connect(self.grpc_url.clone()).await.expect("the server accepts");
        let mut request =
            tonic::Request::new(StreamChatCompletionRequest { parameters: Some(parameters(body)) });
        let authorization = format!("Bearer {key}").parse().expect("keys are ASCII");
        request.metadata_mut().insert("authorization", authorization);
        let mut stream = match client.stream_chat_completion(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => panic!("no stream: {status:?}\nlog:\n{}", self.log()),
        };
        let mut last = None;
        for _ in 0..messages_max {
            match stream.message().await.expect("the stream is not cut") {
                Some(message) => last = Some(message),
                None => break,
            }
        }
        last
    }
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
        ..ChatParameters::default()
    }
}
