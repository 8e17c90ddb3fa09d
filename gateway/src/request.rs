//! One completion request, valid by construction: whatever dialect it came in, below this module its type is proof.
//!
//! Each part checks itself when it is made (`Temperature::new(3.0)` is an `Err` that says what was expected); the
//! dialect adds what the field is called on its wire. Nothing here knows JSON, gRPC or defaults of a vendor.

use std::num::NonZeroU32;

/// Stop strings a request may name.
pub const STOP_STRINGS_MAX: usize = 4;
/// Bytes of one stop string: what the node may have to hold back.
pub const STOP_STRING_BYTES_MAX: usize = 256;
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
    /// The caller's own end user, for usage reports. May be empty.
    pub user: EndUser,
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

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Absent: the model's default.
    pub temperature: Option<Temperature>,
    /// Absent: the model's default.
    pub top_p: Option<TopP>,
    /// 0: no limit. Absent: the model's default.
    pub top_k: Option<u32>,
    /// Absent: the gateway draws one.
    pub seed: Option<u64>,
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
    /// The author, where several share a role. May be empty.
    pub name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// The name that chat templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
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
        assert_eq!(StopStrings::new(vec!["a".into(); 4]).expect("four").as_slice().len(), 4);
    }
}
