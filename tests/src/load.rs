//! Clients under whom things die: they take whatever comes, and say afterwards what they were given.

use futures::StreamExt;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::rest::usage_of;

/// What became of one streamed request, as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It came to `[DONE]`: the request's id, and (prompt, completion) tokens.
    Completed { request_id: String, usage: (u64, u64) },
    /// It was answered with an error, before or within the stream.
    Refused { status: u16, text: String },
    /// No answer, or one that broke off.
    Broken,
}

/// The parts of a client that need no cluster, so that they can run on while it is killed.
#[derive(Debug, Clone)]
pub struct Caller {
    http: reqwest::Client,
    url: String,
    key: String,
}

impl Cluster {
    /// A client of chat completions with this key.
    pub fn caller(&self, key: &str) -> Caller {
        Caller { http: reqwest::Client::new(), url: self.url("/chat/completions"), key: key.to_owned() }
    }

    /// One whose requests share a connection (HTTP/2): thousands of clients need more sockets than a machine may give.
    pub fn caller_of_many(&self, key: &str) -> Caller {
        let http = reqwest::Client::builder().http2_prior_knowledge().build().expect("a client");
        Caller { http, ..self.caller(key) }
    }
}

impl Caller {
    /// Streams an answer to its end, whatever that is.
    pub async fn ask(&self, body: &Value) -> Fate {
        let Some((status, request_id, text)) = self.read(body, usize::MAX).await else { return Fate::Broken };
        let frames: Vec<&str> = text.split("\n\n").filter_map(|frame| frame.strip_prefix("data: ")).collect();
        let values = || frames.iter().filter_map(|frame| serde_json::from_str::<Value>(frame).ok());
        if status != 200 || values().any(|frame| frame.get("error").is_some()) {
            return Fate::Refused { status, text };
        }
        if frames.last() != Some(&"[DONE]") {
            return Fate::Broken;
        }
        let usage =
            values().find(|frame| frame["usage"].is_object()).expect("the stream was asked for usage");
        Fate::Completed { request_id, usage: usage_of(&usage["usage"]) }
    }

    /// Reads up to `frames_max` frames, then hangs up. The request's id, if an answer began.
    pub async fn hang_up_after(&self, body: &Value, frames_max: usize) -> Option<String> {
        self.read(body, frames_max).await.map(|(_, request_id, _)| request_id)
    }

    /// Status, request id and what was read; `None` if the connection broke.
    async fn read(&self, body: &Value, frames_max: usize) -> Option<(u16, String, String)> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let response = self.http.post(&self.url).bearer_auth(&self.key).json(&body).send().await.ok()?;
        let status = response.status().as_u16();
        let request_id = response.headers().get("x-request-id")?.to_str().ok()?.to_owned();
        let (mut parts, mut read) = (response.bytes_stream(), Vec::new());
        while read.windows(2).filter(|pair| *pair == b"\n\n").count() < frames_max {
            match parts.next().await {
                Some(part) => read.extend(part.ok()?),
                None => break,
            }
        }
        Some((status, request_id, String::from_utf8_lossy(&read).into_owned()))
    }
}
