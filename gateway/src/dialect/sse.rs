//! Server-sent events: `data: {json}\n\n` frames, closed by `data: [DONE]`, and nothing else on the line.

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use http::{HeaderValue, header};
use serde::Serialize;

use crate::{
    complete::{Completion, Event},
    error::ApiError,
};

/// Turns one event into the frames a dialect has for it.
pub trait Codec: Send + 'static {
    fn encode(&mut self, event: Event, frames: &mut Frames);
}

/// Frames that leave together.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    pub fn push(&mut self, frame: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, frame).expect("frames hold strings and numbers only");
        self.0.extend_from_slice(b"\n\n");
    }

    fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// What the client reads for one event of the stream; the last one closes it. A failure is a frame of its own.
pub fn frames(codec: &mut impl Codec, event: Result<Event, ApiError>) -> Bytes {
    let mut frames = Frames::default();
    let last = !matches!(event, Ok(Event::Delta(_)));
    match event {
        Ok(event) => codec.encode(event, &mut frames),
        Err(error) => frames.push(&error.envelope()),
    }
    if last {
        frames.done();
    }
    Bytes::from(frames.0)
}

/// The whole response. Dropping its body hangs up on the relay.
pub fn response(completion: Completion, codec: impl Codec) -> Response {
    let stream = futures::stream::unfold((completion, codec), |(mut completion, mut codec)| async {
        let event = completion.next().await?;
        let bytes = frames(&mut codec, event);
        Some((Ok::<_, std::convert::Infallible>(bytes), (completion, codec)))
    });
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that collect a response before they pass it on make streams useless.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
