//! Constraints by the texts they let through, and by what they refuse to become.

use super::*;
use crate::tokenizer::Tokenizer;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

const END: u32 = 2;

fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sluice-demo");
    Tokenizer::load(&dir, 4096).expect("the bundled tokenizer")
}

fn limits() -> ConstraintLimits {
    ConstraintLimits {
        source_bytes_max: 256 << 10,
        compile_wait_max: Duration::from_secs(60),
        compile_threads: 1,
        compile_waiting_max: 4,
    }
}

struct Bench {
    tokenizer: Tokenizer,
    grammars: Grammars,
}

impl Bench {
    fn new(format: ToolFormat) -> Bench {
        let tokenizer = tokenizer();
        let grammars = Grammars::start(&tokenizer, &[END], Some(format), limits()).expect("threads start");
        Bench { tokenizer, grammars }
    }

    fn guide(&self, constraint: &Constraint, resume_ids: Vec<u32>) -> Result<Guide, Refused> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(self.grammars.plan(constraint.clone(), resume_ids)).map(Guide::new)
    }

    /// How far a text gets, in bytes; and whether the output may end there.
    fn follow(&self, constraint: &Constraint, text: &str) -> (usize, bool) {
        let mut guide =
            self.guide(constraint, vec![]).unwrap_or_else(|error| panic!("{constraint:?}: {error}"));
        let mut bytes = 0;
        for id in self.tokenizer.encode_text(text).expect("it encodes") {
            if guide.is_complete() || !allows(guide.mask().expect("a mask"), id) {
                return (bytes, false);
            }
            guide.consume(id).expect("it was allowed");
            bytes += self.tokenizer.bytes(id).len();
        }
        (bytes, guide.is_complete() || allows(guide.mask().expect("a mask"), END))
    }

    #[track_caller]
    fn takes(&self, constraint: &Constraint, texts: &[&str]) {
        for text in texts {
            assert_eq!(self.follow(constraint, text), (text.len(), true), "{text} under {constraint:?}");
        }
    }

    #[track_caller]
    fn stops(&self, constraint: &Constraint, texts: &[&str]) {
        for text in texts {
            assert_ne!(self.follow(constraint, text), (text.len(), true), "{text} under {constraint:?}");
        }
    }

    #[track_caller]
    fn refuses(&self, constraint: Constraint, field: &str, reason: &str) {
        match self.guide(&constraint, vec![]) {
            Ok(_) => panic!("{constraint:?} compiles"),
            Err(Refused::Invalid { field: got, reason: why }) => {
                assert!(got == field && why.contains(reason), "{got}: {why}");
                assert!(why.len() < 1_000 && !why.contains("backtrace"), "{why}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

fn allows(mask: &super::guide::Mask, id: u32) -> bool {
    mask.bits()[id as usize / 32] >> (id % 32) & 1 == 1
}

fn schema(schema: serde_json::Value) -> Constraint {
    Constraint::JsonSchema(schema.to_string())
}

#[test]
fn a_schema_lets_through_what_is_valid_under_it() {
    let bench = Bench::new(ToolFormat::Object);
    let person = schema(json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 18}},
        "required": ["name"],
        "additionalProperties": false,
    }));
    bench.takes(&person, &[r#"{"name":"Ann"}"#, r#"{"name": "Ann", "age": 20}"#, "{\n  \"name\": \"é\"\n}"]);
    bench.stops(
        &person,
        &[
            r#"{"name":"Ann""#,
            r#"{"name":"Antonia"}"#,
            r#"{"name":"Ann","age":17}"#,
            r#"{"name":"Ann","city":"x"}"#,
            r#"{"name":"Ann"} "#,
            "{  \"name\":\"Ann\"}",
            "",
        ],
    );
    bench.takes(&Constraint::JsonObject, &["{}", r#"{"a": [1, {"b": null}]}"#]);
    bench.stops(&Constraint::JsonObject, &["[]", "1", "{", "{}{}"]);
}

/// llguidance would take each of the texts that are stopped here.
#[test]
fn keys_in_disguise_are_stopped() {
    let bench = Bench::new(ToolFormat::Object);
    let open = schema(
        json!({"anyOf": [{"required": ["a"]}, {}], "properties": {"a": {"type": "integer"}}, "type": "object"}),
    );
    bench.takes(&open, &["{}", r#"{"a":1}"#, r#"{"a":1,"b":"x","ab":[1]}"#, r#"{"b c":{"a":"x"}}"#]);
    bench.stops(
        &open,
        &[r#"{"a":"x"}"#, r#"{"\u0061":"x"}"#, r#"{"a":1,"\u0061":"x"}"#, r#"{"a":1,"a":"x"}"#],
    );
    let typed = schema(json!({
        "type": "object",
        "properties": {"a": {"type": "integer"}, "name": {"type": "null"}},
        "additionalProperties": {"type": "string"},
        "required": ["a"],
    }));
    bench.takes(&typed, &[r#"{"a":1}"#, r#"{"a":1,"name":null,"b":"x","names":"y"}"#]);
    bench.stops(
        &typed,
        &[r#"{"a":1,"b":2}"#, r#"{"a":1,"name":"x"}"#, r#"{"a":1,"\u0061":"x"}"#, r#"{"b":"x"}"#],
    );
    let both = schema(json!({"allOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
    ]}));
    bench.takes(&both, &[r#"{"a":1,"b":2}"#, r#"{"a":1,"b":2,"c":"x"}"#]);
    bench.stops(&both, &[r#"{"a":1}"#, r#"{"a":1,"b":2,"\u0062":"x"}"#]);
    let by_pattern = schema(json!({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}));
    bench.takes(&by_pattern, &["{}", r#"{"ab":1}"#]);
    bench.stops(&by_pattern, &[r#"{"ab":"x"}"#, r#"{"\u0061b":"x"}"#]);
}

/// A grammar that has not begun when the wait is over may be asked for again; one that has is refused.
#[test]
fn only_a_grammar_that_takes_long_itself_is_at_fault() {
    let tokenizer = tokenizer();
    let limits = ConstraintLimits { compile_wait_max: Duration::from_millis(1), ..limits() };
    let grammars = Grammars::start(&tokenizer, &[END], None, limits).expect("a thread starts");
    let slow = || Constraint::Lark(format!("start: {}", "\"a\" ".repeat(60_000)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let (first, second) = runtime.block_on(async {
        let first = grammars.plan(slow(), vec![]).await;
        (first, grammars.plan(Constraint::JsonObject, vec![]).await)
    });
    let Err(first) = first else { panic!("it takes longer") };
    assert!(matches!(&first, Refused::Invalid { reason, .. } if reason.contains("within 1 ms")), "{first}");
    assert_eq!(second.err(), Some(Refused::Busy));
}

#[test]
fn patterns_and_grammars() {
    let bench = Bench::new(ToolFormat::Object);
    let code = Constraint::Regex("[A-Z]{2}-[0-9]{1,3}".into());
    bench.takes(&code, &["AB-1", "XY-123"]);
    bench.stops(&code, &["A-1", "AB-1234", "AB-", "ab-1"]);
    let sum = Constraint::Lark("start: N (\" + \" N)*\nN: /[0-9]+/".into());
    bench.takes(&sum, &["1", "1 + 22 + 3"]);
    bench.stops(&sum, &["1 +", "1+2", "a"]);
}

fn weather(strict: bool) -> serde_json::Value {
    json!({"type": "function", "function": {
        "name": "get_weather",
        "strict": strict,
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
        },
    }})
}

fn calls(tools: serde_json::Value, choice: ToolChoice, single: bool) -> Constraint {
    Constraint::ToolCalls(ToolCalls { tools_json: tools.to_string(), choice, single })
}

#[test]
fn tool_calls_as_an_object() {
    let bench = Bench::new(ToolFormat::Object);
    let tools = json!([weather(false), {"type": "function", "function": {"name": "now"}}]);
    let oslo = r#"{"tool": "get_weather", "arguments": {"city": "Oslo"}}"#;
    let now = r#"{"tool": "now", "arguments": {}}"#;
    let bad = r#"{"tool": "get_weather", "arguments": {"city": "Bonn"}}"#;
    bench.takes(&calls(tools.clone(), ToolChoice::Required, true), &[oslo, now]);
    bench.stops(&calls(tools.clone(), ToolChoice::Required, true), &[bad, "", "Hello", r#"{"tool": "x""#]);
    bench.takes(&calls(tools.clone(), ToolChoice::Auto, true), &[oslo, now, "", "Hello {you}."]);
    bench.stops(&calls(tools.clone(), ToolChoice::Auto, true), &[bad, "{", &format!("{oslo} and")]);
    let named = calls(tools, ToolChoice::Named("now".into()), true);
    bench.takes(&named, &[now]);
    bench.stops(&named, &[oslo]);
}

#[test]
fn tool_calls_as_a_block() {
    let bench = Bench::new(ToolFormat::Block);
    let oslo = "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n";
    let one = format!("<tool_calls>\n{oslo}</tool_calls>");
    let two = format!("<tool_calls>\n{oslo}{oslo}</tool_calls>");
    let after_text = format!("I look. 1 < 2.\n{one}");
    let tools = json!([weather(true)]);
    let required = calls(tools.clone(), ToolChoice::Required, false);
    bench.takes(&required, &[&one, &two]);
    bench.stops(&required, &[&after_text, "", "Hello", "<tool_calls>\n</tool_calls>"]);
    let auto = calls(tools.clone(), ToolChoice::Auto, false);
    bench.takes(&auto, &[&one, &two, &after_text, "", "Hello <tool", "a\n"]);
    bench.stops(&auto, &["<tool_calls>", "<tool_calls>\n", &format!("{one} and")]);
    bench.stops(&calls(tools, ToolChoice::Auto, true), &[&two]);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let bench = Bench::new(ToolFormat::Object);
    let field = "constraint.json_schema";
    bench.refuses(Constraint::JsonSchema("{".into()), field, "JSON");
    bench.refuses(Constraint::JsonSchema("[]".into()), field, "object");
    bench.refuses(schema(json!({"type": "object", "x-guidance": {}})), field, "x-guidance");
    bench.refuses(schema(json!({"type": "strnig"})), field, "strnig");
    bench.refuses(schema(json!({"type": "string", "format": "moon-phase"})), field, "moon-phase");
    bench.refuses(schema(json!({"if": {"type": "string"}, "then": {}})), field, "if");
    bench.refuses(schema(json!({"$ref": "https://example.com/x.json"})), field, "");
    bench.refuses(schema(json!({"$ref": "#/$defs/nowhere"})), field, "nowhere");
    bench.refuses(schema(json!({"type": "integer", "minimum": 5, "maximum": 4})), field, "");
    bench.refuses(Constraint::JsonSchema(" ".repeat(257 << 10)), field, "at most 262144");
    bench.refuses(Constraint::Regex("a(".into()), "constraint.regex", "");
    bench.refuses(Constraint::Regex("(?=a)b".into()), "constraint.regex", "");
    bench.refuses(Constraint::Regex("abc\\".into()), "constraint.regex", "regular expression");
    bench.refuses(schema(json!({"items": {"multipleOf": 9_999_991}})), field, "/items/multipleOf");
    bench.refuses(Constraint::Lark("start: nowhere".into()), "constraint.lark", "nowhere");
    bench.refuses(Constraint::Lark("".into()), "constraint.lark", "");

    let tools = |tools| calls(tools, ToolChoice::Auto, true);
    let field = "constraint.tool_calls.tools_json";
    bench.refuses(tools(json!([])), field, "at least one");
    bench.refuses(tools(json!([{"function": {"name": "a b"}}])), &format!("{field}[0].function.name"), "a-z");
    bench.refuses(
        tools(json!([weather(true), weather(true)])),
        &format!("{field}[1].function.name"),
        "twice",
    );
    let odd = |strict: bool| json!([{"function": {"name": "a", "strict": strict, "parameters": {"if": {}, "x": 1}}}]);
    bench.refuses(tools(odd(true)), &format!("{field}[0].function.parameters"), "if");
    bench.takes(&calls(odd(false), ToolChoice::Required, true), &[r#"{"tool": "a", "arguments": {"b": 2}}"#]);
    let named = calls(json!([weather(true)]), ToolChoice::Named("nobody".into()), true);
    bench.refuses(named, "constraint.tool_calls.tool_name", "declared");
}

/// Each is refused or compiled, in time and without exhausting a stack. How, is llguidance's business.
#[test]
fn hostile_sources_do_no_harm() {
    let bench = Bench::new(ToolFormat::Object);
    let deep =
        |open: &str, close: &str, depth: usize| format!("{}1{}", open.repeat(depth), close.repeat(depth));
    let wide: Vec<_> =
        (0..4_000).map(|n| json!({"type": "string", "pattern": format!("^[a-z]{{{n}}}x$")})).collect();
    let chain: String = (0..9_000).map(|n| format!("A{n}: \"a\" A{} | \"b\"\n", n + 1)).collect();
    let rules: String = (0..9_000).map(|n| format!("r{n}: \"a\" r{} | \"b\"\n", n + 1)).collect();
    let sources = [
        Constraint::JsonSchema(deep("{\"not\":", "}", 5_000)),
        Constraint::JsonSchema(deep("{\"properties\":{\"a\":", "}}", 60)),
        schema(json!({"$ref": "#"})),
        schema(
            json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
        ),
        schema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 100_000_000})),
        schema(
            json!({"type": "array", "minItems": 100_000, "items": {"type": "array", "minItems": 100_000}}),
        ),
        schema(json!({"anyOf": wide})),
        schema(
            json!({"anyOf": [{"multipleOf": 999}, {"multipleOf": 0.999}, {"multipleOf": 37}, {"multipleOf": 27}]}),
        ),
        schema(json!({"type": "array", "maxItems": 1_000_000_000_000_000_000u64, "minItems": 1_000_000})),
        schema(json!({"type": "string", "maxLength": 2_147_483_647})),
        schema(json!({"type": "number", "minimum": 1.234567e-300, "maximum": 1.7e308})),
        schema(json!({"type": "integer", "minimum": -1.7e308, "maximum": 1.7e308})),
        schema(json!({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"})),
        Constraint::Regex("(((a{1,500}){1,500}){1,500}){1,500}".into()),
        Constraint::Regex(deep("(", ")", 90)),
        Constraint::Regex(deep("(", ")", 20_000)),
        Constraint::Regex("(.*a){40}.{40}".into()),
        Constraint::Regex("a|".repeat(20_000)),
        Constraint::Lark(deep("start: (", ")", 90)),
        Constraint::Lark(format!("start: {}", deep("(", ")", 20_000))),
        Constraint::Lark(format!("start: A0\n{chain}A9000: \"c\"\n")),
        Constraint::Lark(format!("start: r0\n{rules}r9000: \"c\"\n")),
        Constraint::Lark("start: start start | \"a\" |".into()),
        Constraint::Lark("start: start".into()),
        Constraint::Lark("start: \"a\"{1000000000}".into()),
    ];
    for source in sources {
        let name: String = format!("{source:?}").chars().take(80).collect();
        let begun = std::time::Instant::now();
        match bench.guide(&source, vec![]) {
            Err(error) => println!("{:?} {name} -> {error}", begun.elapsed()),
            Ok(guide) => {
                println!("{:?} {name} -> compiled", begun.elapsed());
                // With as much stack as the engine's thread has.
                let walk = std::thread::Builder::new().stack_size(64 << 20).spawn(move || wander(guide));
                walk.expect("a thread").join().expect("no panic");
            }
        }
    }
}

/// Goes on by the first token allowed, twenty times.
fn wander(mut guide: Guide) {
    for _ in 0..20 {
        if guide.is_complete() {
            return;
        }
        let Ok(mask) = guide.mask() else { return };
        let id = (0..4096).filter(|&id| id != END).find(|&id| allows(mask, id)).unwrap_or(END);
        if guide.consume(id).is_err() {
            return;
        }
    }
}

#[test]
fn replayed_tokens_lead_to_the_same_place() {
    let bench = Bench::new(ToolFormat::Object);
    let constraint = schema(json!({"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3}));
    let ids = bench.tokenizer.encode_text(r#"["red","green","red"]"#).expect("it encodes");
    for cut in 0..=ids.len() {
        let mut walked = bench.guide(&constraint, vec![]).expect("it compiles");
        for &id in &ids[..cut] {
            assert!(allows(walked.mask().expect("a mask"), id));
            walked.consume(id).expect("allowed");
        }
        let mut resumed = bench.guide(&constraint, ids[..cut].to_vec()).expect("it resumes");
        assert_eq!(resumed.is_complete(), walked.is_complete());
        if cut < ids.len() {
            assert_eq!(resumed.mask().expect("a mask").bits(), walked.mask().expect("a mask").bits());
        }
    }
    let error = bench.guide(&constraint, vec![ids[0], ids[0]]).err().expect("it is refused");
    assert!(matches!(error, Refused::Invalid { field, .. } if field == "resume_ids[1]"));
}
