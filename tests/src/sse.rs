//! A strict reader of the streams: whatever would break a strict client breaks the test.

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::HeaderMap;
use serde_json::Value;

use crate::rest::{Reply, usage_of};

/// A stream of chat or text completion chunks, read frame by frame. Dropping it hangs up.
pub struct Stream {
    pub headers: HeaderMap,
    body: BoxStream<'static, Vec<u8>>,
    unread: Vec<u8>,
    frames: Vec<Value>,
}

/// What a finished stream said.
#[derive(Debug, Clone, PartialEq)]
pub struct Transcript {
    /// Every `data:` frame before `[DONE]`.
    pub frames: Vec<Value>,
    pub content: String,
    pub finish_reason: Option<String>,
    /// (prompt, completion) tokens, when the stream was asked for them.
    pub usage: Option<(u64, u64)>,
}

impl Stream {
    /// The stream, or the answer that came instead of one.
    pub async fn open(response: reqwest::Response) -> Result<Stream, Reply> {
        if !response.status().is_success() {
            return Err(Reply::read(response).await);
        }
        let headers = response.headers().clone();
        let content_type = headers.get("content-type").map(|value| value.to_str().unwrap_or_default());
        assert!(content_type.is_some_and(|kind| kind.starts_with("text/event-stream")), "{content_type:?}");
        let body = response.bytes_stream().map(|part| part.expect("the stream is not cut").to_vec()).boxed();
        Ok(Stream { headers, body, unread: Vec::new(), frames: Vec::new() })
    }

    /// The next frame; `None` after `[DONE]`, which must come, and come last.
    pub async fn next(&mut self) -> Option<Value> {
        let Some(frame) = self.raw_frame().await else {
            panic!("the stream ended without [DONE]; it said {:#?}", self.frames);
        };
        if frame == "[DONE]" {
            let after = self.raw_frame().await;
            assert_eq!(after, None, "nothing follows [DONE]");
            return None;
        }
        let frame: Value =
            serde_json::from_str(&frame).unwrap_or_else(|error| panic!("{error} in frame {frame}"));
        assert!(frame.get("error").is_none(), "an error frame: {frame}");
        self.frames.push(frame.clone());
        Some(frame)
    }

    /// Reads on until the generated text so far has at least this many characters, or the stream ends.
    pub async fn read_text(&mut self, characters_min: usize) -> String {
        loop {
            let text: String = self.frames.iter().map(text_of).collect();
            if text.chars().count() >= characters_min {
                return text;
            }
            if self.next().await.is_none() {
                return text;
            }
        }
    }

    /// Reads on until `frames_min` frames have arrived in all.
    pub async fn read_frames(&mut self, frames_min: usize) {
        while self.frames.len() < frames_min {
            assert!(self.next().await.is_some(), "the stream ended after {} frames", self.frames.len());
        }
    }

    /// Reads to the end and checks the order of the frames.
    pub async fn finish(mut self) -> Transcript {
        while self.next().await.is_some() {}
        Transcript::of(self.frames)
    }

    async fn raw_frame(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let frame: Vec<u8> = self.unread.drain(..end + 2).take(end).collect();
                let frame = String::from_utf8(frame).expect("frames are UTF-8");
                return Some(data_of(&frame));
            }
            match self.body.next().await {
                Some(part) => self.unread.extend(part),
                None => {
                    assert!(
                        self.unread.is_empty(),
                        "a torn frame: {:?}",
                        String::from_utf8_lossy(&self.unread)
                    );
                    return None;
                }
            }
        }
    }
}

impl Transcript {
    /// Checks what API.md promises of the order and shape of chunks, then folds them.
    #[track_caller]
    pub fn of(frames: Vec<Value>) -> Transcript {
        let id = frames.first().expect("a stream has frames")["id"].clone();
        assert!(id.is_string());
        let (mut finish_reason, mut usage) = (None, None);
        for (at, frame) in frames.iter().enumerate() {
            assert_eq!(frame["id"], id, "every chunk has the id of the first");
            let choices = frame["choices"].as_array().unwrap_or_else(|| panic!("no choices: {frame}"));
            let Some(choice) = choices.first() else {
                assert_eq!(at + 1, frames.len(), "the usage chunk is the last: {frame}");
                usage = Some(usage_of(&frame["usage"]));
                continue;
            };
            assert_eq!(choices.len(), 1, "{frame}");
            assert_eq!(choice["index"], 0);
            assert!(finish_reason.is_none(), "a chunk with a choice follows the finish reason: {frame}");
            let reason = choice.get("finish_reason").expect("finish_reason is present, if null");
            finish_reason = reason.as_str().map(str::to_owned);
            assert!(frame.get("usage").is_none_or(Value::is_null), "usage has a chunk of its own: {frame}");
            assert!(choice["delta"].get("tool_calls").is_none(), "absent, rather than empty: {frame}");
        }
        assert!(finish_reason.is_some(), "no chunk carried a finish reason: {frames:#?}");
        let content = frames.iter().map(text_of).collect();
        Transcript { frames, content, finish_reason, usage }
    }

    /// (prompt, completion) tokens of a stream that was asked for them.
    #[track_caller]
    pub fn usage(&self) -> (u64, u64) {
        self.usage.expect("a stream with include_usage ends with a usage chunk")
    }
}

/// The text a chunk carries: of chat, or of a text completion.
fn text_of(frame: &Value) -> String {
    let choice = &frame["choices"][0];
    choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default().to_owned()
}

/// `data: ...` and nothing else: no comments, ids or event names, which crash strict clients.
fn data_of(frame: &str) -> String {
    match frame.strip_prefix("data: ") {
        Some(data) if !data.contains('\n') => data.to_owned(),
        _ => panic!("a frame is one line `data: ..`, not {frame:?}"),
    }
}
