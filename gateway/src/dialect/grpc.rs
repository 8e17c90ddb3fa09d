//! `sluice.v1` over gRPC: the same requests and the same events as REST, in protobuf.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::stream::BoxStream;
use http::HeaderMap;
use http_body_util::BodyExt;
use sluice_billing::{Money, ServiceTier};
use sluice_proto::{
    node::v1::ModelDescription,
    v1::{
        self as proto, ChatParameters, CreateChatCompletionRequest, CreateChatCompletionResponse,
        GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse,
        StreamChatCompletionRequest, StreamChatCompletionResponse,
        chat_service_server::{ChatService, ChatServiceServer},
        model_service_server::{ModelService, ModelServiceServer},
    },
};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use crate::{
    app::App,
    auth::Principal,
    complete::{self, Caller, Completion, Delivery, Event, Finish, FinishReason},
    error::{ApiError, Fault},
    receipts,
    request::{
        self, CompletionRequest, EndUser, Expected, Format, LogitBias, Message, Messages, ModelName, Penalty,
        Prompt, RepetitionPenalty, Role, Sampling, Shape, StopStrings, Temperature, TopP,
    },
    stack::Arrival,
};

/// `sluice.v1.ChatService` and `sluice.v1.ModelService`.
#[derive(Clone)]
pub struct Api(Arc<App>);

pub fn chat_service(app: &Arc<App>) -> ChatServiceServer<Api> {
    ChatServiceServer::new(Api(app.clone())).max_decoding_message_size(app.limits.body_bytes_max)
}

pub fn model_service(app: &Arc<App>) -> ModelServiceServer<Api> {
    ModelServiceServer::new(Api(app.clone())).max_decoding_message_size(app.limits.body_bytes_max)
}

/// What a handler leaves for the end of a response of one message, which in tonic has no trailers of its own.
#[derive(Clone)]
struct Trailers(HeaderMap);

/// Sends what a handler left for the end, beside the status.
pub fn append_trailers(mut response: http::Response<tonic::body::Body>) -> http::Response<tonic::body::Body> {
    let Some(Trailers(trailers)) = response.extensions_mut().remove() else { return response };
    response.map(|body| tonic::body::Body::new(body.with_trailers(std::future::ready(Some(Ok(trailers))))))
}

#[tonic::async_trait]
impl ChatService for Api {
    async fn create_chat_completion(
        &self,
        request: Request<CreateChatCompletionRequest>,
    ) -> Result<Response<CreateChatCompletionResponse>, Status> {
        let arrival = arrival(&request)?;
        let answer = async {
            let mut completion =
                self.start(&request, request.get_ref().parameters.as_ref(), Delivery::Whole).await?;
            let answer = completion.whole().await?;
            Ok((completion, answer))
        };
        let (completion, answer) = answer.await.map_err(|error: ApiError| error.to_status(&arrival.id()))?;
        let message = proto::ChatMessage {
            role: proto::Role::Assistant.into(),
            content: answer.text,
            name: String::new(),
        };
        let mut response = Response::new(CreateChatCompletionResponse {
            id: id(&completion),
            model: completion.model.name.clone(),
            created_s: completion.created_s,
            message: Some(message),
            finish_reason: finish_reason(answer.finish.reason).into(),
            usage: Some(usage(&answer.finish)),
        });
        response.extensions_mut().insert(Trailers(HeaderMap::from_iter(receipts::headers(&answer.finish))));
        Ok(response)
    }

    type StreamChatCompletionStream = BoxStream<'static, Result<StreamChatCompletionResponse, Status>>;

    async fn stream_chat_completion(
        &self,
        request: Request<StreamChatCompletionRequest>,
    ) -> Result<Response<Self::StreamChatCompletionStream>, Status> {
        let arrival = arrival(&request)?;
        let parameters = request.get_ref().parameters.as_ref();
        let completion = self
            .start(&request, parameters, Delivery::Streamed)
            .await
            .map_err(|error| error.to_status(&arrival.id()))?;
        let begun = (completion, arrival, None);
        let messages = futures::stream::unfold(begun, |(mut completion, arrival, mut trailers)| async {
            loop {
                let message = match completion.next().await {
                    Some(Ok(Event::Delta(delta))) if delta.text.is_empty() => continue,
                    Some(Ok(event)) => {
                        if let Event::Finished(finish) = &event {
                            trailers = Some(HeaderMap::from_iter(receipts::headers(finish)));
                        }
                        Ok(message(&completion, event))
                    }
                    Some(Err(error)) => Err(error.to_status(&arrival.id())),
                    // tonic ends a stream with the trailers of a status; that of a success has room for ours.
                    None => {
                        let trailers = MetadataMap::from_headers(trailers.take()?);
                        Err(Status::with_metadata(Code::Ok, "", trailers))
                    }
                };
                return Some((message, (completion, arrival, trailers)));
            }
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

#[tonic::async_trait]
impl ModelService for Api {
    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.0.nodes.models().into_iter().map(model).collect();
        Ok(Response::new(ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let arrival = arrival(&request)?;
        let name = request.into_inner().name;
        match self.0.nodes.models().into_iter().find(|model| model.name == name) {
            Some(found) => Ok(Response::new(GetModelResponse { model: Some(model(found)) })),
            None => Err(ApiError::ModelNotFound { model: name }.to_status(&arrival.id())),
        }
    }
}

impl Api {
    async fn start<T>(
        &self,
        request: &Request<T>,
        parameters: Option<&ChatParameters>,
        delivery: Delivery,
    ) -> Result<Completion, ApiError> {
        let parameters =
            parameters.ok_or_else(|| ApiError::field(Fault::Missing, "parameters", "is required"))?;
        let completion_request = parse(parameters)?;
        let caller = caller(request, delivery)?;
        complete::start(&self.0, caller, completion_request).await
    }
}

/// When the request came in and its id; the stack puts both into every request.
fn arrival<T>(request: &Request<T>) -> Result<Arrival, Status> {
    request
        .extensions()
        .get::<Arrival>()
        .cloned()
        .ok_or_else(|| Status::internal("the request has no arrival"))
}

fn caller<T>(request: &Request<T>, delivery: Delivery) -> Result<Caller, ApiError> {
    let extensions = request.extensions();
    let arrival = extensions.get::<Arrival>().ok_or_else(|| ApiError::internal("no arrival"))?;
    let principal = extensions.get::<Arc<Principal>>().ok_or(ApiError::KeyMissing)?;
    let deadline = deadline(request.metadata(), arrival.received)?;
    Ok(arrival.caller(principal.clone(), delivery, deadline))
}

/// By `grpc-timeout`: at most eight digits and a unit.
fn deadline(metadata: &MetadataMap, received: Instant) -> Result<Option<Instant>, ApiError> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let refuse =
        || ApiError::field(Fault::Value, "grpc-timeout", "must be up to 8 digits and one of H M S m u n");
    let text = value.to_str().map_err(|_| refuse())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(refuse)?;
    if digits.len() > 8 {
        return Err(refuse());
    }
    let amount: u64 = digits.parse().map_err(|_| refuse())?;
    let timeout = match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return Err(refuse()),
    };
    Ok(received.checked_add(timeout))
}

fn parse(parameters: &ChatParameters) -> Result<CompletionRequest, ApiError> {
    let messages =
        parameters.messages.iter().enumerate().map(|(at, m)| message_of(m, at)).collect::<Result<_, _>>()?;
    let limit = parameters.output_tokens_max.map(i64::from).map(request::output_tokens_max).transpose();
    let temperature = parameters.temperature.map(f64::from).map(Temperature::new).transpose();
    let top_p = parameters.top_p.map(f64::from).map(TopP::new).transpose();
    let limit: Option<NonZeroU32> = check("output_tokens_max", limit)?;
    let penalty = |name: &str, value: Option<f32>| {
        let penalty = value.map(f64::from).map(Penalty::new).transpose();
        Ok::<_, ApiError>(check(name, penalty)?.unwrap_or_default())
    };
    let repetition = parameters.repetition_penalty.map(f64::from).map(RepetitionPenalty::new).transpose();
    let min_p = parameters.min_p.map(f64::from).map(request::min_p).transpose();
    let biases = parameters.logit_bias.iter().map(|(&id, &bias)| (id, f64::from(bias))).collect();
    let format = match &parameters.format {
        None => Format::Text,
        Some(proto::chat_parameters::Format::JsonSchema(schema)) => Format::JsonSchema(schema.clone()),
        Some(proto::chat_parameters::Format::JsonObject(_)) => Format::JsonObject,
    };
    Ok(CompletionRequest {
        model: check("model", ModelName::new(parameters.model.clone()))?,
        prompt: Prompt::Chat(check("messages", Messages::new(messages))?),
        output_tokens_max: limit,
        sampling: Sampling {
            temperature: check("temperature", temperature)?,
            top_p: check("top_p", top_p)?,
            top_k: parameters.top_k,
            seed: parameters.seed,
            min_p: check("min_p", min_p)?.unwrap_or(0.0),
            repetition_penalty: check("repetition_penalty", repetition)?.unwrap_or_default(),
            frequency_penalty: penalty("frequency_penalty", parameters.frequency_penalty)?,
            presence_penalty: penalty("presence_penalty", parameters.presence_penalty)?,
            logit_bias: check("logit_bias", LogitBias::new(biases))?,
        },
        shape: Shape { format, ..Shape::default() },
        service_tier: ServiceTier::Default,
        stop: check("stop", StopStrings::new(parameters.stop.clone()))?,
        user: check("user", EndUser::new(parameters.user.clone()))?,
        cost_so_far: parameters.include_cost,
    })
}

fn message_of(message: &proto::ChatMessage, index: usize) -> Result<Message, ApiError> {
    let role = match message.role() {
        proto::Role::System => Role::System,
        proto::Role::User => Role::User,
        proto::Role::Assistant => Role::Assistant,
        proto::Role::Unspecified => {
            let field = format!("parameters.messages[{index}].role");
            return Err(ApiError::field(Fault::Value, field, "must be a known role"));
        }
    };
    let name = check(&format!("messages[{index}].name"), EndUser::new(message.name.clone()))?;
    Ok(Message {
        role,
        content: message.content.clone(),
        tool_calls_json: String::new(),
        tool_call_id: String::new(),
        name: name.as_str().to_owned(),
    })
}

fn check<T>(field: &str, value: Result<T, Expected>) -> Result<T, ApiError> {
    value.map_err(|expected| {
        ApiError::field(Fault::Value, format!("parameters.{field}"), expected.to_string())
    })
}

fn id(completion: &Completion) -> String {
    format!("chatcmpl-{}", completion.request_id.simple())
}

fn message(completion: &Completion, event: Event) -> StreamChatCompletionResponse {
    let head = StreamChatCompletionResponse {
        id: id(completion),
        model: completion.model.name.clone(),
        created_s: completion.created_s,
        ..StreamChatCompletionResponse::default()
    };
    match event {
        Event::Delta(delta) => StreamChatCompletionResponse {
            content_delta: delta.text,
            cost_usd_so_far: delta.cost_so_far.map(Money::to_usd_string).unwrap_or_default(),
            ..head
        },
        Event::Finished(finish) => StreamChatCompletionResponse {
            finish_reason: finish_reason(finish.reason).into(),
            usage: Some(usage(&finish)),
            ..head
        },
    }
}

fn finish_reason(reason: FinishReason) -> proto::FinishReason {
    match reason {
        FinishReason::Stop => proto::FinishReason::Stop,
        FinishReason::Length => proto::FinishReason::Length,
        FinishReason::Budget => proto::FinishReason::Budget,
    }
}

fn usage(finish: &Finish) -> proto::Usage {
    let complete::Usage { prompt_tokens, cached_prompt_tokens, completion_tokens } = finish.usage;
    let cost_usd = finish.cost.to_usd_string();
    proto::Usage { prompt_tokens, cached_prompt_tokens, completion_tokens, cost_usd }
}

fn model(description: ModelDescription) -> proto::Model {
    proto::Model {
        name: description.name,
        created_s: description.created_s,
        context_tokens_max: description.context_tokens_max,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_parameters(change: impl FnOnce(&mut ChatParameters), expect: Option<&str>) {
        let message =
            proto::ChatMessage { role: proto::Role::User.into(), content: "x".into(), name: String::new() };
        let mut parameters =
            ChatParameters { model: "m".into(), messages: vec![message], ..ChatParameters::default() };
        change(&mut parameters);
        let got = parse(&parameters).err().and_then(|error| error.param().map(str::to_owned));
        assert_eq!(got.as_deref(), expect);
    }

    #[test]
    fn a_field_at_fault_is_named() {
        check_parameters(|_| {}, None);
        check_parameters(|p| p.model.clear(), Some("parameters.model"));
        check_parameters(|p| p.messages.clear(), Some("parameters.messages"));
        check_parameters(|p| p.messages[0].role = 0, Some("parameters.messages[0].role"));
        check_parameters(|p| p.messages[0].role = 99, Some("parameters.messages[0].role"));
        check_parameters(|p| p.temperature = Some(f32::NAN), Some("parameters.temperature"));
        check_parameters(|p| p.top_p = Some(1.5), Some("parameters.top_p"));
        check_parameters(|p| p.output_tokens_max = Some(0), Some("parameters.output_tokens_max"));
        check_parameters(|p| p.stop = vec![String::new()], Some("parameters.stop"));
        check_parameters(|p| p.min_p = Some(2.0), Some("parameters.min_p"));
        check_parameters(|p| p.frequency_penalty = Some(-3.0), Some("parameters.frequency_penalty"));
        check_parameters(|p| p.presence_penalty = Some(f32::NAN), Some("parameters.presence_penalty"));
        check_parameters(|p| p.repetition_penalty = Some(0.0), Some("parameters.repetition_penalty"));
        check_parameters(|p| p.logit_bias = [(1, 101.0)].into(), Some("parameters.logit_bias"));
    }

    #[test]
    fn deadlines_are_read_with_their_unit() {
        let received = Instant::now();
        let check = |text: &str, expect: Option<Duration>| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().expect("ASCII"));
            let got = deadline(&metadata, received).ok().flatten().map(|at| at - received);
            assert_eq!(got, expect, "for {text}");
        };
        check("5S", Some(Duration::from_secs(5)));
        check("1500m", Some(Duration::from_millis(1500)));
        check("2H", Some(Duration::from_secs(7200)));
        check("5", None);
        check("S", None);
        check("123456789S", None);
    }
}
