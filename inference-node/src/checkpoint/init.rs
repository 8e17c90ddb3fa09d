//! Writes a random-weight checkpoint of any configuration: for benchmarks and tests, in memory bounded by one buffer.
//!
//! Element `i` of a tensor is a function of (seed, tensor name, i) alone, so the same arguments give the same bytes on every
//! machine, whatever else the file holds.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::layout::{Layout, Part};
use super::{CONFIG_FILE, SINGLE_FILE};
use crate::config::{ConfigError, ModelConfig};

/// Elements converted at a time.
const BUFFER_ELEMENTS: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightsDtype {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Config { path: PathBuf, source: ConfigError },
    #[error("{} holds a checkpoint already: choose another --out or delete it", dir.display())]
    Exists { dir: PathBuf },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

/// Writes `config.json` and `model.safetensors` into `out`; returns the number of parameters.
pub fn initialize(config_path: &Path, seed: u64, dtype: WeightsDtype, out: &Path) -> Result<u64, InitError> {
    let json = std::fs::read(config_path)
        .map_err(|source| InitError::Read { path: config_path.to_owned(), source })?;
    let config = ModelConfig::parse(&json)
        .map_err(|source| InitError::Config { path: config_path.to_owned(), source })?;
    let weights = out.join(SINGLE_FILE);
    if weights.exists() {
        return Err(InitError::Exists { dir: out.to_owned() });
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| InitError::Write { path, source }
    };
    std::fs::create_dir_all(out).map_err(failed(out))?;
    let parts = Layout::native(&config).parts();
    // The weights get their name last, so that an interrupted run never looks like a checkpoint.
    let partial = out.join(format!("{SINGLE_FILE}.partial"));
    write_weights(&partial, &parts, seed, dtype).map_err(failed(&partial))?;
    std::fs::write(out.join(CONFIG_FILE), json).map_err(failed(&out.join(CONFIG_FILE)))?;
    std::fs::rename(&partial, &weights).map_err(failed(&weights))?;
    Ok(parts.iter().map(Part::elements).sum())
}

fn write_weights(path: &Path, parts: &[Part], seed: u64, dtype: WeightsDtype) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let header = header(parts, dtype);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut bytes = Vec::with_capacity(BUFFER_ELEMENTS * dtype.width());
    for part in parts {
        let source = Source::of(seed, part);
        let elements = part.elements();
        for start in (0..elements).step_by(BUFFER_ELEMENTS) {
            let end = elements.min(start + BUFFER_ELEMENTS as u64);
            bytes.clear();
            (start..end).for_each(|index| dtype.append(source.element(index), &mut bytes));
            file.write_all(&bytes)?;
        }
    }
    file.into_inner()?.sync_all()
}

/// The safetensors header: a JSON object padded with spaces to eight bytes.
fn header(parts: &[Part], dtype: WeightsDtype) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    map.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for part in parts {
        let end = start + part.elements() * dtype.width() as u64;
        let entry =
            json!({ "dtype": dtype.safetensors_name(), "shape": part.shape, "data_offsets": [start, end] });
        map.insert(part.name.clone(), entry);
        start = end;
    }
    let mut header = serde_json::Value::Object(map).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

impl Part {
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

impl WeightsDtype {
    fn width(self) -> usize {
        if self == WeightsDtype::F32 { 4 } else { 2 }
    }

    fn safetensors_name(self) -> &'static str {
        match self {
            WeightsDtype::F32 => "F32",
            WeightsDtype::F16 => "F16",
            WeightsDtype::Bf16 => "BF16",
        }
    }

    fn append(self, value: f32, bytes: &mut Vec<u8>) {
        match self {
            WeightsDtype::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
            WeightsDtype::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            WeightsDtype::Bf16 => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Norm weights are one; everything else is close to normal with deviation `1 / sqrt(fan in)`, which keeps activations and
/// logits of order one at any depth.
enum Source {
    Ones,
    Normal { key: u64, deviation: f32 },
}

impl Source {
    fn of(seed: u64, part: &Part) -> Source {
        match part.shape[..] {
            [_] => Source::Ones,
            [.., fan_in] => Source::normal(seed, part, fan_in),
            [] => unreachable!("every part of a layout has a shape"),
        }
    }

    fn normal(seed: u64, part: &Part, fan_in: usize) -> Source {
        let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(&part.name).finalize();
        let key = u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
        Source::Normal { key, deviation: (fan_in as f32).sqrt().recip() }
    }

    /// The sum of four uniform 16-bit numbers, centred and scaled (Irwin-Hall: variance 4/12 in units of 2^16).
    fn element(&self, index: u64) -> f32 {
        match *self {
            Source::Ones => 1.0,
            Source::Normal { key, deviation } => {
                let bits = mix(key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
                let sum: u64 = (0..4).map(|lane| (bits >> (16 * lane)) & 0xFFFF).sum();
                (sum as f32 / 65536.0 - 2.0 + 2.0 / 65536.0) * 3f32.sqrt() * deviation
            }
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    const CONFIG: &str = r#"{"model_type": "minimax_m1", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "attn_type_list": [0, 1], "num_attention_heads": 4, "num_key_value_heads": 2,
        "rotary_dim": 8, "rope_theta": 10000, "num_local_experts": 4, "num_experts_per_tok": 2, "postnorm": true,
        "shared_intermediate_size": 16, "max_position_embeddings": 1024}"#;

    #[test]
    fn a_seed_gives_the_same_valid_checkpoint_again() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = dir.path().join("config.json");
        std::fs::write(&config, CONFIG).expect("written");
        let write = |name: &str, seed| {
            let out = dir.path().join(name);
            let parameters = initialize(&config, seed, WeightsDtype::Bf16, &out).expect("written");
            (parameters, std::fs::read(out.join(SINGLE_FILE)).expect("weights"))
        };
        let (first, again, other) = (write("first", 7), write("again", 7), write("other", 8));
        assert!(first == again && first.1 != other.1);
        let checkpoint = Checkpoint::open(&dir.path().join("first")).expect("whole");
        Layout::of(&checkpoint).expect("every tensor is there");
        let table = checkpoint.tensor("model.embed_tokens.weight").expect("there").to_vec();
        let variance = table.iter().map(|x| x * x).sum::<f32>() / table.len() as f32 * 64.0;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        let exists = initialize(&config, 7, WeightsDtype::F32, &dir.path().join("first"));
        assert!(matches!(exists, Err(InitError::Exists { .. })));
    }
}
