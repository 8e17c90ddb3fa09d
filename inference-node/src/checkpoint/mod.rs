//! Weights on disk: one safetensors file or shards with an index, memory-mapped, in f32, f16 or bf16.
//!
//! ```text
//! directory -> Checkpoint (names, shapes, bytes) -> Layout (which name holds which weight) -> f32 rows
//! ```
//!
//! A missing, surplus, mis-shaped or truncated tensor is an error that names it, before anything is computed.

mod init;
mod layout;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError};
use sha2::{Digest, Sha256};

use crate::config::{ConfigError, ModelConfig};

pub use init::{InitError, WeightsDtype, initialize};
pub use layout::{Layout, Part, Rows};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const CONFIG_FILE: &str = "config.json";

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} does not describe a model that can be loaded", path.display())]
    Config { path: PathBuf, source: ConfigError },
    #[error("{} holds neither {SINGLE_FILE} nor {INDEX_FILE}: download the weights or point at another directory", dir.display())]
    NoWeights { dir: PathBuf },
    #[error("{}: {problem}", path.display())]
    Malformed { path: PathBuf, problem: String },
    #[error("tensor `{name}` is missing from {}: the checkpoint is incomplete or of another model", dir.display())]
    MissingTensor { name: String, dir: PathBuf },
    #[error("tensor `{name}` in {} is not part of the model that config.json describes", path.display())]
    ExtraTensor { name: String, path: PathBuf },
    #[error("tensor `{name}` in {} has shape {found:?}; config.json implies {expected:?}", path.display())]
    Shape { name: String, path: PathBuf, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}` in {} is {dtype}; f32, f16 and bf16 are supported", path.display())]
    Dtype { name: String, path: PathBuf, dtype: String },
}

/// An open checkpoint directory. Dropping it unmaps the files.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Entry>,
}

struct WeightFile {
    path: PathBuf,
    map: Mmap,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range in the file.
    bytes: std::ops::Range<usize>,
}

/// A borrowed tensor, row-major, last dimension fastest.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub name: &'a str,
    path: &'a Path,
    pub shape: &'a [usize],
    dtype: Dtype,
    bytes: &'a [u8],
}

impl Checkpoint {
    pub fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
        let path = dir.join(CONFIG_FILE);
        let config = ModelConfig::read(&path)
            .map_err(|source| LoadError::Io { path: path.clone(), source })?
            .map_err(|source| LoadError::Config { path, source })?;
        let mut checkpoint =
            Checkpoint { dir: dir.to_owned(), config, files: Vec::new(), tensors: BTreeMap::new() };
        if dir.join(SINGLE_FILE).exists() {
            checkpoint.add_file(dir.join(SINGLE_FILE))?;
        } else if dir.join(INDEX_FILE).exists() {
            checkpoint.add_shards(&dir.join(INDEX_FILE))?;
        } else {
            return Err(LoadError::NoWeights { dir: dir.to_owned() });
        }
        Ok(checkpoint)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, LoadError> {
        let (name, entry) = self
            .tensors
            .get_key_value(name)
            .ok_or_else(|| LoadError::MissingTensor { name: name.to_owned(), dir: self.dir.clone() })?;
        let file = &self.files[entry.file];
        let bytes = &file.map[entry.bytes.clone()];
        Ok(Tensor { name, path: &file.path, shape: &entry.shape, dtype: entry.dtype, bytes })
    }

    /// The tensor, if it has exactly this shape.
    pub fn shaped(&self, name: &str, expected: &[usize]) -> Result<Tensor<'_>, LoadError> {
        let tensor = self.tensor(name)?;
        if tensor.shape == expected {
            return Ok(tensor);
        }
        Err(LoadError::Shape {
            name: name.to_owned(),
            path: tensor.path.to_owned(),
            found: tensor.shape.to_vec(),
            expected: expected.to_vec(),
        })
    }

    /// Fails on the first tensor outside `known` that is not a buffer which every loader recomputes.
    pub fn reject_extra(&self, known: &BTreeSet<String>) -> Result<(), LoadError> {
        let extra = self.tensors.iter().find(|(name, _)| !known.contains(*name) && !is_recomputed(name));
        match extra {
            Some((name, entry)) => {
                Err(LoadError::ExtraTensor { name: name.clone(), path: self.files[entry.file].path.clone() })
            }
            None => Ok(()),
        }
    }

    /// SHA-256 over everything that decides an answer: configuration, tokenizer, weights.
    pub fn content_hash(&self) -> Result<String, LoadError> {
        let mut hash = Sha256::new();
        for name in [CONFIG_FILE, "tokenizer.json"] {
            let path = self.dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => hash_part(&mut hash, name, &bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(LoadError::Io { path, source }),
            }
        }
        for file in &self.files {
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            hash_part(&mut hash, &name, &file.map);
        }
        Ok(hex::encode(hash.finalize()))
    }

    fn add_shards(&mut self, index: &Path) -> Result<(), LoadError> {
        let malformed = |problem: String| LoadError::Malformed { path: index.to_owned(), problem };
        let bytes =
            std::fs::read(index).map_err(|source| LoadError::Io { path: index.to_owned(), source })?;
        let json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| malformed(format!("is not JSON: {error}")))?;
        let map = json
            .get("weight_map")
            .and_then(|map| map.as_object())
            .ok_or_else(|| malformed("has no `weight_map` object".to_owned()))?;
        let mut shards = BTreeSet::new();
        for (name, shard) in map {
            let shard = shard.as_str().filter(|shard| Path::new(shard).file_name() == Some(shard.as_ref()));
            shards.insert(
                shard.ok_or_else(|| malformed(format!("`weight_map` gives no file name for `{name}`")))?,
            );
        }
        for shard in shards {
            self.add_file(self.dir.join(shard))?;
        }
        match map.keys().find(|name| !self.contains(name)) {
            Some(name) => Err(LoadError::MissingTensor { name: name.clone(), dir: self.dir.clone() }),
            None => Ok(()),
        }
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let io = |source| LoadError::Io { path: path.clone(), source };
        let handle = File::open(&path).map_err(io)?;
        // SAFETY: the map is read-only and private to this value. That nobody truncates or rewrites a model file while it is
        // being loaded is the operator's duty, as for every mmapping loader; after loading no reference remains.
        #[expect(unsafe_code)]
        let map = unsafe { Mmap::map(&handle) }.map_err(io)?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| LoadError::Malformed { path: path.clone(), problem: describe(&map, error) })?;
        let file = self.files.len();
        let start = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { file, dtype: info.dtype, shape: info.shape.clone(), bytes };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(LoadError::Malformed {
                    path,
                    problem: format!("tensor `{name}` is in another shard too"),
                });
            }
        }
        self.files.push(WeightFile { path, map });
        Ok(())
    }
}

impl Tensor<'_> {
    pub fn dtype(&self) -> &'static str {
        match self.dtype {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            _ => "bf16",
        }
    }

    /// Fails unless [`Tensor::read`] can convert this dtype.
    pub fn checked(self) -> Result<Self, LoadError> {
        match self.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(self),
            other => Err(LoadError::Dtype {
                name: self.name.to_owned(),
                path: self.path.to_owned(),
                dtype: format!("{other:?}").to_lowercase(),
            }),
        }
    }

    /// Elements `start..start + out.len()`, in memory order, as f32.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let width = if self.dtype == Dtype::F32 { 4 } else { 2 };
        let bytes = &self.bytes[start * width..(start + out.len()) * width];
        let halves = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        match self.dtype {
            Dtype::F32 => {
                let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
                out.iter_mut().zip(words).for_each(|(out, word)| *out = f32::from_le_bytes(word));
            }
            Dtype::F16 => {
                out.iter_mut().zip(halves()).for_each(|(out, bits)| *out = f16::from_bits(bits).to_f32())
            }
            _ => out.iter_mut().zip(halves()).for_each(|(out, bits)| *out = bf16::from_bits(bits).to_f32()),
        }
    }

    pub fn to_vec(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        self.read(0, &mut values);
        values
    }
}

/// Decay and rotary buffers that some exporters store; they are functions of config.json.
fn is_recomputed(name: &str) -> bool {
    const BUFFERS: [&str; 6] =
        ["slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq", "slopes"];
    BUFFERS
        .iter()
        .any(|buffer| name.strip_suffix(buffer).is_some_and(|head| head.is_empty() || head.ends_with('.')))
}

fn hash_part(hash: &mut Sha256, name: &str, bytes: &[u8]) {
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// What is wrong with a safetensors file, naming the tensor that a truncation cut.
fn describe(map: &[u8], error: SafeTensorError) -> String {
    if !matches!(error, SafeTensorError::MetadataIncompleteBuffer) {
        return format!("is not a whole safetensors file ({error})");
    }
    let header = u64::from_le_bytes(map[..8].try_into().expect("the header length was read")) as usize;
    let held = map.len() - 8 - header;
    let metadata: Option<Metadata> = serde_json::from_slice(&map[8..8 + header]).ok();
    let cut = metadata.as_ref().and_then(|metadata| {
        let tensors = metadata.tensors();
        let past_end = tensors.into_iter().filter(|(_, info)| info.data_offsets.1 > held);
        past_end.min_by_key(|(_, info)| info.data_offsets.0).map(|(name, _)| name)
    });
    match cut {
        Some(name) => format!("is truncated inside tensor `{name}`: download it again"),
        None => "has bytes after its last tensor: it is not a whole safetensors file".to_owned(),
    }
}
