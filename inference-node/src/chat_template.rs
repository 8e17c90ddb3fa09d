//! Renders a conversation to the text of a prompt, by the model's own Jinja template.
//!
//! The template comes from `chat_template.jinja` or from `chat_template` in `tokenizer_config.json`, and runs as Hugging
//! Face's `apply_chat_template` runs it: trimmed blocks, Python's string methods, `raise_exception`, `strftime_now`, a
//! `tojson` that writes as Python's `json.dumps` does. Some templates take a message's content as a string, others as a
//! list of parts; which one this is, a probe at load finds out.
//!
//! Users' strings are defused first, so that none of them can forge a control token: see
//! [`crate::tokenizer::control_tokens`].

use crate::constraint::{BLOCK_CLOSES, BLOCK_OPENS, ToolFormat};
use crate::tokenizer::control_tokens::{ControlTokens, free_marker};
use crate::tokenizer::{Rendered, Tokenizer};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value as Jinja};
use serde::Serialize;
use serde_json::{Map, Value, json};
use sluice_proto::node::v1 as proto;
use std::path::{Path, PathBuf};

pub struct ChatTemplate {
    environment: Environment<'static>,
    content: ContentForm,
    /// How the template has the model write tool calls: it says so to the model, or it writes past calls so.
    tool_format: Option<ToolFormat>,
    /// It teaches calls in a block, but leaves past ones out: they are put into the text of their message.
    forgets_calls: bool,
    /// `bos_token`, `eos_token` and their like, as the template names them.
    variables: Map<String, Value>,
}

/// How the template reads `message.content`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentForm {
    /// `"Hello"`
    Text,
    /// `[{"type": "text", "text": "Hello"}]`
    Parts,
}

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("{path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} is not JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path} is not a template this node understands: {reason}")]
    Syntax { path: PathBuf, reason: String },
    #[error("{path} writes nothing of a user's message, as a string or as a list of parts: {reason}")]
    Deaf { path: PathBuf, reason: String },
}

/// A conversation that cannot become a prompt. `field` is where, as a path into the request.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct RenderError {
    pub field: String,
    pub reason: String,
}

/// What a user sends: roles are known, JSON is parsed.
#[derive(Debug, Clone)]
pub struct Conversation {
    messages: Vec<Value>,
    tools: Option<Value>,
}

impl ChatTemplate {
    /// Reads the template beside the model. `Ok(None)`: it has none, and can only complete plain text.
    pub fn load(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, TemplateError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Value::Null);
        let template_path = dir.join("chat_template.jinja");
        let (path, source) = match read(&template_path)? {
            Some(source) => (template_path, source),
            None => match default_template(&config["chat_template"]) {
                Some(source) => (config_path, source.to_owned()),
                None => return Ok(None),
            },
        };
        let model_config = read_json(&dir.join("config.json"))?.unwrap_or(Value::Null);
        ChatTemplate::new(path, source, token_variables(&config, &model_config, tokenizer)).map(Some)
    }

    fn new(
        path: PathBuf,
        source: String,
        variables: Map<String, Value>,
    ) -> Result<ChatTemplate, TemplateError> {
        let mut environment = Environment::new();
        let unreadable =
            |error: Error| TemplateError::Syntax { path: path.clone(), reason: describe(&error) };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(unreadable)?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat", source).map_err(unreadable)?;
        let mut template = ChatTemplate {
            environment,
            content: ContentForm::Text,
            tool_format: None,
            forgets_calls: false,
            variables,
        };
        template.content = template.probe().map_err(|reason| TemplateError::Deaf { path, reason })?;
        template.probe_tools();
        Ok(template)
    }

    /// Finds the form of content of which the template writes something.
    fn probe(&self) -> Result<ContentForm, String> {
        const PROBE: &str = "Is this thing on?";
        let mut reason = "its output does not contain the message".to_owned();
        for form in [ContentForm::Text, ContentForm::Parts] {
            let message = json!({"role": "user", "content": PROBE});
            match self.run(&[message], None, form) {
                Ok(text) if text.contains(PROBE) => return Ok(form),
                Ok(_) => {}
                Err(error) => reason = describe(&error),
            }
        }
        Err(reason)
    }

    /// Finds out how tools are called, by what the template writes of a call that was made.
    fn probe_tools(&mut self) {
        let call = json!({"type": "function", "function": {"name": "probe", "arguments": {"on": "air"}}});
        let question = json!({"role": "user", "content": "?"});
        let answer = json!({"role": "assistant", "content": "", "tool_calls": [call]});
        let written = self.run(&[question, answer], None, self.content).unwrap_or_default();
        let teaches_block = self
            .environment
            .get_template("chat")
            .is_ok_and(|template| template.source().contains(BLOCK_OPENS.trim_end()));
        self.forgets_calls = teaches_block && !written.contains("probe");
        self.tool_format = match written.contains(r#"{"tool": "probe", "arguments": {"on": "air"}}"#) {
            _ if teaches_block => Some(ToolFormat::Block),
            true => Some(ToolFormat::Object),
            false => None,
        };
    }

    /// How the model writes tool calls. `None`: its template teaches no way.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// Writes the prompt up to where the assistant is to answer.
    pub fn render(
        &self,
        conversation: &Conversation,
        controls: &ControlTokens,
    ) -> Result<Rendered, RenderError> {
        let mut conversation = conversation.clone();
        let marker = conversation.defuse(controls)?;
        if self.forgets_calls {
            conversation.messages.iter_mut().for_each(write_calls);
        }
        let text = self
            .run(&conversation.messages, conversation.tools.as_ref(), self.content)
            .map_err(|error| RenderError { field: "messages".to_owned(), reason: describe(&error) })?;
        Ok(Rendered { text, marker })
    }

    fn run(&self, messages: &[Value], tools: Option<&Value>, form: ContentForm) -> Result<String, Error> {
        let messages: Vec<Value> = messages.iter().map(|message| form.applied_to(message)).collect();
        let mut variables = self.variables.clone();
        variables.insert("messages".to_owned(), Value::Array(messages));
        variables.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        if let Some(tools) = tools {
            variables.insert("tools".to_owned(), tools.clone());
        }
        self.environment.get_template("chat")?.render(Jinja::from(Serde(&variables)))
    }
}

impl ContentForm {
    fn applied_to(self, message: &Value) -> Value {
        let mut message = message.clone();
        if self == ContentForm::Parts {
            let text = message["content"].take();
            message["content"] = json!([{"type": "text", "text": text}]);
            // MiniMax's template reads there which tool a result is of.
            if message["role"] == "tool" && message["name"].is_string() {
                message["content"][0]["name"] = message["name"].clone();
            }
        }
        message
    }
}

impl TryFrom<proto::ChatPrompt> for Conversation {
    type Error = RenderError;

    fn try_from(prompt: proto::ChatPrompt) -> Result<Conversation, RenderError> {
        if prompt.messages.is_empty() {
            return Err(invalid("messages", "must hold at least one message"));
        }
        let messages = prompt.messages.into_iter().enumerate().map(|(index, message)| parse(index, message));
        let mut messages = messages.collect::<Result<Vec<Value>, _>>()?;
        name_tool_results(&mut messages);
        let tools = json_array("tools_json", &prompt.tools_json)?;
        Ok(Conversation { messages, tools })
    }
}

impl Conversation {
    /// Of a single message from a user.
    pub fn of_user(text: &str) -> Conversation {
        Conversation { messages: vec![json!({"role": "user", "content": text})], tools: None }
    }

    /// Makes every string in it harmless; answers with the marker, if one was needed.
    fn defuse(&mut self, controls: &ControlTokens) -> Result<Option<char>, RenderError> {
        let mut texts = Vec::new();
        self.messages.iter().chain(&self.tools).for_each(|value| strings(value, &mut texts));
        let Some(marker) = free_marker(texts.iter().map(|text| text.as_str())) else {
            return Err(invalid(
                "messages",
                "the text uses up all 32 Unicode noncharacters U+FDD0 to U+FDEF",
            ));
        };
        let mut defused = false;
        for value in self.messages.iter_mut().chain(&mut self.tools) {
            defuse(value, controls, marker, &mut defused);
        }
        Ok(defused.then_some(marker))
    }
}

fn parse(index: usize, message: proto::ChatMessage) -> Result<Value, RenderError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    if !matches!(message.role.as_str(), "system" | "user" | "assistant" | "tool") {
        let reason = format!("must be system, user, assistant or tool, not {:?}", message.role);
        return Err(invalid(at("role"), reason));
    }
    let mut out = json!({"role": message.role, "content": message.content});
    if !message.name.is_empty() {
        out["name"] = message.name.into();
    }
    if !message.tool_call_id.is_empty() {
        out["tool_call_id"] = message.tool_call_id.into();
    }
    if let Some(mut calls) = json_array(&at("tool_calls_json"), &message.tool_calls_json)? {
        calls.as_array_mut().into_iter().flatten().for_each(unfold_arguments);
        out["tool_calls"] = calls;
    }
    Ok(out)
}

/// OpenAI's clients say which call a result answers, not which tool: the call says that.
fn name_tool_results(messages: &mut [Value]) {
    let mut names = Map::new();
    for message in messages {
        for call in message["tool_calls"].as_array().into_iter().flatten() {
            if let Some(id) = call["id"].as_str() {
                names.insert(id.to_owned(), call["function"]["name"].clone());
            }
        }
        let named = message["tool_call_id"].as_str().and_then(|id| names.get(id)).cloned();
        if let Some(name) = named
            && message["role"] == "tool"
            && message["name"].is_null()
        {
            message["name"] = name;
        }
    }
}

/// Appends a message's calls to its text, as the model would have written them.
fn write_calls(message: &mut Value) {
    let Some(calls) = message["tool_calls"].as_array() else { return };
    let mut text = message["content"].as_str().unwrap_or_default().to_owned();
    text.push_str(BLOCK_OPENS);
    for call in calls {
        let function = &call["function"];
        let line = json!({"name": function["name"], "arguments": function["arguments"]});
        text.push_str(&python_json(&line));
        text.push('\n');
    }
    text.push_str(BLOCK_CLOSES);
    message["content"] = text.into();
}

/// On one line, as `json.dumps(value, ensure_ascii=False)`.
fn python_json(value: &impl Serialize) -> String {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSpacing);
    value.serialize(&mut serializer).expect("JSON values can be written");
    String::from_utf8(out).expect("JSON is UTF-8")
}

/// OpenAI's clients send a call's arguments as a string of JSON; templates expect the object.
fn unfold_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
        *arguments = object;
    }
}

fn json_array(field: &str, text: &str) -> Result<Option<Value>, RenderError> {
    if text.is_empty() {
        return Ok(None);
    }
    match serde_json::from_str(text) {
        Ok(Value::Array(items)) if items.is_empty() => Ok(None),
        Ok(array @ Value::Array(_)) => Ok(Some(array)),
        Ok(_) => Err(invalid(field, "must be a JSON array")),
        Err(error) => Err(invalid(field, format!("is not JSON: {error}"))),
    }
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> RenderError {
    RenderError { field: field.into(), reason: reason.into() }
}

fn strings<'a>(value: &'a Value, out: &mut Vec<&'a String>) {
    match value {
        Value::String(text) => out.push(text),
        Value::Array(items) => items.iter().for_each(|item| strings(item, out)),
        Value::Object(fields) => {
            for (name, field) in fields {
                out.push(name);
                strings(field, out);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn defuse(value: &mut Value, controls: &ControlTokens, marker: char, defused: &mut bool) {
    let mut harmless = |text: &str| controls.defuse(text, marker).inspect(|_| *defused = true);
    match value {
        Value::String(text) => {
            if let Some(safe) = harmless(text) {
                *text = safe;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| defuse(item, controls, marker, defused)),
        Value::Object(fields) => {
            let names = std::mem::take(fields).into_iter();
            let named = names.map(|(name, field)| (harmless(&name).unwrap_or(name), field));
            *fields = named.collect();
            fields.values_mut().for_each(|field| defuse(field, controls, marker, defused));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn read(path: &Path) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::Unreadable { path: path.to_owned(), source }),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, TemplateError> {
    let parse = |text: String| {
        serde_json::from_str(&text).map_err(|source| TemplateError::Json { path: path.to_owned(), source })
    };
    read(path)?.map(parse).transpose()
}

/// A string, or a list of named templates of which one is called `default`.
fn default_template(field: &Value) -> Option<&str> {
    let named = field.as_array().into_iter().flatten().find(|entry| entry["name"] == "default");
    field.as_str().or_else(|| named?["template"].as_str())
}

/// Special tokens for the template: those the tokenizer's configuration names, else the model's ids as text.
fn token_variables(config: &Value, model_config: &Value, tokenizer: &Tokenizer) -> Map<String, Value> {
    let mut variables = Map::new();
    for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        let named = config[name].as_str().or_else(|| config[name]["content"].as_str()).map(str::to_owned);
        let id = &model_config[format!("{name}_id")];
        let id = id.as_u64().or_else(|| id[0].as_u64()).and_then(|id| u32::try_from(id).ok());
        if let Some(text) = named.or_else(|| tokenizer.token(id?)) {
            variables.insert(name.to_owned(), text.into());
        }
    }
    variables
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, Error> {
    let refused = |reason: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {reason}"));
    let format =
        time::format_description::parse_strftime_owned(&format).map_err(|e| refused(e.to_string()))?;
    time::OffsetDateTime::now_utc().format(&format).map_err(|e| refused(e.to_string()))
}

/// As `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn tojson(value: Jinja, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        None => options.get::<Option<usize>>("indent")?,
        given => given,
    };
    // Ours is always so; templates may say it.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing)),
        Some(width) => {
            let spaces = " ".repeat(width);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(out).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// `{"a": 1, "b": [2, 3]}`: models have read it this way.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// What the template said, without the engine's own words around it where the template raised it on purpose.
fn describe(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) if error.kind() != ErrorKind::InvalidOperation => {
            format!("{detail} (template line {line})")
        }
        _ => detail,
    }
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;
