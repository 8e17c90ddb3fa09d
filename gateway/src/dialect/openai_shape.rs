//! What a request of OpenAI's says about the look of its answer: `response_format`, tools, log-probabilities, and the
//! extensions that other engines have beside them.

use serde_json::Value;

use super::fields::Fields;
use crate::{
    error::{ApiError, Fault},
    request::{self, Expected, Format, LogitBias, TOOLS_MAX, ToolChoice, Tools},
};

/// `{"token id": bias}`.
pub fn logit_bias(body: &Fields<'_>) -> Result<LogitBias, ApiError> {
    let biases = match body.get("logit_bias") {
        None => return Ok(LogitBias::default()),
        Some(Value::Object(biases)) => biases,
        Some(other) => return Err(body.wrong_type("logit_bias", "an object", other)),
    };
    let entry = |(id, bias): (&String, &Value)| Some((id.parse().ok()?, bias.as_f64()?));
    let biases = biases.iter().map(entry).collect::<Option<Vec<(u32, f64)>>>().ok_or_else(|| {
        let message = "must have token ids as names and numbers as values";
        ApiError::field(Fault::Value, body.path("logit_bias"), message)
    })?;
    body.check("logit_bias", LogitBias::new(biases))
}

/// vLLM's extension: ids that end an answer.
pub fn stop_ids(body: &Fields<'_>) -> Result<Vec<u32>, ApiError> {
    let values = body.array("stop_token_ids")?.unwrap_or_default();
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = values.iter().map(id).collect::<Option<Vec<u32>>>().ok_or_else(|| {
        ApiError::field(
            Fault::Value,
            body.path("stop_token_ids"),
            "must hold token ids: whole numbers from 0",
        )
    })?;
    body.check("stop_token_ids", request::stop_ids(ids))
}

/// Of a chat: `logprobs` and how many `top_logprobs`.
pub fn top_logprobs(body: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let count = body.integer("top_logprobs")?;
    let count = count.map(|count| request::top_logprobs(count, request::TOP_LOGPROBS_MAX)).transpose();
    let count = body.check("top_logprobs", count)?;
    match (body.boolean("logprobs")?.unwrap_or(false), count) {
        (true, count) => Ok(Some(count.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            let message = "needs logprobs to be true";
            Err(ApiError::field(Fault::Value, body.path("top_logprobs"), message))
        }
    }
}

pub fn format(body: &Fields<'_>) -> Result<Format, ApiError> {
    let Some(format) = body.object("response_format")? else { return Ok(Format::Text) };
    format.required("type")?;
    match format.string("type")?.unwrap_or_default() {
        "text" => Ok(Format::Text),
        "json_object" => Ok(Format::JsonObject),
        "json_schema" => {
            format.required("json_schema")?;
            let description = format.object("json_schema")?.expect("it is there");
            description.required("name")?;
            let name = description.string("name")?.unwrap_or_default();
            description.check("name", request::function_name(name))?;
            // Strict or not, a schema is enforced.
            description.boolean("strict")?;
            description.required("schema")?;
            description.object("schema")?;
            let schema = description.get("schema").expect("it is there");
            Ok(Format::JsonSchema(schema.to_string()))
        }
        _ => Err(format.unsupported_value("type", "'text', 'json_object' and 'json_schema' are")),
    }
}

/// `None`: none are declared, or none may be called; the model is told of none then.
pub fn tools(body: &Fields<'_>) -> Result<Option<Tools>, ApiError> {
    let declared = body.array("tools")?.unwrap_or_default();
    if declared.len() > TOOLS_MAX {
        let message = format!("must hold at most {TOOLS_MAX} tools, but holds {}", declared.len());
        return Err(ApiError::field(Fault::Value, body.path("tools"), message));
    }
    let mut names = Vec::new();
    for (index, tool) in declared.iter().enumerate() {
        names.push(tool_name(&Fields::of(tool, body.path(&format!("tools[{index}]")))?)?);
    }
    let parallel = body.boolean("parallel_tool_calls")?.unwrap_or(true);
    let choice = choice(body, &names)?;
    let (Some(choice), false) = (choice, declared.is_empty()) else { return Ok(None) };
    let declared_json = Value::from(declared.to_vec()).to_string();
    Ok(Some(Tools { declared_json, choice, parallel }))
}

fn tool_name<'a>(tool: &Fields<'a>) -> Result<&'a str, ApiError> {
    tool.required("type")?;
    if tool.string("type")? != Some("function") {
        return Err(tool.unsupported_value("type", "only 'function' is"));
    }
    tool.required("function")?;
    let function = tool.object("function")?.expect("it is there");
    function.required("name")?;
    let name = function.string("name")?.unwrap_or_default();
    function.check("name", request::function_name(name))?;
    function.string("description")?;
    function.boolean("strict")?;
    function.object("parameters")?;
    Ok(name)
}

/// `None`: no tool may be called.
fn choice(body: &Fields<'_>, names: &[&str]) -> Result<Option<ToolChoice>, ApiError> {
    let refuse = |message: &str| ApiError::field(Fault::Value, body.path("tool_choice"), message);
    let choice = match body.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => return Ok(None),
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(refuse("must be 'none', 'auto', 'required' or a function")),
        },
        Some(Value::Object(_)) => {
            let choice = body.object("tool_choice")?.expect("it is there");
            choice.required("type")?;
            if choice.string("type")? != Some("function") {
                return Err(choice.unsupported_value("type", "only 'function' is"));
            }
            choice.required("function")?;
            let function = choice.object("function")?.expect("it is there");
            function.required("name")?;
            let name = function.string("name")?.unwrap_or_default();
            if !names.contains(&name) {
                return function.check("name", Err(Expected::declared_tool()));
            }
            ToolChoice::Named(name.to_owned())
        }
        Some(other) => return Err(body.wrong_type("tool_choice", "a string or an object", other)),
    };
    match choice {
        ToolChoice::Required if names.is_empty() => Err(refuse("is 'required', but no tools are declared")),
        choice => Ok(Some(choice)),
    }
}

/// Text in a format, or calls of tools: one answer cannot be bound to be either.
pub fn refuse_format_beside_tools(
    body: &Fields<'_>,
    format: &Format,
    tools: Option<&Tools>,
) -> Result<(), ApiError> {
    match tools.is_some() && *format != Format::Text {
        true => {
            Err(body.unsupported_value("response_format", "beside tools that may be called, only 'text' is"))
        }
        false => Ok(()),
    }
}
