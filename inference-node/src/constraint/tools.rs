//! Calls of declared tools, as a grammar in the format that the model's chat template teaches.
//!
//! ```text
//! Object   {"tool": "get_weather", "arguments": {"city": "Oslo"}}                   the whole answer, one call
//! Block    Let me look.<tool_calls>
//!          {"name": "get_weather", "arguments": {"city": "Oslo"}}
//!          </tool_calls>                                                            MiniMax: after text, one call a line
//! ```
//! What is around the arguments is fixed to the letter, so that whoever reads the calls needs no guesses; the arguments
//! conform to the tool's schema.

use super::compile::{Refused, invalid, with_options};
use super::schema::enforceable;
use serde_json::{Value, json};

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    Object,
    Block,
}

/// What precedes a call's name, in this format.
impl ToolFormat {
    pub fn before_name(self) -> &'static str {
        match self {
            ToolFormat::Object => r#"{"tool": ""#,
            ToolFormat::Block => r#"{"name": ""#,
        }
    }

    pub fn after_call(self) -> &'static str {
        match self {
            ToolFormat::Object => "}",
            ToolFormat::Block => "}\n",
        }
    }
}

pub const BEFORE_ARGUMENTS: &str = r#"", "arguments": "#;
pub const BLOCK_OPENS: &str = "<tool_calls>\n";
pub const BLOCK_CLOSES: &str = "</tool_calls>";

#[derive(Debug, Clone)]
pub struct ToolCalls {
    /// A JSON array in the OpenAI shape.
    pub tools_json: String,
    pub choice: ToolChoice,
    /// At most one call.
    pub single: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    Auto,
    Required,
    Named(String),
}

const TOOLS_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 64;

/// A tool, as far as a grammar needs to know it.
struct Tool {
    name: String,
    parameters: Value,
    /// Its schema is met to the letter or refused; of others it is met where it can be.
    strict: bool,
}

impl ToolCalls {
    /// In Lark. `compiles` tries a grammar.
    pub(super) fn grammar(
        &self,
        format: Option<ToolFormat>,
        compiles: impl Fn(String) -> Result<(), String>,
    ) -> Result<String, Refused> {
        let format = format.ok_or_else(|| {
            invalid("constraint.tool_calls", "this model's chat template teaches no way to call tools")
        })?;
        let mut rules = String::new();
        let mut names = Vec::new();
        for (index, tool) in self.tools()?.into_iter().enumerate() {
            if matches!(&self.choice, ToolChoice::Named(name) if *name != tool.name) {
                continue;
            }
            let field = format!("{FIELD}[{index}].function.parameters");
            let opens = lark_string(&format!("{}{}{BEFORE_ARGUMENTS}", format.before_name(), tool.name));
            let schema = tool.schema(&field, |schema| compiles(format!("start: %json {schema}")))?;
            let closes = lark_string(format.after_call());
            rules.push_str(&format!("call_{index}: {opens} arguments_{index} {closes}\n"));
            rules.push_str(&format!("arguments_{index}: %json {schema}\n"));
            names.push(format!("call_{index}"));
        }
        if names.is_empty() {
            return Err(invalid("constraint.tool_calls.tool_name", "is not the name of a declared tool"));
        }
        let call = format!("call: {}\n", names.join(" | "));
        Ok(format!("{}{call}{rules}", self.start(format)))
    }

    fn start(&self, format: ToolFormat) -> String {
        let may_talk = self.choice == ToolChoice::Auto;
        let many = if self.single { "call" } else { "call+" };
        match (format, may_talk) {
            (ToolFormat::Object, false) => "start: call\n".to_owned(),
            // What begins as a call does, is one.
            (ToolFormat::Object, true) => "start: TEXT | call |\nTEXT: /(?s:[^{].*)/\n".to_owned(),
            (ToolFormat::Block, false) => {
                let (opens, closes) = (lark_string(BLOCK_OPENS), lark_string(BLOCK_CLOSES));
                format!("start: {opens} {many} {closes}\n")
            }
            (ToolFormat::Block, true) => {
                let closes = lark_string(BLOCK_CLOSES);
                format!(
                    "start: TEXT | before {many} {closes} |\n\
                     TEXT: /(?s:.+)/ & ~/(?s:.*)<tool_calls>(?s:.*)/\n\
                     before[lazy]: /(?s:.*)<tool_calls>\\n/\n"
                )
            }
        }
    }

    fn tools(&self) -> Result<Vec<Tool>, Refused> {
        let tools: Value = serde_json::from_str(&self.tools_json)
            .map_err(|error| invalid(FIELD, format!("is not JSON: {error}")))?;
        let Some(tools) = tools.as_array().filter(|tools| !tools.is_empty()) else {
            return Err(invalid(FIELD, "must be a JSON array of at least one tool"));
        };
        if tools.len() > TOOLS_MAX {
            return Err(invalid(
                FIELD,
                format!("holds {} tools; at most {TOOLS_MAX} are taken", tools.len()),
            ));
        }
        let tools: Vec<Tool> = tools
            .iter()
            .enumerate()
            .map(|(index, tool)| Tool::parse(index, tool))
            .collect::<Result<_, _>>()?;
        for (index, tool) in tools.iter().enumerate() {
            if tools[..index].iter().any(|other| other.name == tool.name) {
                return Err(invalid(format!("{FIELD}[{index}].function.name"), "is declared twice"));
            }
        }
        Ok(tools)
    }
}

const FIELD: &str = "constraint.tool_calls.tools_json";

impl Tool {
    fn parse(index: usize, tool: &Value) -> Result<Tool, Refused> {
        let at = |name: &str| format!("{FIELD}[{index}].{name}");
        let function = &tool["function"];
        if !function.is_object() {
            return Err(invalid(at("function"), "must be an object"));
        }
        let name = function["name"].as_str().unwrap_or_default();
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(fits) {
            let reason = format!("must be 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, _ and -");
            return Err(invalid(at("function.name"), reason));
        }
        let parameters = match &function["parameters"] {
            Value::Null => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            schema @ Value::Object(_) => schema.clone(),
            _ => return Err(invalid(at("function.parameters"), "must be a JSON schema: an object")),
        };
        Ok(Tool { name: name.to_owned(), parameters, strict: function["strict"] == true })
    }

    /// Of its arguments: an object, without what was not declared unless the schema itself allows it.
    fn schema(self, field: &str, compiles: impl Fn(&Value) -> Result<(), String>) -> Result<Value, Refused> {
        let mut schema = self.parameters;
        let fields = schema.as_object_mut().expect("it was parsed as one");
        if fields.contains_key("x-guidance") {
            return Err(invalid(field, "holds the keyword \"x-guidance\", which is not taken"));
        }
        fields.entry("type").or_insert_with(|| "object".into());
        if fields.contains_key("properties") {
            fields.entry("additionalProperties").or_insert(Value::Bool(false));
        }
        let is_object = schema["type"] == "object";
        let outcome = match is_object {
            true => enforceable(&schema).and_then(|schema| {
                let schema = with_options(schema);
                compiles(&schema).map(|()| schema)
            }),
            false => Err("must be of type object".to_owned()),
        };
        match outcome {
            Ok(schema) => Ok(schema),
            Err(reason) if self.strict => Err(invalid(field, reason)),
            // As OpenAI has it: without `strict`, arguments follow the schema as well as they can.
            Err(_) => Ok(with_options(json!({"type": "object"}))),
        }
    }
}

/// As a literal of Lark, which are JSON's strings.
fn lark_string(text: &str) -> String {
    Value::from(text).to_string()
}
