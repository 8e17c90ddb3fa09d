//! One completion request, valid by construction: whatever dialect it came in, below this module its type is proof.
//!
//! Each part checks itself when it is made (`Temperature::new(3.0)` is an `Err` that says what was expected); the
//! dialect adds what the field is called on its wire. Nothing here knows JSON, gRPC or defaults of a vendor.

use std::num::NonZeroU32;

use sluice_billing::ServiceTier;

/// Stop strings a request may name.
pub const STOP_STRINGS_MAX: usize = 4;
/// Bytes of one stop string: what the node may have to hold back.
pub const STOP_STRING_BYTES_MAX: usize = 256;
/// Token ids that end an answer.
pub const STOP_IDS_MAX: usize = 64;
/// Tokens that a request may bias.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Likeliest tokens that may be seen beside each one.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Tools that a request may declare.
pub const TOOLS_MAX: usize = 128;
/// Bytes of names that callers give: models, users, authors of messages.
pub const NAME_BYTES_MAX: usize = 256;
pub const MESSAGES_MAX: usize = 10_000;

/// What a value should have been: "must be between 0 and 2". The caller adds the field's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Expected(String);

fn expected<T>(message: impl Into<String>) -> Result<T, Expected> {
    Err(Expected(message.into()))
}

impl Expected {
    /// What is wrong with a choice of a tool that is none.
    pub fn declared_tool() -> Expected {
        Expected("must be the name of a declared tool".to_owned())
    }
}

/// What is wrong with a count below one.
pub fn at_least_one() -> Expected {
    Expected("must be at least 1".to_owned())
}

/// A request to continue a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    pub model: ModelName,
    pub prompt: Prompt,
    /// Absent: what the context and the account allow.
    pub output_tokens_max: Option<NonZeroU32>,
    pub sampling: Sampling,
    pub stop: StopStrings,
    pub shape: Shape,
    pub service_tier: ServiceTier,
    /// The caller's own end user, for usage reports. May be empty.
    pub user: EndUser,
    /// Each piece of the answer says what the request has cost so far.
    pub cost_so_far: bool,
}

/// What the model continues.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Chat(Messages),
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// A prompt of plain text.
    pub fn text(text: String) -> Result<Prompt, Expected> {
        if text.is_empty() {
            return expected("must not be empty");
        }
        Ok(Prompt::Text(text))
    }

    /// A prompt that is already tokens of the model's vocabulary.
    pub fn tokens(ids: Vec<u32>) -> Result<Prompt, Expected> {
        if ids.is_empty() {
            return expected("must hold at least one token");
        }
        Ok(Prompt::Tokens(ids))
    }
}

/// What an answer must look like, beside where it stops.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shape {
    pub format: Format,
    /// `None`: none were declared, or none may be called.
    pub tools: Option<Tools>,
    /// Each token's log-probability is told, with those of this many likeliest tokens.
    pub top_logprobs: Option<u32>,
    /// Nothing but the end of a constraint ends the answer before.
    pub output_tokens_min: u32,
    pub ignore_end_of_sequence: bool,
    pub stop_ids: Vec<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    JsonObject,
    /// A JSON schema.
    JsonSchema(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    /// A JSON array in OpenAI's shape.
    pub declared_json: String,
    pub choice: ToolChoice,
    /// More than one call may be made at once.
    pub parallel: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    Auto,
    Required,
    Named(String),
}

/// How tokens are drawn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Absent: the model's default.
    pub temperature: Option<Temperature>,
    /// Absent: the model's default.
    pub top_p: Option<TopP>,
    /// 0: no limit. Absent: the model's default.
    pub top_k: Option<u32>,
    /// Absent: the gateway draws one.
    pub seed: Option<u64>,
    /// Tokens less likely than this part of the likeliest are not drawn.
    pub min_p: f32,
    /// 1 is none.
    pub repetition_penalty: RepetitionPenalty,
    pub frequency_penalty: Penalty,
    pub presence_penalty: Penalty,
    pub logit_bias: LogitBias,
}

/// -2 to 2.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Penalty(f32);

impl Penalty {
    pub fn new(value: f64) -> Result<Penalty, Expected> {
        match (-2.0..=2.0).contains(&value) {
            true => Ok(Penalty(value as f32)),
            false => expected(format!("must be between -2 and 2, but is {value}")),
        }
    }

    pub fn get(self) -> f32 {
        self.0
    }
}

/// 0.1 to 10.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RepetitionPenalty(f32);

impl Default for RepetitionPenalty {
    fn default() -> Self {
        RepetitionPenalty(1.0)
    }
}

impl RepetitionPenalty {
    pub fn new(value: f64) -> Result<RepetitionPenalty, Expected> {
        // As an f32, which is what the node compares: 0.1 is one that lies above a tenth.
        match (0.1..=10.0).contains(&(value as f32)) {
            true => Ok(RepetitionPenalty(value as f32)),
            false => expected(format!("must be between 0.1 and 10, but is {value}")),
        }
    }

    pub fn get(self) -> f32 {
        self.0
    }
}

/// At most [`LOGIT_BIAS_MAX`] tokens, each -100 to 100.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias(Vec<(u32, f32)>);

impl LogitBias {
    pub fn new(biases: Vec<(u32, f64)>) -> Result<LogitBias, Expected> {
        if biases.len() > LOGIT_BIAS_MAX {
            return expected(format!(
                "must name at most {LOGIT_BIAS_MAX} tokens, but names {}",
                biases.len()
            ));
        }
        if let Some((id, bias)) = biases.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
            return expected(format!(
                "must hold numbers between -100 and 100, but the token {id} has {bias}"
            ));
        }
        Ok(LogitBias(biases.into_iter().map(|(id, bias)| (id, bias as f32)).collect()))
    }

    pub fn as_slice(&self) -> &[(u32, f32)] {
        &self.0
    }
}

/// A part of the likeliest token's probability.
pub fn min_p(value: f64) -> Result<f32, Expected> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(value as f32),
        false => expected(format!("must be between 0 and 1, but is {value}")),
    }
}

/// How many likeliest tokens are told, of at most `max`.
pub fn top_logprobs(value: i64, max: u32) -> Result<u32, Expected> {
    match u32::try_from(value) {
        Ok(count) if count <= max => Ok(count),
        _ => expected(format!("must be between 0 and {max}, but is {value}")),
    }
}

/// A least number of tokens.
pub fn output_tokens_min(value: i64) -> Result<u32, Expected> {
    u32::try_from(value).or_else(|_| expected(format!("must be between 0 and {}, but is {value}", u32::MAX)))
}

/// Ids that end an answer.
pub fn stop_ids(ids: Vec<u32>) -> Result<Vec<u32>, Expected> {
    match ids.len() > STOP_IDS_MAX {
        true => expected(format!("must hold at most {STOP_IDS_MAX} ids, but holds {}", ids.len())),
        false => Ok(ids),
    }
}

/// A name of a tool or a schema, as OpenAI's API has them.
pub fn function_name(name: &str) -> Result<&str, Expected> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    match (1..=64).contains(&name.len()) && name.bytes().all(fits) {
        true => Ok(name),
        false => expected("must be 1 to 64 of a-z, A-Z, 0-9, _ and -"),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName(String);

impl ModelName {
    pub fn new(name: String) -> Result<ModelName, Expected> {
        match name.len() {
            0 => expected("must not be empty"),
            1..=NAME_BYTES_MAX => Ok(ModelName(name)),
            _ => expected(format!("must be at most {NAME_BYTES_MAX} bytes long")),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// 0 (greedy) to 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature(f32);

impl Default for Temperature {
    fn default() -> Self {
        Temperature(1.0)
    }
}

impl Temperature {
    pub fn new(value: f64) -> Result<Temperature, Expected> {
        if !(0.0..=2.0).contains(&value) {
            return expected(format!("must be between 0 and 2, but is {value}"));
        }
        Ok(Temperature(value as f32))
    }

    pub fn get(self) -> f32 {
        self.0
    }
}

/// Over 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopP(f32);

impl Default for TopP {
    fn default() -> Self {
        TopP(1.0)
    }
}

impl TopP {
    /// 0 is taken as the smallest value there is: the most likely token alone.
    pub fn new(value: f64) -> Result<TopP, Expected> {
        if !(0.0..=1.0).contains(&value) {
            return expected(format!("must be between 0 and 1, but is {value}"));
        }
        Ok(TopP((value as f32).max(f32::MIN_POSITIVE)))
    }

    pub fn get(self) -> f32 {
        self.0
    }
}

/// At most [`STOP_STRINGS_MAX`], none empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStrings(Vec<String>);

impl StopStrings {
    pub fn new(strings: Vec<String>) -> Result<StopStrings, Expected> {
        if strings.len() > STOP_STRINGS_MAX {
            return expected(format!(
                "must hold at most {STOP_STRINGS_MAX} strings, but holds {}",
                strings.len()
            ));
        }
        if strings.iter().any(String::is_empty) {
            return expected("must not hold an empty string");
        }
        if strings.iter().any(|s| s.len() > STOP_STRING_BYTES_MAX) {
            return expected(format!("must hold strings of at most {STOP_STRING_BYTES_MAX} bytes"));
        }
        Ok(StopStrings(strings))
    }

    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndUser(String);

impl EndUser {
    pub fn new(name: String) -> Result<EndUser, Expected> {
        if name.len() > NAME_BYTES_MAX {
            return expected(format!("must be at most {NAME_BYTES_MAX} bytes long"));
        }
        Ok(EndUser(name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A limit on the answer's tokens: at least 1.
pub fn output_tokens_max(value: i64) -> Result<NonZeroU32, Expected> {
    match u32::try_from(value).ok().and_then(NonZeroU32::new) {
        Some(limit) => Ok(limit),
        None => expected(format!("must be between 1 and {}, but is {value}", u32::MAX)),
    }
}

/// A limit on the tokens drawn from; 0 and -1 both mean none, as in other engines.
pub fn top_k(value: i64) -> Result<u32, Expected> {
    match value {
        -1 => Ok(0),
        _ => u32::try_from(value)
            .or_else(|_| expected(format!("must be between 0 and {}, but is {value}", u32::MAX))),
    }
}

/// A conversation: at least one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Messages(Vec<Message>);

impl Messages {
    pub fn new(messages: Vec<Message>) -> Result<Messages, Expected> {
        match messages.len() {
            0 => expected("must hold at least one message"),
            1..=MESSAGES_MAX => Ok(Messages(messages)),
            count => expected(format!("must hold at most {MESSAGES_MAX} messages, but holds {count}")),
        }
    }

    pub fn as_slice(&self) -> &[Message] {
        &self.0
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
    /// What an assistant called: a JSON array in OpenAI's shape, or empty.
    pub tool_calls_json: String,
    /// Which call a tool answers. Empty but for [`Role::Tool`].
    pub tool_call_id: String,
    /// The author, where several share a role. May be empty.
    pub name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// The name that chat templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_say_what_is_expected() {
        fn check<T: std::fmt::Debug>(value: Result<T, Expected>, expect: &str) {
            let error = value.expect_err("out of range").to_string();
            assert!(error.contains(expect), "{error}");
        }
        for value in [-0.1, 2.1, f64::NAN, f64::INFINITY] {
            check(Temperature::new(value), "between 0 and 2");
        }
        for value in [-0.1, 1.1, f64::NAN] {
            check(TopP::new(value), "between 0 and 1");
        }
        for value in [0, -1, i64::MAX] {
            check(output_tokens_max(value), "between 1 and");
        }
        check(top_k(-2), "between 0 and");
        for value in [-2.1, 2.1, f64::NAN] {
            check(Penalty::new(value), "between -2 and 2");
        }
        for value in [0.0, 10.1, f64::NAN] {
            check(RepetitionPenalty::new(value), "between 0.1 and 10");
        }
        check(LogitBias::new(vec![(1, 101.0)]), "between -100 and 100");
        check(LogitBias::new(vec![(1, 1.0); 1025]), "at most 1024");
        check(min_p(1.1), "between 0 and 1");
        check(top_logprobs(21, TOP_LOGPROBS_MAX), "between 0 and 20");
        check(stop_ids(vec![1; 65]), "at most 64");
        check(function_name("a b"), "a-z");
        check(StopStrings::new(vec![String::new()]), "empty string");
        check(StopStrings::new(vec!["a".into(); 5]), "at most 4");
        check(Messages::new(vec![]), "at least one");
        check(Prompt::text(String::new()), "empty");
        check(Prompt::tokens(vec![]), "at least one");
        check(ModelName::new(String::new()), "empty");
        check(EndUser::new("u".repeat(257)), "at most 256");
    }

    #[test]
    fn edges_are_inside() {
        assert_eq!(Temperature::new(0.0).expect("greedy").get(), 0.0);
        assert_eq!(Temperature::new(2.0).expect("hot").get(), 2.0);
        assert!(TopP::new(0.0).expect("the most likely token").get() > 0.0);
        assert_eq!(output_tokens_max(1).expect("one token").get(), 1);
        assert_eq!(top_k(-1).expect("no limit"), 0);
        assert_eq!(RepetitionPenalty::new(0.1).expect("a tenth").get(), 0.1);
        assert_eq!(Penalty::new(-2.0).expect("the most").get(), -2.0);
        assert_eq!(StopStrings::new(vec!["a".into(); 4]).expect("four").as_slice().len(), 4);
    }
}
