//! What of a JSON schema can be enforced, decided before llguidance reads it.
//!
//! llguidance skips keywords that it does not know, follows references into anything, builds automata of any size for
//! `multipleOf`, counts a repeated key twice and lets an additional key spell a declared name with escapes. Here a
//! schema is walked once: what cannot be enforced is refused with its place, the rest is rewritten to mean the same.
//!
//! ```text
//! {"properties": {"a": A}}  -->  {"properties": {"a": A}, "patternProperties": {PLAIN_NAME: true},
//!                                 "additionalProperties": false}
//! ```

use super::{numbers, patterns};
use regex_syntax::ast::parse::Parser;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};

/// A divisor has an automaton of about as many states, which llguidance builds without counting its fuel.
const DIVISOR_MAX: u64 = 1_000;
/// Divisors meet where schemas are intersected or are alternatives: a state is then a remainder by all of them.
const DIVISORS_TOGETHER_MAX: u128 = 10_000;
const DIVISOR_DECIMALS_MAX: u32 = 6;
/// Of characters, items and properties: no output is longer, and one that has to be would never end.
const LEAST_MAX: u64 = 1_000_000;
/// A pattern that leaves out names nests as deep as they are long.
const NAME_CHARS_MAX: usize = 64;

/// A character that JSON writes in one way only.
const PLAIN: &str = r#"[^"\\\x00-\x1F\x7F]"#;

/// Refused, in words that begin with a place: a JSON pointer.
pub(super) fn enforceable(schema: &Value) -> Result<Value, String> {
    let mut walk = Walk::default();
    let rewritten = walk.schema(schema, "")?;
    patterns::check(schema)?;
    for (at, target) in &walk.references {
        if !walk.places.contains(target) {
            return Err(refusal(at, &format!("leads to no schema within this one: {target}")));
        }
    }
    match divisor_of_all(&walk.divisors) {
        divisor if divisor > DIVISORS_TOGETHER_MAX => {
            let at = walk.divisors.last().map_or("", |divisor| &divisor.at);
            Err(refusal(at, "has no small common multiple with the others"))
        }
        _ => Ok(rewritten),
    }
}

/// What is wrong with a regular expression; llguidance alone knows which valid ones it takes.
pub(super) fn check_pattern(pattern: &str) -> Result<(), String> {
    match Parser::new().parse(pattern) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("is no regular expression: {}", error.kind())),
    }
}

#[derive(Default)]
struct Walk {
    /// Pointers to all that is a schema: what a reference may lead to.
    places: HashSet<String>,
    /// From where, to which pointer.
    references: Vec<(String, String)>,
    divisors: Vec<Divisor>,
}

/// coefficient * 10^-decimals
struct Divisor {
    at: String,
    coefficient: u64,
    decimals: u32,
}

impl Walk {
    fn schema(&mut self, schema: &Value, path: &str) -> Result<Value, String> {
        self.places.insert(path.to_owned());
        let keywords = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(keywords) => keywords,
            _ => return Err(refusal(path, "must be a schema: an object or a boolean")),
        };
        let mut kept = Map::new();
        for (keyword, value) in keywords {
            if let Some(value) = self.keyword(keyword, value, path)? {
                kept.insert(keyword.clone(), value);
            }
        }
        numbers::rewrite_bounds(&mut kept)
            .map_err(|(keyword, reason)| refusal(&join(path, keyword), &reason))?;
        self.object(kept, path).map(Value::Object)
    }

    /// `None` for what only describes: a reference into it would find a schema that nobody checked.
    fn keyword(&mut self, keyword: &str, value: &Value, path: &str) -> Result<Option<Value>, String> {
        let at = join(path, keyword);
        Ok(Some(match keyword {
            "title" | "description" | "default" | "examples" | "deprecated" | "readOnly" | "writeOnly"
            | "$comment" => return Ok(None),
            _ if keyword.starts_with("x-") => return Ok(None),
            // It names the document, or moves what references are relative to.
            "$id" if path.is_empty() => return Ok(None),
            "$id" => return Err(refusal(&at, "is taken at the root only")),
            "properties" | "patternProperties" | "$defs" | "definitions" => {
                self.named_schemas(keyword, value, &at)?
            }
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => self.schemas(value, &at)?,
            "items" if value.is_array() => self.schemas(value, &at)?,
            "items" | "additionalItems" | "additionalProperties" => self.schema(value, &at)?,
            "$ref" => self.reference(value, at)?,
            "multipleOf" => self.divisor(value, at)?,
            "minLength" | "minItems" | "minProperties" if value.as_u64() > Some(LEAST_MAX) => {
                return Err(refusal(&at, &format!("must be at most {LEAST_MAX}")));
            }
            "pattern" => {
                check_pattern(value.as_str().unwrap_or_default()).map_err(|reason| refusal(&at, &reason))?;
                value.clone()
            }
            "const" | "enum" if !numbers::is_exact(value) => return Err(refusal(&at, &numbers::inexact())),
            "$schema" | "$anchor" | "const" | "enum" | "type" | "required" | "format" | "minLength"
            | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" | "minimum"
            | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => value.clone(),
            _ => return Err(refusal(&at, "is a keyword that is not taken")),
        }))
    }

    fn named_schemas(&mut self, keyword: &str, value: &Value, at: &str) -> Result<Value, String> {
        let named = value.as_object().ok_or_else(|| refusal(at, "must be an object of schemas"))?;
        let mut kept = Map::new();
        for (name, schema) in named {
            let at = join(at, name);
            if keyword == "patternProperties" {
                check_pattern(name).map_err(|reason| refusal(&at, &reason))?;
            }
            kept.insert(name.clone(), self.schema(schema, &at)?);
        }
        Ok(Value::Object(kept))
    }

    fn schemas(&mut self, value: &Value, at: &str) -> Result<Value, String> {
        let schemas = value.as_array().ok_or_else(|| refusal(at, "must be an array of schemas"))?;
        let schemas = schemas.iter().enumerate();
        schemas.map(|(index, schema)| self.schema(schema, &join(at, &index.to_string()))).collect()
    }

    fn reference(&mut self, value: &Value, at: String) -> Result<Value, String> {
        let Some(fragment) = value.as_str().and_then(|reference| reference.strip_prefix('#')) else {
            return Err(refusal(&at, "must lead to a schema within this one, and begin with #"));
        };
        // Any other fragment is the name of an anchor, which llguidance looks for among schemas only.
        if !fragment.is_empty() && !fragment.starts_with('/') {
            return Ok(value.clone());
        }
        let pointer = percent_decoded(fragment);
        // llguidance takes names as they stand between the slashes.
        let names: Vec<String> =
            pointer.split('/').map(|name| name.replace("~1", "/").replace("~0", "~")).collect();
        if names.iter().any(|name| name.contains('/')) {
            return Err(refusal(&at, "leads through a name with a slash, which is not taken: rename it"));
        }
        self.references.push((at, pointer));
        Ok(format!("#{}", names.join("/")).into())
    }

    fn divisor(&mut self, value: &Value, at: String) -> Result<Value, String> {
        let reason = format!(
            "must be above 0, and at most {DIVISOR_MAX} without its decimal point, of at most \
             {DIVISOR_DECIMALS_MAX} decimals"
        );
        // Scaled as llguidance scales it, so that what is checked is what is built.
        let mut scaled =
            value.as_f64().filter(|number| *number > 0.0).ok_or_else(|| refusal(&at, &reason))?;
        let mut decimals = 0;
        while scaled.fract() != 0.0 && decimals < DIVISOR_DECIMALS_MAX {
            scaled *= 10.0;
            decimals += 1;
        }
        if scaled.fract() != 0.0 || scaled > DIVISOR_MAX as f64 {
            return Err(refusal(&at, &reason));
        }
        self.divisors.push(Divisor { at, coefficient: scaled as u64, decimals });
        Ok(value.clone())
    }

    /// Closes an object against the keys that llguidance would let through in disguise.
    fn object(&self, mut schema: Map<String, Value>, path: &str) -> Result<Map<String, Value>, String> {
        let members =
            |keyword: &str| schema.get(keyword).and_then(Value::as_object).filter(|of| !of.is_empty());
        let additional = schema.get("additionalProperties").cloned();
        let is_closed = additional == Some(Value::Bool(false));
        let has_patterns = members("patternProperties").is_some();
        self.check_least_properties(&schema, is_closed && !has_patterns, path)?;
        let declared = members("properties");
        let (pattern, of_others) = match (declared, additional) {
            _ if is_closed => return Ok(schema),
            (_, Some(_)) if has_patterns => {
                let at = join(path, "additionalProperties");
                return Err(refusal(&at, "must be false beside patternProperties"));
            }
            (_, None) if has_patterns => {
                // Their complement is no pattern. Fewer keys than the schema allows are valid under it.
                schema.insert("additionalProperties".to_owned(), Value::Bool(false));
                return Ok(applicators_last(schema));
            }
            (None, _) => return Ok(schema),
            (Some(_), None | Some(Value::Bool(true))) => (format!("^{PLAIN}*$"), Value::Bool(true)),
            // A declared property that matched would have to be valid under this schema too.
            (Some(declared), Some(of_others)) => (names_except(declared, path)?, of_others),
        };
        schema.insert("patternProperties".to_owned(), json!({ pattern: of_others }));
        schema.insert("additionalProperties".to_owned(), Value::Bool(false));
        Ok(applicators_last(schema))
    }

    /// Keys that no name is fixed for may repeat, and llguidance counts each: then only required ones are sure to
    /// differ.
    fn check_least_properties(
        &self,
        schema: &Map<String, Value>,
        is_fixed: bool,
        path: &str,
    ) -> Result<(), String> {
        let least = schema.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
        let required = schema.get("required").and_then(Value::as_array);
        let required: HashSet<&str> = required.into_iter().flatten().filter_map(Value::as_str).collect();
        if is_fixed || least <= required.len().max(1) as u64 {
            return Ok(());
        }
        let reason = "must be at most the number of required properties where others may have any name";
        Err(refusal(&join(path, "minProperties"), reason))
    }
}

/// llguidance compiles the keywords before an applicator apart from those behind it, though those of an object belong
/// together.
fn applicators_last(schema: Map<String, Value>) -> Map<String, Value> {
    const APPLICATORS: [&str; 6] = ["const", "enum", "allOf", "anyOf", "oneOf", "$ref"];
    let (applicators, mut others): (Map<_, _>, Map<_, _>) =
        schema.into_iter().partition(|(keyword, _)| APPLICATORS.contains(&keyword.as_str()));
    others.extend(applicators);
    others
}

#[derive(Default)]
struct Names {
    ends: bool,
    next: BTreeMap<char, Names>,
}

/// A pattern of the names other than these.
fn names_except(declared: &Map<String, Value>, path: &str) -> Result<String, String> {
    let mut names = Names::default();
    for name in declared.keys() {
        if name.chars().count() > NAME_CHARS_MAX {
            let reason =
                format!("must be a boolean where a declared name has over {NAME_CHARS_MAX} characters");
            return Err(refusal(&join(path, "additionalProperties"), &reason));
        }
        name.chars().fold(&mut names, |at, char| at.next.entry(char).or_default()).ends = true;
    }
    Ok(format!("^{}$", names.others()))
}

impl Names {
    fn others(&self) -> String {
        let first: String = self.next.keys().map(|char| regex_syntax::escape(&char.to_string())).collect();
        let mut options = vec![format!("{}{first}]{PLAIN}*", PLAIN.trim_end_matches(']'))];
        options.extend(
            self.next
                .iter()
                // Such a name is never matched: it needs an escape.
                .filter(|(char, _)| !matches!(char, '"' | '\\' | '\0'..='\x1F' | '\x7F'))
                .map(|(char, rest)| format!("{}{}", regex_syntax::escape(&char.to_string()), rest.others())),
        );
        let options = options.join("|");
        if self.ends { format!("(?:{options})") } else { format!("(?:{options})?") }
    }
}

/// The least common multiple, scaled to an integer.
fn divisor_of_all(divisors: &[Divisor]) -> u128 {
    let decimals = divisors.iter().map(|divisor| divisor.decimals).max().unwrap_or(0);
    let mut multiple = 1u128;
    for divisor in divisors {
        let scaled = u128::from(divisor.coefficient) * 10u128.pow(decimals - divisor.decimals);
        multiple = multiple / greatest_common_divisor(multiple, scaled) * scaled;
        // Far above the limit even without its zeros, and far below what overflows.
        if multiple > DIVISORS_TOGETHER_MAX.pow(4) {
            return multiple;
        }
    }
    // As llguidance does, whole numbers are counted without the zeros of the scale.
    let mut zeros = decimals;
    while zeros > 0 && multiple.is_multiple_of(10) {
        multiple /= 10;
        zeros -= 1;
    }
    multiple
}

fn greatest_common_divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn join(path: &str, name: &str) -> String {
    format!("{path}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// A fragment as the pointer that it stands for; what is no UTF-8 leads nowhere.
pub(super) fn percent_decoded(fragment: &str) -> String {
    let mut parts = fragment.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => bytes.extend([&[byte], &part.as_bytes()[2..]].concat()),
            None => bytes.extend([b"%", part.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn refusal(at: &str, reason: &str) -> String {
    let at = if at.is_empty() { "the schema" } else { at };
    format!("{at} {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a schema is taken, or the words it is refused with.
    #[track_caller]
    fn check(schema: Value, expect: Result<(), &str>) {
        match (enforceable(&schema), expect) {
            (Ok(_), Ok(())) => {}
            (Err(reason), Err(words)) => assert!(reason.starts_with(words), "{schema}: {reason}"),
            (outcome, _) => panic!("{schema}: {outcome:?}"),
        }
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_at_its_place() {
        check(json!({"multipleOf": 1_000}), Ok(()));
        check(json!({"multipleOf": 0.25}), Ok(()));
        check(json!({"multipleOf": 1_001}), Err("/multipleOf must be above 0"));
        check(json!({"multipleOf": 0}), Err("/multipleOf"));
        check(json!({"multipleOf": 1e-300}), Err("/multipleOf"));
        check(json!({"multipleOf": 100.25}), Err("/multipleOf"));
        let huge = json!({"multipleOf": 9_999_991});
        check(json!({"properties": {"a/b": huge}}), Err("/properties/a~1b/multipleOf"));
        check(json!({"$defs": {"a": {"items": huge}}}), Err("/$defs/a/items/multipleOf"));
        check(json!({"items": [true, {"anyOf": [huge]}]}), Err("/items/1/anyOf/0/multipleOf"));
        check(json!({"additionalProperties": huge}), Err("/additionalProperties/multipleOf"));
        check(json!({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), Err("/allOf/1/multipleOf"));
        check(json!({"anyOf": [{"multipleOf": 0.01}, {"multipleOf": 5}, {"multipleOf": 0.25}]}), Ok(()));
        check(json!({"minLength": 1_000_001}), Err("/minLength must be at most 1000000"));

        check(json!({"maxLenght": 3}), Err("/maxLenght is a keyword that is not taken"));
        check(json!({"properties": {"a": {"nullable": true}}}), Err("/properties/a/nullable"));
        check(json!({"contentEncoding": "base64"}), Err("/contentEncoding"));
        check(json!({"title": "", "default": {"odd": 1}, "x-ours": {"odd": 1}, "$id": "a"}), Ok(()));
        check(json!({"enum": [{"odd": 1}], "const": {"odd": 1}}), Ok(()));
        check(json!({"properties": {"odd": true}, "$defs": {"odd": {}}}), Ok(()));
        check(json!({"items": {"$id": "a"}}), Err("/items/$id"));
        check(json!({"properties": {"a": 1}}), Err("/properties/a must be a schema"));

        check(json!({"$ref": "#/$defs/a%20b", "$defs": {"a b": {}}}), Ok(()));
        check(json!({"$ref": "#", "$anchor": "a"}), Ok(()));
        check(
            json!({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {}}}),
            Err("/$ref leads through a name with a slash"),
        );
        check(json!({"$ref": "#/x-ours", "x-ours": {"odd": 1}}), Err("/$ref leads to no schema"));
        check(json!({"items": {"$ref": "#/const"}, "const": {"odd": 1}}), Err("/items/$ref leads"));
        check(json!({"$ref": "https://example.com/a.json"}), Err("/$ref must lead"));

        check(json!({"pattern": "abc\\"}), Err("/pattern is no regular expression"));
        check(json!({"patternProperties": {"(": true}}), Err("/patternProperties/( is no regular"));

        check(json!({"minProperties": 1}), Ok(()));
        check(json!({"minProperties": 2}), Err("/minProperties must be"));
        check(json!({"minProperties": 2, "required": ["a", "a"]}), Err("/minProperties"));
        check(json!({"minProperties": 2, "required": ["a", "b"]}), Ok(()));
        check(json!({"minProperties": 2, "additionalProperties": false, "properties": {"a": true}}), Ok(()));
        let by_pattern =
            json!({"minProperties": 2, "additionalProperties": false, "patternProperties": {"b": true}});
        check(by_pattern, Err("/minProperties"));
        let mixed = json!({"patternProperties": {"b": true}, "additionalProperties": true});
        check(mixed, Err("/additionalProperties must be false"));
    }

    #[test]
    fn the_names_of_others_are_plain_and_not_declared() {
        let declared = json!({"a": 1, "ab": 1, "n-^]": 1, "\"": 1});
        let pattern = names_except(declared.as_object().expect("an object"), "").expect("a pattern");
        let names =
            jsonschema::validator_for(&json!({"type": "string", "pattern": pattern})).expect("a schema");
        for (name, is_other) in [
            ("a", false),
            ("ab", false),
            ("n-^]", false),
            ("\"", false),
            ("a\n", false),
            ("\\u0061", false),
            ("", true),
            ("b", true),
            ("abc", true),
            ("aa", true),
            ("n-", true),
            ("n-^]]", true),
        ] {
            assert_eq!(names.is_valid(&json!(name)), is_other, "{name:?} under {pattern}");
        }
    }
}
