//! Log-probabilities, in the two shapes that OpenAI's endpoints have for them.
//!
//! Tokens that stand for no text, such as the end of sequence, are left out: they are counted, but not content.

use serde::Serialize;
use serde_json::{Map, Value};
use sluice_proto::node::v1::{TokenLogprob, TokenLogprobs};

/// Of a chat: `choices[].logprobs`.
#[derive(Debug, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ChatLogprob,
    top_logprobs: Vec<ChatLogprob>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

/// Less is not distinguished: JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// As an f64, so that it is printed alike wherever it is printed.
fn logprob(token: &TokenLogprob) -> f64 {
    f64::from(token.logprob.max(LOGPROB_MIN))
}

impl ChatLogprobs {
    /// `None` where none came.
    pub fn of(tokens: &[TokenLogprobs]) -> Option<ChatLogprobs> {
        let token = |(chosen, top): (&TokenLogprob, &[TokenLogprob])| ChatToken {
            token: chosen.into(),
            top_logprobs: top.iter().map(ChatLogprob::from).collect(),
        };
        let content: Vec<ChatToken> = tokens.iter().filter_map(visible).map(token).collect();
        (!tokens.is_empty()).then_some(ChatLogprobs { content, refusal: None })
    }
}

impl From<&TokenLogprob> for ChatLogprob {
    fn from(token: &TokenLogprob) -> ChatLogprob {
        ChatLogprob { token: name(&token.bytes), logprob: logprob(token), bytes: token.bytes.clone() }
    }
}

/// Of the older endpoint: `choices[].logprobs`, by columns.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f64>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

/// Counts characters, over the chunks of an answer.
#[derive(Debug, Default)]
pub struct TextOffset(usize);

impl TextLogprobs {
    pub fn of(tokens: &[TokenLogprobs], offset: &mut TextOffset) -> Option<TextLogprobs> {
        let mut columns = TextLogprobs::default();
        for (chosen, top) in tokens.iter().filter_map(visible) {
            let token = name(&chosen.bytes);
            columns.text_offset.push(offset.0);
            offset.0 += token.chars().count();
            columns.tokens.push(token);
            columns.token_logprobs.push(logprob(chosen));
            let named = |other: &TokenLogprob| (name(&other.bytes), Value::from(logprob(other)));
            columns.top_logprobs.push(top.iter().map(named).collect());
        }
        (!tokens.is_empty()).then_some(columns)
    }
}

fn visible(token: &TokenLogprobs) -> Option<(&TokenLogprob, &[TokenLogprob])> {
    let chosen = token.chosen.as_ref().filter(|chosen| !chosen.bytes.is_empty())?;
    Some((chosen, &token.top))
}

/// A token that is not whole characters is named by its bytes, as OpenAI does.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokens() -> Vec<TokenLogprobs> {
        let one = |bytes: &[u8], logprob| TokenLogprob { id: 1, logprob, bytes: bytes.to_vec() };
        let token = |bytes: &[u8], logprob, top| TokenLogprobs { chosen: Some(one(bytes, logprob)), top };
        vec![
            token("né".as_bytes(), -0.5, vec![one(b"a", -0.25), one("né".as_bytes(), -0.5)]),
            token(b"\xE4\xBD", f32::NEG_INFINITY, vec![]),
            token(b"", -1.0, vec![]),
        ]
    }

    #[test]
    fn a_chat_has_a_list_of_tokens() {
        let expect = json!({ "content": [
            { "token": "né", "logprob": -0.5, "bytes": [110, 195, 169], "top_logprobs": [
                { "token": "a", "logprob": -0.25, "bytes": [97] },
                { "token": "né", "logprob": -0.5, "bytes": [110, 195, 169] },
            ] },
            { "token": "bytes:\\xe4\\xbd", "logprob": -9999.0, "bytes": [228, 189], "top_logprobs": [] },
        ], "refusal": null });
        assert_eq!(json!(ChatLogprobs::of(&tokens())), expect);
        assert_eq!(json!(ChatLogprobs::of(&[])), json!(null));
    }

    #[test]
    fn a_text_has_columns() {
        let mut offset = TextOffset::default();
        TextLogprobs::of(&tokens()[..1], &mut offset);
        let expect = json!({
            "tokens": ["né", "bytes:\\xe4\\xbd"],
            "token_logprobs": [-0.5, -9999.0],
            "top_logprobs": [{ "a": -0.25, "né": -0.5 }, {}],
            "text_offset": [2, 4],
        });
        assert_eq!(json!(TextLogprobs::of(&tokens(), &mut offset)), expect);
    }
}
