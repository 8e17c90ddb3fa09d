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
        compile_given_up_max: 1,
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
    let limits =
        ConstraintLimits { compile_wait_max: Duration::from_millis(1), compile_given_up_max: 0, ..limits() };
    let grammars = Grammars::start(&tokenizer, &[END], None, limits).expect("a thread starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let (first, second) = runtime.block_on(async {
        let first = grammars.plan(slow(), vec![]).await;
        (first, grammars.plan(Constraint::JsonObject, vec![]).await)
    });
    let Err(first) = first else { panic!("it takes longer") };
    assert!(matches!(&first, Refused::Invalid { reason, .. } if reason.contains("within 1 ms")), "{first}");
    assert_eq!(second.err(), Some(Refused::Busy));
}

/// A grammar that takes long, whatever the machine.
fn slow() -> Constraint {
    let rules: String = (0..9_000).map(|n| format!("r{n}: \"a\" r{} | \"b\"\n", n + 1)).collect();
    Constraint::Lark(format!("start: r0\n{rules}r9000: \"c\"\n"))
}

#[test]
fn a_thread_that_overran_its_time_is_replaced_while_few_are() {
    let tokenizer = tokenizer();
    let limits = ConstraintLimits { compile_wait_max: Duration::from_millis(1), ..limits() };
    let grammars = Grammars::start(&tokenizer, &[END], None, limits).expect("a thread starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        // Two of them: the one thread, and the one that takes its place.
        for _ in 0..2 {
            // A thread that has only just been started may not have taken it up in time.
            let outcome = loop {
                match grammars.plan(slow(), vec![]).await {
                    Ok(_) => panic!("it takes longer"),
                    Err(Refused::Busy) => tokio::time::sleep(Duration::from_millis(1)).await,
                    Err(outcome) => break outcome,
                }
            };
            assert!(
                matches!(&outcome, Refused::Invalid { reason, .. } if reason.contains("within")),
                "{outcome}"
            );
        }
        assert_eq!(grammars.given_up(), 1);
        let third = grammars.plan(Constraint::JsonObject, vec![]).await.err();
        assert_eq!((third, grammars.given_up()), (Some(Refused::Busy), 1), "no more may be given up");
        // It ends on its own, and may be missed again.
        while grammars.given_up() > 0 {
            std::thread::yield_now();
        }
    });
}

/// Through all ways into a schema: refused for what it says, not for the time it took.
#[test]
fn patterns_that_multiply_are_refused_before_anybody_compiles_them() {
    let bench = Bench::new(ToolFormat::Object);
    let letter = |n: u8| char::from(b'a' + n);
    let parts: Vec<_> = (0..24u8)
        .map(|n| json!({"pattern": format!(".*{}.{{{}}}{}", letter(n), 30 + n, letter(n + 1))}))
        .collect();
    let string = json!({"type": "string", "allOf": parts});
    let object = json!({"type": "object", "properties": {"x": string}, "required": ["x"]});
    let field = "constraint.json_schema";
    for schema_value in [
        string.clone(),
        object.clone(),
        json!({"type": "array", "items": string}),
        json!({"type": "object", "patternProperties": {"^a": string}, "additionalProperties": false}),
        json!({"$ref": "#/$defs/x", "$defs": {"x": string}}),
        json!({"anyOf": [{"type": "null"}, string]}),
    ] {
        bench.refuses(schema(schema_value), field, "join them into one");
    }
    let strict = json!([{"function": {"name": "f", "strict": true, "parameters": object}}]);
    let at = "constraint.tool_calls.tools_json[0].function.parameters";
    bench.refuses(calls(strict, ToolChoice::Required, true), at, "join them into one");
    let lenient = json!([{"function": {"name": "f", "parameters": object}}]);
    bench.takes(&calls(lenient, ToolChoice::Required, true), &[r#"{"tool": "f", "arguments": {"x": 1}}"#]);
    let operands: Vec<String> = (0..12u8).map(|n| format!("/.*{}.{{{}}}x/", letter(n), 30 + n)).collect();
    bench.refuses(
        Constraint::Lark(format!("start: A\nA: {}", operands.join(" & "))),
        "constraint.lark",
        "of &",
    );
    // As many as may meet cost no more than their limits.
    for count in [2, 3] {
        let two = json!({"type": "string", "allOf": parts[..2], "minLength": 5, "maxLength": 900});
        let intersection = Constraint::Lark(format!("start: A\nA: {}", operands[..count].join(" & ")));
        for source in [schema(two), intersection] {
            let begun = std::time::Instant::now();
            let outcome = bench.guide(&source, vec![]).map(wander);
            println!("{:?} {outcome:?}", begun.elapsed());
        }
    }
}

#[test]
fn a_grammar_has_no_way_past_the_checks_of_a_schema() {
    let bench = Bench::new(ToolFormat::Object);
    let lark = |text: &str| Constraint::Lark(text.into());
    let field = "constraint.lark";
    bench.refuses(lark("start: %json {\"multipleOf\":99999999,\"type\":\"integer\"}"), field, "%json");
    bench.refuses(lark("start: %lark { start: %json {\"type\":\"null\"} }"), field, "%json");
    bench.refuses(lark("%llguidance {\"no_forcing\":true}\nstart: /a/"), field, "%llguidance");
    bench.takes(&lark("start: \"\\x25json \\x26 co\""), &["%json & co"]);
}

#[test]
fn bounds_let_through_no_more_than_they_say() {
    let bench = Bench::new(ToolFormat::Object);
    let number = |bounds: serde_json::Value| {
        let mut schema = json!({"type": "number"});
        schema.as_object_mut().expect("an object").extend(bounds.as_object().expect("an object").clone());
        schema
    };
    for (bounds, takes, stops) in [
        (
            json!({"exclusiveMinimum": 0, "maximum": 0.5}),
            vec!["0.5", "0.001"],
            vec!["0", "0.0", "0.51", "-0.1"],
        ),
        (json!({"minimum": -0.5, "exclusiveMaximum": 0}), vec!["-0.5", "-0.001"], vec!["0", "-0", "-0.0"]),
        (
            json!({"exclusiveMinimum": 100, "exclusiveMaximum": 100.5}),
            vec!["100.4"],
            vec!["100", "100.0", "100.5"],
        ),
        (json!({"allOf": [{"exclusiveMinimum": 5}, {"maximum": 5.5}]}), vec!["5.1"], vec!["5", "5.0"]),
        (json!({"exclusiveMinimum": -1}), vec!["-0.9", "7"], vec!["-1", "-1.0"]),
    ] {
        let constraint = schema(number(bounds));
        bench.takes(&constraint, &takes);
        bench.stops(&constraint, &stops);
    }
    let integer = schema(json!({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}));
    bench.takes(&integer, &["1", "2"]);
    bench.stops(&integer, &["0", "3"]);
}

/// The judge shares no code with what enforces the bounds.
#[test]
fn of_all_pairs_of_bounds_none_lets_an_invalid_number_through() {
    let bench = Bench::new(ToolFormat::Object);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let (mut schemas, mut taken) = (Vec::new(), 0);
    for low in [0.0, 1.0, 5.0, -5.0, 0.5, 100.0, -0.5] {
        for width in [0.001, 0.5, 1.0, 10.0] {
            for (least, most) in [
                ("minimum", "maximum"),
                ("minimum", "exclusiveMaximum"),
                ("exclusiveMinimum", "maximum"),
                ("exclusiveMinimum", "exclusiveMaximum"),
            ] {
                for kind in ["number", "integer"] {
                    let high = low + width;
                    let near =
                        [low, high, low + width / 2.0, low - 1e-4, high + 1e-4, high - 1e-4, low + 1e-4];
                    schemas.push((json!({"type": kind, least: low, most: high}), near));
                }
            }
        }
    }
    for (value, near) in schemas {
        let judge = jsonschema::validator_for(&value).expect("a schema");
        // Some hold no number.
        let Ok(plan) = runtime.block_on(bench.grammars.plan(schema(value.clone()), vec![])) else { continue };
        let texts = near
            .iter()
            .chain(&[0.0, 1.0, -1.0])
            .flat_map(|n| [format!("{n}"), format!("{n}.0"), format!("-{n}")]);
        for text in texts.filter(|text| serde_json::from_str::<f64>(text).is_ok()) {
            let mut guide = Guide::new(plan.clone());
            let ids = bench.tokenizer.encode_text(&text).expect("it encodes");
            let fits = ids.iter().all(|&id| {
                !guide.is_complete() && allows(guide.mask().expect("a mask"), id) && guide.consume(id).is_ok()
            });
            if fits && (guide.is_complete() || allows(guide.mask().expect("a mask"), END)) {
                let number: serde_json::Value = serde_json::from_str(&text).expect("a number");
                assert!(judge.is_valid(&number), "{text} under {value}");
                taken += 1;
            }
        }
    }
    assert!(taken > 200, "{taken}");
}

#[test]
fn numbers_beyond_a_double_are_exact_or_refused() {
    let bench = Bench::new(ToolFormat::Object);
    let field = "constraint.json_schema";
    bench.refuses(schema(json!({"const": 9_007_199_254_740_993u64})), field, "/const holds a number");
    bench.refuses(
        Constraint::JsonSchema(r#"{"enum": [1, [18446744073709551616]]}"#.into()),
        field,
        "/enum holds",
    );
    let at =
        json!({"type": "integer", "minimum": 9_007_199_254_740_993u64, "maximum": 9_007_199_254_740_993u64});
    bench.refuses(schema(at), field, "/minimum must be within");
    bench.refuses(schema(json!({"type": "integer", "minimum": 1e19})), field, "/minimum must be within");
    bench.refuses(schema(json!({"type": "integer", "maximum": -1e30})), field, "/maximum must be within");
    let largest = "9007199254740991";
    bench.takes(&Constraint::JsonSchema(format!("{{\"const\": {largest}}}")), &[largest]);
    let wide = schema(json!({"type": "integer", "minimum": 5, "maximum": i64::MAX}));
    bench.takes(&wide, &["5", largest]);
    bench.stops(&wide, &["4"]);
}

#[test]
fn references_are_followed_through_names_that_need_escapes() {
    let bench = Bench::new(ToolFormat::Object);
    let by_escapes = json!({"$ref": "#/definitions/a~0b%20c", "definitions": {"a~b c": {"enum": ["x"]}}});
    bench.takes(&schema(by_escapes.clone()), &[r#""x""#]);
    bench.stops(&schema(by_escapes), &["1", r#""y""#]);
}

#[test]
fn a_wide_object_is_followed() {
    let bench = Bench::new(ToolFormat::Object);
    let properties: serde_json::Map<_, _> =
        (0..600).map(|n| (format!("property_{n}"), json!({"type": "integer"}))).collect();
    let wide = schema(json!({"type": "object", "properties": properties}));
    bench.takes(&wide, &["{}", r#"{"property_0":1,"property_599":2,"other":3}"#]);
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
    bench.refuses(
        schema(json!({"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]})),
        field,
        "write anyOf",
    );
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
