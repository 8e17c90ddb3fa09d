//! `config.json` of both checkpoint generations, parsed once into one validated shape.
//!
//! ```text
//! model_type "minimax" (transformers)      ┐
//! model_type "minimax_text_01"/"minimax_m1"┴─> ModelConfig: what the engine computes, nothing to guess below it
//! ```
//!
//! Nothing that changes the arithmetic is taken from a silent default of a library: layer kinds must be listed, and the
//! part of a head that RoPE turns is a number here (`rotary_dim`), whatever the file called it.

use std::path::Path;

use serde_json::{Map, Value};

/// Which published code defines the details in which the two generations differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// transformers' `minimax`: slopes `2^(-8(h+1)/H)` for every head count, layer factor over `L - 1 + 1e-5`.
    Transformers,
    /// MiniMax's own `minimax_text_01` and `minimax_m1`: ALiBi interpolation, layer factor over `L - 1`.
    Official,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Lightning attention: a decayed sum of `k^T v`, constant memory per sequence.
    Linear,
    /// Grouped-query softmax attention with RoPE.
    Softmax,
}

/// `alpha * residual + beta * branch`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Residual {
    pub alpha: f32,
    pub beta: f32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of one expert.
    pub intermediate_size: usize,
    pub layers: Vec<LayerKind>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Leading dims of each head that RoPE turns; even, at most `head_dim`.
    pub rotary_dim: usize,
    pub rope_theta: f64,
    pub experts: usize,
    pub experts_per_token: usize,
    /// Width of the shared expert that official checkpoints may carry beside the routed ones.
    pub shared_intermediate_size: Option<usize>,
    /// The block the checkpoint was trained with. The result does not depend on it; see `state::BLOCK_TOKENS`.
    pub block_size: usize,
    pub context_tokens_max: usize,
    pub rms_norm_eps: f32,
    pub linear_attention: Residual,
    pub softmax_attention: Residual,
    pub moe: Residual,
    /// The residual carries the normed value (true in every published checkpoint).
    pub postnorm: bool,
    pub tied_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config.json is not a JSON object")]
    Json(#[source] Option<serde_json::Error>),
    #[error("config.json: `{field}` is missing: {fix}")]
    Missing { field: String, fix: &'static str },
    #[error("config.json: `{field}` {problem}")]
    Invalid { field: String, problem: String },
}

impl ModelConfig {
    pub fn read(path: &Path) -> std::io::Result<Result<ModelConfig, ConfigError>> {
        std::fs::read(path).map(|bytes| ModelConfig::parse(&bytes))
    }

    pub fn parse(json: &[u8]) -> Result<ModelConfig, ConfigError> {
        let value: Value = serde_json::from_slice(json).map_err(|error| ConfigError::Json(Some(error)))?;
        let Value::Object(map) = value else { return Err(ConfigError::Json(None)) };
        let fields = Fields(&map);
        let config = match fields.text("model_type")?.unwrap_or_default() {
            "minimax" => parse_transformers(fields)?,
            "minimax_text_01" | "minimax_m1" | "MiniMaxText01" | "MiniMaxM1" => parse_official(fields)?,
            other => {
                return Err(invalid(
                    "model_type",
                    format!("is \"{other}\"; this engine serves minimax, minimax_text_01 and minimax_m1"),
                ));
            }
        };
        config.validate()?;
        Ok(config)
    }

    pub fn layers_of(&self, kind: LayerKind) -> usize {
        self.layers.iter().filter(|&&layer| layer == kind).count()
    }

    /// Width of all query heads together.
    pub fn attention_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Decay slopes of one lightning layer, one a head: the state is multiplied by `exp(-slope)` each token.
    /// MiniMax-01 (arXiv 2501.08313); `_build_slope_tensor` of the official code.
    pub fn slopes(&self, layer: usize) -> Vec<f64> {
        let last = (self.layers.len() - 1) as f64;
        let (base, depth) = match self.family {
            Family::Transformers => (geometric_slopes(self.heads), layer as f64 / (last + 1e-5)),
            Family::Official => {
                (alibi_slopes(self.heads), if layer == 0 { 0.0 } else { layer as f64 / last })
            }
        };
        base.into_iter().map(|slope| slope * (1.0 - depth + 1e-5)).collect()
    }

    fn validate(&self) -> Result<(), ConfigError> {
        within("num_hidden_layers", self.layers.len(), 1, 1024)?;
        within("vocab_size", self.vocab_size, 1, 1 << 24)?;
        within("hidden_size", self.hidden_size, 1, 1 << 17)?;
        within("intermediate_size", self.intermediate_size, 1, 1 << 20)?;
        within("num_attention_heads", self.heads, 1, 1024)?;
        within("num_key_value_heads", self.kv_heads, 1, self.heads)?;
        within("head_dim", self.head_dim, 1, 1024)?;
        within("num_local_experts", self.experts, 1, 4096)?;
        within("num_experts_per_tok", self.experts_per_token, 1, self.experts)?;
        within("block_size", self.block_size, 1, 1 << 20)?;
        within("max_position_embeddings", self.context_tokens_max, 1, 1 << 26)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            let problem =
                format!("is {}, which does not divide num_attention_heads ({})", self.kv_heads, self.heads);
            return Err(invalid("num_key_value_heads", problem));
        }
        let softmax = self.layers_of(LayerKind::Softmax) > 0;
        if softmax
            && (!self.rotary_dim.is_multiple_of(2) || self.rotary_dim == 0 || self.rotary_dim > self.head_dim)
        {
            let problem =
                format!("is {}; it must be even and from 2 to head_dim ({})", self.rotary_dim, self.head_dim);
            return Err(invalid("rotary_dim", problem));
        }
        for (field, value) in
            [("rope_theta", self.rope_theta), ("rms_norm_eps", f64::from(self.rms_norm_eps))]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(invalid(field, format!("is {value}; it must be a positive number")));
            }
        }
        Ok(())
    }
}

/// transformers 5.23 ignores `rotary_dim` and `partial_rotary_factor` for this type and turns the whole head. A file that
/// names one of them was trained by code that heeds it, so here the file decides and the absence means the whole head.
fn parse_transformers(fields: Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let layers = fields
        .list("layer_types")?
        .ok_or_else(|| {
            missing("layer_types", "list \"linear_attention\" or \"full_attention\" for every layer")
        })?
        .iter()
        .enumerate()
        .map(|(layer, kind)| match kind.as_str() {
            Some("linear_attention") => Ok(LayerKind::Linear),
            Some("full_attention") => Ok(LayerKind::Softmax),
            _ => Err(invalid(
                format!("layer_types[{layer}]"),
                format!("is {kind}; \"linear_attention\" and \"full_attention\" are known"),
            )),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let residual = |branch: &str| {
        Ok(Residual {
            alpha: fields.number(&format!("{branch}_alpha_factor"))?.unwrap_or(1.0) as f32,
            beta: fields.number(&format!("{branch}_beta_factor"))?.unwrap_or(1.0) as f32,
        })
    };
    let (linear_attention, softmax_attention, moe) =
        (residual("linear_attn")?, residual("full_attn")?, residual("mlp")?);
    Ok(ModelConfig {
        family: Family::Transformers,
        linear_attention,
        softmax_attention,
        moe,
        postnorm: true,
        ..parse_common(fields, layers)?
    })
}

fn parse_official(fields: Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let layers = fields
        .list("attn_type_list")?
        .ok_or_else(|| missing("attn_type_list", "list 0 (lightning) or 1 (softmax) for every layer"))?
        .iter()
        .enumerate()
        .map(|(layer, kind)| match kind.as_u64() {
            Some(0) => Ok(LayerKind::Linear),
            Some(1) => Ok(LayerKind::Softmax),
            _ => Err(invalid(
                format!("attn_type_list[{layer}]"),
                format!("is {kind}; 0 (lightning) and 1 (softmax) are known"),
            )),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let residual = |branch: &str| {
        Ok(Residual {
            alpha: fields.number(&format!("layernorm_{branch}_alpha"))?.unwrap_or(1.0) as f32,
            beta: fields.number(&format!("layernorm_{branch}_beta"))?.unwrap_or(1.0) as f32,
        })
    };
    let (linear_attention, softmax_attention) = (residual("linear_attention")?, residual("full_attention")?);
    let moe = residual("mlp")?;
    let shared = match fields.get("shared_intermediate_size") {
        Some(Value::Array(sizes)) if sizes.len() == 1 => count("shared_intermediate_size", &sizes[0])?,
        Some(size) => count("shared_intermediate_size", size)?,
        None => 0,
    };
    if shared > 0 {
        let mode = fields.text("shared_moe_mode")?.unwrap_or("sigmoid");
        if mode != "sigmoid" {
            return Err(invalid("shared_moe_mode", format!("is \"{mode}\"; only \"sigmoid\" is known")));
        }
    }
    Ok(ModelConfig {
        family: Family::Official,
        linear_attention,
        softmax_attention,
        moe,
        postnorm: fields.flag("postnorm")?.unwrap_or(false),
        shared_intermediate_size: (shared > 0).then_some(shared),
        ..parse_common(fields, layers)?
    })
}

/// What both generations spell the same way. The fields they don't share hold neutral values for the caller to replace.
fn parse_common(fields: Fields<'_>, layers: Vec<LayerKind>) -> Result<ModelConfig, ConfigError> {
    let declared = fields.size("num_hidden_layers")?;
    if declared != layers.len() {
        let problem = format!("is {declared}, but the list of layer kinds has {} entries", layers.len());
        return Err(invalid("num_hidden_layers", problem));
    }
    let activation = fields.text("hidden_act")?.unwrap_or("silu");
    if !matches!(activation, "silu" | "swish") {
        return Err(invalid("hidden_act", format!("is \"{activation}\"; only \"silu\" is known")));
    }
    if let Some(window) = fields.get("sliding_window") {
        return Err(invalid(
            "sliding_window",
            format!("is {window}; attention here reads the whole context (null)"),
        ));
    }
    if fields.flag("attention_bias")?.unwrap_or(false) {
        return Err(invalid("attention_bias", "is true; projections here have no bias"));
    }
    let hidden_size = fields.size("hidden_size")?;
    let heads = fields.size("num_attention_heads")?;
    let head_dim = match fields.get("head_dim") {
        Some(value) => count("head_dim", value)?,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(missing("head_dim", "hidden_size is no multiple of num_attention_heads")),
    };
    let rope = fields.rope()?;
    let rotary_dim = match (fields.get("rotary_dim"), rope.partial_rotary_factor) {
        (Some(value), _) => count("rotary_dim", value)?,
        (None, Some(factor)) => (factor * head_dim as f64) as usize,
        (None, None) => head_dim,
    };
    Ok(ModelConfig {
        family: Family::Transformers,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        layers,
        heads,
        kv_heads: fields
            .get("num_key_value_heads")
            .map_or(Ok(heads), |value| count("num_key_value_heads", value))?,
        head_dim,
        rotary_dim,
        rope_theta: rope.theta,
        experts: fields.size("num_local_experts")?,
        experts_per_token: fields.size("num_experts_per_tok")?,
        shared_intermediate_size: None,
        block_size: fields.get("block_size").map_or(Ok(256), |value| count("block_size", value))?,
        context_tokens_max: fields.size("max_position_embeddings")?,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-5) as f32,
        linear_attention: Residual { alpha: 1.0, beta: 1.0 },
        softmax_attention: Residual { alpha: 1.0, beta: 1.0 },
        moe: Residual { alpha: 1.0, beta: 1.0 },
        postnorm: true,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

struct Rope {
    theta: f64,
    partial_rotary_factor: Option<f64>,
}

#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &str) -> Result<usize, ConfigError> {
        let value = self.get(field).ok_or_else(|| missing(field, "every published checkpoint states it"))?;
        count(field, value)
    }

    fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.get(field).map(|value| number(field, value)).transpose()
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        let flag = |value: &Value| {
            value.as_bool().ok_or_else(|| invalid(field, format!("is {value}, not a boolean")))
        };
        self.get(field).map(flag).transpose()
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        let text = |value: &'a Value| {
            value.as_str().ok_or_else(|| invalid(field, format!("is {value}, not a string")))
        };
        self.get(field).map(text).transpose()
    }

    fn list(&self, field: &str) -> Result<Option<&'a Vec<Value>>, ConfigError> {
        let list = |value: &'a Value| value.as_array().ok_or_else(|| invalid(field, "is not a list"));
        self.get(field).map(list).transpose()
    }

    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| count(field, value).map(|id| id as u32);
        match self.get(field) {
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
            None => Ok(Vec::new()),
        }
    }

    /// `rope_parameters` (transformers 5) or the flat `rope_theta` (4 and the official code).
    fn rope(&self) -> Result<Rope, ConfigError> {
        let nested = match self.get("rope_parameters").or(self.get("rope_scaling")) {
            Some(Value::Object(map)) => Some(Fields(map)),
            Some(other) => return Err(invalid("rope_parameters", format!("is {other}, not an object"))),
            None => None,
        };
        if let Some(rope) = nested {
            let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or("default");
            if kind != "default" {
                return Err(invalid(
                    "rope_parameters.rope_type",
                    format!("is \"{kind}\"; only \"default\" is known"),
                ));
            }
        }
        let nested_number = |field| nested.map_or(Ok(None), |rope| rope.number(field));
        let theta = nested_number("rope_theta")?
            .or(self.number("rope_theta")?)
            .ok_or_else(|| missing("rope_parameters.rope_theta", "state it there or as `rope_theta`"))?;
        let factor = nested_number("partial_rotary_factor")?.or(self.number("partial_rotary_factor")?);
        Ok(Rope { theta, partial_rotary_factor: factor })
    }
}

fn geometric_slopes(heads: usize) -> Vec<f64> {
    (0..heads).map(|head| (-8.0 * (head + 1) as f64 / heads as f64).exp2()).collect()
}

/// A head count that is no power of two takes the schedule of the power below it, then every other slope of the one above.
fn alibi_slopes(heads: usize) -> Vec<f64> {
    if heads.is_power_of_two() {
        return geometric_slopes(heads);
    }
    let below = heads.next_power_of_two() / 2;
    let mut slopes = geometric_slopes(below);
    slopes.extend(geometric_slopes(2 * below).into_iter().step_by(2).take(heads - below));
    slopes
}

fn count(field: &str, value: &Value) -> Result<usize, ConfigError> {
    value
        .as_u64()
        .filter(|&number| number <= u64::from(u32::MAX))
        .map(|number| number as usize)
        .ok_or_else(|| invalid(field, format!("is {value}, not a whole number below 2^32")))
}

fn number(field: &str, value: &Value) -> Result<f64, ConfigError> {
    value
        .as_f64()
        .filter(|number| number.is_finite())
        .ok_or_else(|| invalid(field, format!("is {value}, not a finite number")))
}

fn within(field: &str, value: usize, low: usize, high: usize) -> Result<(), ConfigError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(invalid(field, format!("is {value}; it must be from {low} to {high}")))
}

fn missing(field: impl Into<String>, fix: &'static str) -> ConfigError {
    ConfigError::Missing { field: field.into(), fix }
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { field: field.into(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFICIAL: &str = r#"{"model_type": "minimax_m1", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 3, "attn_type_list": [0, 0, 1], "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rotary_dim": 8, "rope_theta": 10000000, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layernorm_linear_attention_alpha": 3.5, "layernorm_mlp_beta": 0.5, "postnorm": true,
        "shared_intermediate_size": 0, "max_position_embeddings": 10240, "rms_norm_eps": 1e-05}"#;

    const TRANSFORMERS: &str = r#"{"model_type": "minimax", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "linear_attn_alpha_factor": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 10240,
        "eos_token_id": [2, 5]}"#;

    /// The text with one field replaced (`null` stands for absence).
    fn with(json: &str, field: &str, value: Value) -> Vec<u8> {
        let mut config: Value = serde_json::from_str(json).expect("the example is JSON");
        config[field] = value;
        config.to_string().into_bytes()
    }

    fn check(json: &str, field: &str, value: Value, expect: &str) {
        let error = ModelConfig::parse(&with(json, field, value)).expect_err("it is invalid").to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn both_generations_parse_into_one_shape() {
        let official = ModelConfig::parse(OFFICIAL.as_bytes()).expect("valid");
        assert_eq!(official.layers, [LayerKind::Linear, LayerKind::Linear, LayerKind::Softmax]);
        assert_eq!(official.linear_attention, Residual { alpha: 3.5, beta: 1.0 });
        assert_eq!(
            (official.moe.beta, official.rotary_dim, official.shared_intermediate_size),
            (0.5, 8, None)
        );
        let port = ModelConfig::parse(TRANSFORMERS.as_bytes()).expect("valid");
        assert_eq!((port.head_dim, port.rotary_dim, port.postnorm), (16, 16, true));
        assert_eq!((port.linear_attention.alpha, port.rope_theta), (2.0, 10000.0));
        assert_eq!(port.eos_token_ids, [2, 5]);
    }

    #[test]
    fn the_official_code_defaults_to_prenorm() {
        let config = ModelConfig::parse(&with(OFFICIAL, "postnorm", Value::Null)).expect("valid");
        assert!(!config.postnorm);
    }

    #[test]
    fn errors_name_the_field() {
        check(OFFICIAL, "attn_type_list", Value::Null, "`attn_type_list` is missing");
        check(OFFICIAL, "attn_type_list", serde_json::json!([0, 2, 1]), "`attn_type_list[1]` is 2");
        check(OFFICIAL, "attn_type_list", serde_json::json!([0, 1]), "`num_hidden_layers` is 3");
        check(OFFICIAL, "hidden_act", "gelu".into(), "`hidden_act` is \"gelu\"");
        check(OFFICIAL, "rotary_dim", 7.into(), "`rotary_dim` is 7");
        check(OFFICIAL, "rotary_dim", 18.into(), "`rotary_dim` is 18");
        check(OFFICIAL, "num_key_value_heads", 3.into(), "`num_key_value_heads` is 3");
        check(OFFICIAL, "num_experts_per_tok", 5.into(), "`num_experts_per_tok` is 5");
        check(OFFICIAL, "vocab_size", (-1).into(), "`vocab_size` is -1");
        check(OFFICIAL, "model_type", "llama".into(), "`model_type` is \"llama\"");
        check(TRANSFORMERS, "layer_types", Value::Null, "`layer_types` is missing");
        check(
            TRANSFORMERS,
            "layer_types",
            serde_json::json!(["linear_attention", "mamba"]),
            "`layer_types[1]`",
        );
        check(TRANSFORMERS, "rope_parameters", Value::Null, "`rope_parameters.rope_theta` is missing");
        check(TRANSFORMERS, "sliding_window", 512.into(), "`sliding_window` is 512");
        assert!(ModelConfig::parse(b"[]").is_err() && ModelConfig::parse(b"{").is_err());
    }

    #[test]
    fn slopes_follow_the_published_schedules() {
        let config = ModelConfig::parse(OFFICIAL.as_bytes()).expect("valid");
        let close =
            |found: &[f64], expected: &[f64]| found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12);
        let fade = 1.0 - 0.5 + 1e-5;
        assert!(close(
            &config.slopes(1),
            &[0.25 * fade, 0.0625 * fade, 0.015_625 * fade, 0.003_906_25 * fade]
        ));
        // Six heads: the schedule of four, then the first and third of eight.
        assert!(close(&alibi_slopes(6), &[0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]));
    }
}
