//! Constraints and the bundled model together: a small and clumsy model, whose output must be valid all the same. The
//! judge is a validator that shares no code with what made the output.

use crate::engine::mailbox::Ending;
use crate::engine::{Answer, Submission};
use crate::node::{Node, NodeOptions};
use serde_json::{Map, Value, json};
use sluice_proto::node::v1 as proto;
use sluice_proto::node::v1::constraint::Kind;
use sluice_proto::node::v1::tokenize_request::Input;
use std::path::Path;

const OUTPUT_TOKENS_MAX: u32 = 600;

fn node() -> Node {
    let mut options = NodeOptions::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sluice-demo"));
    (options.slots, options.waiting_max) = (48, 2_000);
    options.constraint_wait_ms = 600_000;
    Node::start(options).expect("the bundled model starts")
}

fn chat(node: &Node, question: &str, tools_json: &str) -> Vec<u32> {
    let message = proto::ChatMessage { role: "user".into(), content: question.into(), ..Default::default() };
    let chat = proto::ChatPrompt { messages: vec![message], tools_json: tools_json.into() };
    node.service().encode(Input::Chat(chat)).expect("it renders")
}

fn start(node: &Node, prompt_ids: Vec<u32>, kind: Kind, seed: u64) -> proto::Start {
    let temperature = [0.0, 0.7, 1.2][seed as usize % 3];
    proto::Start {
        model: node.models()[0].name.clone(),
        prompt_ids,
        output_tokens_max: OUTPUT_TOKENS_MAX,
        grant: Some(proto::Grant { output_tokens: u64::from(OUTPUT_TOKENS_MAX), is_final: false }),
        sampling: Some(proto::Sampling { temperature, seed, ..Default::default() }),
        tenant: format!("tenant-{}", seed % 5),
        constraint: Some(proto::Constraint { kind: Some(kind) }),
        ..Default::default()
    }
}

struct Outcome {
    ids: Vec<u32>,
    text: String,
    ending: Ending,
}

async fn collect(mut answer: Answer) -> Outcome {
    let (mut ids, mut text) = (Vec::new(), String::new());
    loop {
        let delivery = answer.next().await.expect("an ending comes before the end");
        ids.extend(delivery.ids);
        text.push_str(&delivery.text);
        if let Some(ending) = delivery.ending {
            return Outcome { ids, text, ending };
        }
    }
}

async fn submission(node: &Node, start: proto::Start) -> Submission {
    node.service().submission(start, None).await.unwrap_or_else(|status| panic!("{}", status.message()))
}

async fn generate(node: &Node, start: proto::Start) -> Outcome {
    collect(node.engine().submit(submission(node, start).await).await.expect("there is room")).await
}

async fn all(node: &Node, starts: Vec<proto::Start>) -> Vec<Outcome> {
    futures::future::join_all(starts.into_iter().map(|start| generate(node, start))).await
}

/// SplitMix64: schemas are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) % sides
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize].clone()
    }

    fn schema(&mut self) -> Value {
        let definitions = json!({"word": self.leaf(), "pair": self.object(1)});
        let mut schema = self.object(3);
        schema["$defs"] = definitions;
        schema
    }

    fn object(&mut self, depth: u64) -> Value {
        const NAMES: [&str; 8] = ["name", "city", "a", "größe", "items", "is ok", "x\"y", "tags"];
        let (mut properties, mut required) = (Map::new(), Vec::new());
        for _ in 0..=self.roll(4) {
            let name = self.pick(&NAMES);
            properties.insert(name.to_owned(), self.value(depth - 1));
        }
        for name in properties.keys() {
            if self.roll(3) > 0 {
                required.push(name.clone());
            }
        }
        json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
    }

    fn value(&mut self, depth: u64) -> Value {
        match self.roll(if depth == 0 { 5 } else { 9 }) {
            0..=4 => self.leaf(),
            5 => self.object(depth),
            6 => {
                let (min, items) = (self.roll(3), self.value(depth - 1));
                json!({"type": "array", "items": items, "minItems": min, "maxItems": min + self.roll(3)})
            }
            7 => json!({"anyOf": [self.leaf(), self.value(depth - 1), {"type": "null"}]}),
            _ => json!({"$ref": self.pick(&["#/$defs/word", "#/$defs/pair"])}),
        }
    }

    fn leaf(&mut self) -> Value {
        const PATTERNS: [&str; 5] =
            ["^[a-z]{2,6}$", "^[A-Z][a-z]{1,8}-[0-9]{2}$", "^(red|green|blue)$", "^\\d{4}$", "^[^\"]{0,5}!$"];
        let low = self.roll(2_000) as i64 - 1_000;
        let high = low + self.roll(500) as i64;
        match self.roll(9) {
            0 => json!({"enum": ["red", 7, null, "ein \"Wort\"", true]}),
            1 => json!({"const": self.pick(&[json!("fixed"), json!(12), json!([1, 2]), json!({"k": null})])}),
            2 => json!({"type": "integer", "minimum": low, "maximum": high}),
            3 => json!({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2}),
            4 => json!({"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.25}),
            5 => json!({"type": "string", "minLength": self.roll(3), "maxLength": 3 + self.roll(12)}),
            6 => json!({"type": "string", "pattern": self.pick(&PATTERNS)}),
            7 => json!({"type": "string", "format": self.pick(&["date", "uuid", "ipv4"])}),
            _ => json!({"type": self.pick(&["boolean", "null"])}),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thousand_outputs_are_valid_under_random_schemas() {
    let node = node();
    let mut dice = Dice(20_260_101);
    let schemas: Vec<Value> = (0..1_000).map(|_| dice.schema()).collect();
    let prompts: Vec<Vec<u32>> =
        ["What is Sluice?", "Tell me a story.", "Ada is 36 and lives in Rome. Give me JSON."]
            .map(|question| chat(&node, question, ""))
            .into();
    let starts = schemas.iter().zip(0u64..).map(|(schema, seed)| {
        let prompt = prompts[seed as usize / 3 % prompts.len()].clone();
        start(&node, prompt, Kind::JsonSchema(schema.to_string()), seed)
    });
    let outcomes = all(&node, starts.collect()).await;
    let mut failures = Vec::new();
    for (schema, outcome) in schemas.iter().zip(&outcomes) {
        let validator =
            jsonschema::options().should_validate_formats(true).build(schema).expect("a valid schema");
        let valid = serde_json::from_str(&outcome.text).is_ok_and(|value: Value| validator.is_valid(&value));
        if !valid || outcome.ending != (Ending::Stop { stop_string: None }) {
            failures.push(format!("{:?} {} under {schema}", outcome.ending, outcome.text));
        }
    }
    assert!(failures.is_empty(), "{} of 1000: {:#?}", failures.len(), &failures[..failures.len().min(5)]);
    let distinct: std::collections::BTreeSet<&str> = outcomes.iter().map(|o| o.text.as_str()).collect();
    assert!(distinct.len() > 700, "the outputs are of many kinds: {}", distinct.len());
}

#[tokio::test]
async fn patterns_objects_and_tool_calls_come_out_whole() {
    let node = node();
    let stop = Ending::Stop { stop_string: None };
    let pattern = "[A-Z][a-z]{2,10} [0-9]{1,3}(, [a-z]{3,8}){0,3}\\.";
    let prompt = chat(&node, "Hello!", "");
    let starts = (0..60).map(|seed| start(&node, prompt.clone(), Kind::Regex(pattern.into()), seed));
    let judge = regex_of(pattern);
    for outcome in all(&node, starts.collect()).await {
        assert!(outcome.ending == stop && judge.is_valid(&json!(outcome.text)), "{}", outcome.text);
    }

    let prompt = chat(&node, "Ada is 36 and lives in Rome. Give me JSON with name, age and city.", "");
    let object = || Kind::JsonObject(proto::JsonObject {});
    let starts = (0..30).map(|seed| start(&node, prompt.clone(), object(), seed));
    let mut whole = 0;
    for outcome in all(&node, starts.collect()).await {
        // Nothing bounds it but the model: some go on to the limit, and say so.
        let value = serde_json::from_str::<Value>(&outcome.text);
        match outcome.ending {
            Ending::Length => assert!(value.is_err() && outcome.text.starts_with('{'), "{}", outcome.text),
            ending => {
                assert!(ending == stop && value.is_ok_and(|value| value.is_object()), "{}", outcome.text);
                whole += 1;
            }
        }
    }
    assert!(whole >= 10, "of 30 objects end {whole}");

    let tools = json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        }}},
        {"type": "function", "function": {"name": "get_time"}},
    ]);
    let prompt = chat(&node, "What is the weather in Oslo?", &tools.to_string());
    let calls = |choice: proto::ToolChoice| {
        Kind::ToolCalls(proto::ToolCalls {
            tools_json: tools.to_string(),
            choice: choice.into(),
            ..Default::default()
        })
    };
    let validator = jsonschema::validator_for(&tools[0]["function"]["parameters"]).expect("a valid schema");
    for choice in [proto::ToolChoice::Required, proto::ToolChoice::Auto] {
        let starts = (0..40).map(|seed| start(&node, prompt.clone(), calls(choice), seed));
        for outcome in all(&node, starts.collect()).await {
            if choice == proto::ToolChoice::Auto && !outcome.text.starts_with('{') {
                continue;
            }
            let call: Value = serde_json::from_str(&outcome.text).expect("a whole call");
            assert_eq!(outcome.ending, stop);
            match call["tool"].as_str() {
                Some("get_weather") => assert!(validator.is_valid(&call["arguments"]), "{call}"),
                other => assert!(other == Some("get_time") && call["arguments"] == json!({}), "{call}"),
            }
        }
    }
}

/// A pattern as a validator of strings.
fn regex_of(pattern: &str) -> jsonschema::Validator {
    jsonschema::validator_for(&json!({"type": "string", "pattern": format!("^{pattern}$")}))
        .expect("a pattern")
}

#[tokio::test]
async fn a_constraint_changes_nothing_for_its_neighbours() {
    let node = node();
    let free = |seed: u64| proto::Start {
        constraint: None,
        output_tokens_max: 60,
        ..start(
            &node,
            chat(&node, "Tell me a story about a fox.", ""),
            Kind::JsonObject(proto::JsonObject {}),
            seed,
        )
    };
    let mut alone = Vec::new();
    for seed in 0..6 {
        alone.push(generate(&node, free(seed)).await);
    }
    let mut dice = Dice(7);
    let mut starts: Vec<proto::Start> = (0..6).map(free).collect();
    let prompt = chat(&node, "Hello!", "");
    starts.extend(
        (0..12).map(|seed| start(&node, prompt.clone(), Kind::JsonSchema(dice.schema().to_string()), seed)),
    );
    let together = all(&node, starts).await;
    for (alone, beside) in alone.iter().zip(&together) {
        assert_eq!((&alone.ids, &alone.text), (&beside.ids, &beside.text));
    }
}

/// Penalties, biases, least lengths, stop strings and constraints: all of them functions of seed and tokens so far.
#[tokio::test]
async fn a_shaped_sequence_resumes_as_if_it_had_never_stopped() {
    let node = node();
    let mut dice = Dice(99);
    for seed in 0..9u64 {
        let question = "Tell me a story about a red kite.";
        let kind = Kind::JsonSchema(dice.schema().to_string());
        let mut whole = start(&node, chat(&node, question, ""), kind, seed);
        if seed % 2 == 0 {
            whole.constraint = None;
        }
        whole.output_tokens_max = 80;
        whole.output_tokens_min = 20;
        whole.stop_strings = vec![" the".into()];
        let sampling = whole.sampling.as_mut().expect("it was set");
        sampling.repetition_penalty = 1.3;
        sampling.frequency_penalty = 0.4;
        sampling.presence_penalty = -0.2;
        sampling.min_p = 0.01;
        sampling.logit_bias = [(300, 1.5), (301, -2.0)].into();
        let expect = generate(&node, whole.clone()).await;
        for cut in [1, 3, 10, expect.ids.len() - 1] {
            let cut = cut.min(expect.ids.len());
            let resumed = proto::Start { resume_ids: expect.ids[..cut].to_vec(), ..whole.clone() };
            let rest = generate(&node, resumed).await;
            assert_eq!((&rest.ids[..], &rest.ending), (&expect.ids[cut..], &expect.ending), "cut at {cut}");
            assert!(expect.text.ends_with(&rest.text));
        }
        if whole.constraint.is_none() {
            assert!(expect.ids.len() > 20 || expect.ending == Ending::Length, "{}", expect.ids.len());
        }
    }
}

#[tokio::test]
async fn log_probabilities_are_of_the_model_whatever_shapes_the_choice() {
    let node = node();
    let prompt = chat(&node, "What is Sluice?", "");
    let plain = proto::Start {
        constraint: None,
        top_logprobs: Some(5),
        output_tokens_max: 12,
        ..start(&node, prompt.clone(), Kind::JsonObject(proto::JsonObject {}), 0)
    };
    let mut greedy =
        node.engine().submit(submission(&node, plain.clone()).await).await.expect("there is room");
    let first = greedy.next().await.expect("a token");
    let token = &first.logprobs[0];
    assert_eq!((token.top.len(), token.top[0]), (5, (token.id, token.logprob)), "greedy takes the likeliest");
    assert!(token.top.windows(2).all(|pair| pair[0].1 >= pair[1].1) && token.logprob <= 0.0);

    let biased = proto::Sampling { logit_bias: [(300, 100.0)].into(), ..Default::default() };
    let biased = proto::Start { sampling: Some(biased), ..plain };
    let mut answer = node.engine().submit(submission(&node, biased).await).await.expect("there is room");
    let biased = &answer.next().await.expect("a token").logprobs[0];
    assert_eq!((biased.id, &biased.top), (300, &token.top), "the same distribution, another choice");
    assert!(biased.logprob < token.logprob);
}
