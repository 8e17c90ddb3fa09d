//! One REST answer, read whole, and the promises every error keeps.

use reqwest::header::HeaderMap;
use serde_json::Value;

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

impl Reply {
    pub async fn read(response: reqwest::Response) -> Reply {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("the body arrives whole");
        Reply { status, headers, text }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("headers are ASCII"))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// The body of an answer that must have status 200.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// The text of the only choice of a chat completion.
    #[track_caller]
    pub fn content(&self) -> String {
        let body = self.ok();
        body["choices"][0]["message"]["content"]
            .as_str()
            .unwrap_or_else(|| panic!("no content: {body}"))
            .to_owned()
    }

    /// Of the prompt tokens, how many came from a cache.
    #[track_caller]
    pub fn cached_tokens(&self) -> u64 {
        let usage = &self.ok()["usage"];
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        cached.unwrap_or_else(|| panic!("usage has no cached_tokens: {usage}"))
    }

    /// (prompt, completion) tokens, of which the total must be the sum.
    #[track_caller]
    pub fn usage(&self) -> (u64, u64) {
        usage_of(&self.ok()["usage"])
    }
}

#[track_caller]
pub(crate) fn usage_of(usage: &Value) -> (u64, u64) {
    let field = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("usage has no {name}: {usage}"));
    let (prompt, completion) = (field("prompt_tokens"), field("completion_tokens"));
    assert_eq!(field("total_tokens"), prompt + completion, "{usage}");
    (prompt, completion)
}

/// What an error must be: `(status, code, param)`, in the OpenAI envelope with exactly its four keys.
#[track_caller]
pub fn assert_error(
    case: &str,
    reply: &Reply,
    status: u16,
    code: Option<&str>,
    param: Option<&str>,
) -> String {
    assert_eq!(reply.status, status, "{case}: {}", reply.text);
    let content_type = reply.header("content-type").unwrap_or_default();
    assert!(content_type.starts_with("application/json"), "{case}: an error is JSON, not {content_type:?}");
    assert!(reply.header("x-request-id").is_some_and(|id| !id.is_empty()), "{case}: no x-request-id");

    let body = reply.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{case}: no error object: {body}"));
    let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["code", "message", "param", "type"], "{case}: {body}");
    assert!(error["type"].as_str().is_some_and(|kind| !kind.is_empty()), "{case}: {body}");
    assert_eq!(error["code"].as_str(), code, "{case}: {body}");
    assert_eq!(error["param"].as_str(), param, "{case}: {body}");

    let message = error["message"].as_str().unwrap_or_default();
    assert!(!message.is_empty(), "{case}: {body}");
    for internal in ["sqlx", "tonic", "panicked", "src/", "Status {"] {
        assert!(!message.contains(internal), "{case}: internal text reached the client: {message}");
    }
    message.to_owned()
}
