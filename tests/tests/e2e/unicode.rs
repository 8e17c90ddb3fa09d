//! Text of the world, in and out: nothing is mangled, split or swallowed.

use serde_json::{Value, json};
use sluice_tests::{Cluster, ClusterOptions, assert_error, random_model};

const TEXTS: [&str; 6] = [
    "水は低きに流れる。",
    "Ωραίο ποτάμι, naïve café, e\u{301}",
    "👩‍👩‍👧‍👦 🌊 🏞️",
    "שלום \u{202e}abc",
    "line\nbreak\ttab \"quote\" \\ \u{7f} \u{2028}",
    "\u{10ffff}\u{feff}",
];

#[tokio::test]
async fn any_text_is_a_prompt_however_it_is_escaped() {
    let cluster = Cluster::start().await;
    for text in TEXTS {
        let plain = cluster.chat(&cluster.question(text, 4)).await;
        let (prompt, _) = plain.usage();
        assert!(prompt > 0);
        // The same request, every character beyond ASCII written as \uXXXX.
        let escaped: String = cluster.question(text, 4).to_string().chars().flat_map(escape).collect();
        let request = cluster.request("POST", "/chat/completions").bearer_auth(&cluster.api_key);
        let reply = cluster.send(request.header("content-type", "application/json").body(escaped)).await;
        assert_eq!((reply.content(), reply.usage()), (plain.content(), plain.usage()), "{text:?}");
    }
    cluster.finish().await;
}

fn escape(character: char) -> Vec<char> {
    if character.is_ascii() {
        return vec![character];
    }
    let mut units = [0; 2];
    character
        .encode_utf16(&mut units)
        .iter()
        .flat_map(|unit| format!("\\u{unit:04x}").into_bytes())
        .map(char::from)
        .collect()
}

#[tokio::test]
async fn bytes_that_are_no_text_are_refused() {
    let cluster = Cluster::start().await;
    let model = &cluster.model;
    let body = |content: &[u8]| {
        let head = format!(r#"{{"model":"{model}","max_tokens":1,"messages":[{{"role":"user","content":""#);
        [head.as_bytes(), content, br#""}]}"#].concat()
    };
    for (case, content) in [
        ("a lone surrogate", &br"\ud83c"[..]),
        ("a wrong escape", &br"\x41"[..]),
        ("a raw control character", &b"\x01"[..]),
        ("bytes that are not UTF-8", &b"\xff\xfe"[..]),
        ("an overlong encoding", &b"\xc0\x80"[..]),
    ] {
        let request = cluster.request("POST", "/chat/completions").bearer_auth(&cluster.api_key);
        let reply =
            cluster.send(request.header("content-type", "application/json").body(body(content))).await;
        assert_error(case, &reply, 400, Some("invalid_json"), None);
    }
    cluster.finish().await;
}

/// Random weights sample bytes that end inside characters all the time: no chunk may show it.
#[tokio::test]
async fn no_chunk_splits_a_character() {
    let options = ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    let mut beyond_ascii = 0;
    for seed in 0..8 {
        let mut body = cluster.question("水", 200);
        body["temperature"] = json!(1.5);
        body["seed"] = json!(seed);
        let whole = cluster.chat(&body).await;
        let streamed = cluster.stream_chat(&body).await;
        assert_eq!(streamed.content, whole.content(), "seed {seed}");
        assert_eq!(streamed.usage(), whole.usage());
        beyond_ascii += streamed.content.chars().filter(|character| !character.is_ascii()).count();
    }
    assert!(beyond_ascii > 0, "the sample has something to split");
    cluster.finish().await;
}

/// A stop string may lie across tokens, and across the bytes of one character.
#[tokio::test]
async fn stop_strings_cut_at_their_first_character() {
    let options = ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    let mut body = cluster.question("水", 120);
    body["temperature"] = json!(1.5);
    body["seed"] = json!(3);
    let text = cluster.chat(&body).await.content();
    let characters: Vec<char> = text.chars().collect();
    assert!(characters.len() > 40, "{text:?}");
    for (from, length) in [(10, 1), (20, 2), (25, 6), (30, 10)] {
        let stop: String = characters[from..from + length].iter().collect();
        let expected = &text[..text.find(&stop).expect("a part of the text")];
        body["stop"] = json!([stop, "a stop that never comes 水"]);
        let whole = cluster.chat(&body).await;
        assert_eq!(whole.content(), expected, "stop {stop:?}");
        assert_eq!(whole.ok()["choices"][0]["finish_reason"], "stop");
        assert_eq!(cluster.stream_chat(&body).await.content, expected, "stop {stop:?}, streamed");
    }
    // A stop string that does not come is held back at the end no more than anything else.
    body["stop"] = Value::from(format!("{}x", characters[characters.len() - 1]));
    assert_eq!(cluster.stream_chat(&body).await.content, text);
    cluster.finish().await;
}
