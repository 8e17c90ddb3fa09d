//! A node: a model, its engine, and the gRPC service over them.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use sluice_node::node::{Node, NodeOptions};
//!
//! let node = Node::start(NodeOptions::new("models/sluice-demo"))?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
//! node.serve(incoming, async { tokio::signal::ctrl_c().await.unwrap_or_default() }).await?;
//! # Ok(())
//! # }
//! ```

use crate::chat_template::{ChatTemplate, TemplateError};
use crate::constraint::{ConstraintLimits, Grammars};
use crate::engine::{self, EngineError, EngineHandle, EngineLimits};
use crate::kernel::Dtype;
use crate::model::{LoadOptions, Model};
use crate::service::{Service, ServiceLimits};
use crate::state::BLOCK_TOKENS;
use crate::state::disk::DiskLimits;
use crate::state::placement::Placement;
use crate::state::prefixes::PrefixLimits;
use crate::tokenizer::{Tokenizer, TokenizerError};
use futures::Stream;
use sluice_proto::node::v1 as proto;
use sluice_proto::node::v1::node_service_server::NodeServiceServer;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::server::Connected;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

/// What to serve, and within which limits.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct NodeOptions {
    /// Hugging Face directory: config.json, *.safetensors, tokenizer.json, and a chat template
    #[arg(long = "model", value_name = "DIR", help_heading = None)]
    pub model_dir: PathBuf,

    /// Name that requests use for the model [default: the directory's name]
    #[arg(long, value_name = "NAME", help_heading = None)]
    pub model_name: Option<String>,

    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32]
    #[arg(long, value_enum, value_name = "DTYPE", help_heading = None)]
    pub dtype: Option<Dtype>,

    /// Threads that compute
    #[arg(long, value_name = "N", default_value_t = available_threads())]
    pub threads: usize,

    /// Sequences that generate at the same time
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SLOTS)]
    pub slots: usize,

    /// Sequences that wait for a slot; more are refused with RESOURCE_EXHAUSTED
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WAITING_MAX)]
    pub waiting_max: usize,

    /// Tokens computed in one step, prompts and decoding together: larger is better for throughput, smaller for the
    /// time between two tokens while others send long prompts
    #[arg(long, value_name = "N", default_value_t = DEFAULT_STEP_TOKENS_MAX)]
    pub step_tokens_max: usize,

    /// Tokens that the softmax layers keep, over all sequences [default: full contexts in all slots, within 4 GiB]
    #[arg(long, value_name = "N")]
    pub cache_tokens: Option<usize>,

    /// Memory for checkpoints of prompts and of ended conversations, so that what they have in common with a later prompt is
    /// not computed again; 0 turns the cache off
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_CACHE_RAM_BYTES)]
    pub cache_ram_bytes: u64,

    /// Folder for checkpoints that memory has no room for and of conversations that ended, which so outlast a restart; it
    /// belongs to one node and is readable by its user alone [default: none, memory only]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Bytes that --cache-dir may hold
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_CACHE_DISK_BYTES)]
    pub cache_disk_bytes: u64,

    /// Prompt tokens between two checkpoints where no turn ends, a multiple of 64; 0: only at ends of turns
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CACHE_GRID_TOKENS)]
    pub cache_grid_tokens: usize,

    /// Ends of turns in a prompt that get a checkpoint: the first, then the latest
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CACHE_TURNS_MAX)]
    pub cache_turns_max: usize,

    /// How long a sequence waits for a prefix that another sequence is computing, or that is read from --cache-dir, before
    /// it computes the prefix itself
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_CACHE_WAIT_MS)]
    pub cache_wait_ms: u64,

    /// How long a sequence is kept while its client grants nothing
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_GRANT_IDLE_MS)]
    pub grant_idle_ms: u64,

    /// How long it keeps its slot meanwhile, if others wait for one
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_GRANT_PATIENCE_MS)]
    pub grant_patience_ms: u64,

    /// Memory for the state of suspended sequences, beside that of the slots; while it is full, or 0, nobody is suspended
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SUSPENDED_BYTES_MAX)]
    pub suspended_bytes_max: u64,

    /// Tokens that a sequence computes in a slot before it can be suspended for others
    #[arg(long, value_name = "N", default_value_t = DEFAULT_PREEMPT_AFTER_TOKENS)]
    pub preempt_after_tokens: u64,

    /// How many tokens a waiting tenant gets behind before a sequence of another is suspended for it
    #[arg(long, value_name = "N", default_value_t = DEFAULT_PREEMPT_LAG_TOKENS)]
    pub preempt_lag_tokens: u64,

    /// How long a step may take that computes prompts beside decoding, in steps that only decode: smaller keeps tokens
    /// flowing more evenly, larger computes prompts faster
    #[arg(long, value_name = "RATIO", default_value_t = DEFAULT_MIXED_STEP_RATIO)]
    pub mixed_step_ratio: f64,
    /// Longest schema, pattern, grammar or list of tools that constrains an output
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_CONSTRAINT_BYTES_MAX)]
    pub constraint_bytes_max: usize,

    /// How long a request waits for its constraint to be compiled before it is refused
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_CONSTRAINT_WAIT_MS)]
    pub constraint_wait_ms: u64,

    /// Threads that compile constraints, and as many that compute their masks beside the step
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CONSTRAINT_THREADS)]
    pub constraint_threads: usize,

    /// Threads at once that compile longer than --constraint-wait-ms: each has been replaced, and works on for nobody
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CONSTRAINT_GIVEN_UP_MAX)]
    pub constraint_given_up_max: usize,

    /// Longest text that Tokenize takes
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_TOKENIZE_BYTES_MAX)]
    pub tokenize_bytes_max: usize,
}

const DEFAULT_SLOTS: usize = 32;
const DEFAULT_WAITING_MAX: usize = 256;
const DEFAULT_STEP_TOKENS_MAX: usize = 512;
const DEFAULT_GRANT_IDLE_MS: u64 = 30_000;
const DEFAULT_GRANT_PATIENCE_MS: u64 = 50;
const DEFAULT_SUSPENDED_BYTES_MAX: u64 = 1 << 30;
const DEFAULT_PREEMPT_AFTER_TOKENS: u64 = 64;
const DEFAULT_PREEMPT_LAG_TOKENS: u64 = 2048;
const DEFAULT_MIXED_STEP_RATIO: f64 = 2.5;
const DEFAULT_TOKENIZE_BYTES_MAX: usize = 8 << 20;
const DEFAULT_CONSTRAINT_BYTES_MAX: usize = 256 << 10;
const DEFAULT_CONSTRAINT_WAIT_MS: u64 = 5_000;
const DEFAULT_CONSTRAINT_THREADS: usize = 1;
const DEFAULT_CONSTRAINT_GIVEN_UP_MAX: usize = 2;
const DEFAULT_CACHE_BYTES_MAX: u64 = 4 << 30;
const DEFAULT_CACHE_RAM_BYTES: u64 = 1 << 30;
const DEFAULT_CACHE_DISK_BYTES: u64 = 16 << 30;
const DEFAULT_CACHE_GRID_TOKENS: usize = 1024;
const DEFAULT_CACHE_TURNS_MAX: usize = 8;
const DEFAULT_CACHE_WAIT_MS: u64 = 10_000;

/// Holds a prompt of a million ids, and the text of one.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

impl NodeOptions {
    pub fn new(model_dir: impl Into<PathBuf>) -> NodeOptions {
        NodeOptions {
            model_dir: model_dir.into(),
            model_name: None,
            dtype: None,
            threads: available_threads(),
            slots: DEFAULT_SLOTS,
            waiting_max: DEFAULT_WAITING_MAX,
            step_tokens_max: DEFAULT_STEP_TOKENS_MAX,
            cache_tokens: None,
            cache_ram_bytes: DEFAULT_CACHE_RAM_BYTES,
            cache_dir: None,
            cache_disk_bytes: DEFAULT_CACHE_DISK_BYTES,
            cache_grid_tokens: DEFAULT_CACHE_GRID_TOKENS,
            cache_turns_max: DEFAULT_CACHE_TURNS_MAX,
            cache_wait_ms: DEFAULT_CACHE_WAIT_MS,
            grant_idle_ms: DEFAULT_GRANT_IDLE_MS,
            grant_patience_ms: DEFAULT_GRANT_PATIENCE_MS,
            suspended_bytes_max: DEFAULT_SUSPENDED_BYTES_MAX,
            preempt_after_tokens: DEFAULT_PREEMPT_AFTER_TOKENS,
            preempt_lag_tokens: DEFAULT_PREEMPT_LAG_TOKENS,
            mixed_step_ratio: DEFAULT_MIXED_STEP_RATIO,
            constraint_bytes_max: DEFAULT_CONSTRAINT_BYTES_MAX,
            constraint_wait_ms: DEFAULT_CONSTRAINT_WAIT_MS,
            constraint_threads: DEFAULT_CONSTRAINT_THREADS,
            constraint_given_up_max: DEFAULT_CONSTRAINT_GIVEN_UP_MAX,
            tokenize_bytes_max: DEFAULT_TOKENIZE_BYTES_MAX,
        }
    }

    fn check(&self) -> Result<(), StartError> {
        let refuse = |field, reason: String| Err(StartError::Option { field, reason });
        for (field, value) in [
            ("threads", self.threads),
            ("slots", self.slots),
            ("waiting-max", self.waiting_max),
            ("tokenize-bytes-max", self.tokenize_bytes_max),
            ("constraint-bytes-max", self.constraint_bytes_max),
            ("constraint-threads", self.constraint_threads),
        ] {
            if value == 0 {
                return refuse(field, "must be at least 1".to_owned());
            }
            if field.ends_with("threads") && value > THREADS_MAX {
                return refuse(field, format!("must be at most {THREADS_MAX}"));
            }
            if matches!(field, "slots" | "waiting-max") && value > SEQUENCES_MAX {
                return refuse(field, format!("must be at most {SEQUENCES_MAX}"));
            }
        }
        if self.constraint_given_up_max > THREADS_MAX {
            return refuse("constraint-given-up-max", format!("must be at most {THREADS_MAX}"));
        }
        if self.model_name.as_deref() == Some("") {
            return refuse(
                "model-name",
                "must not be empty; leave it out for the name of the folder".to_owned(),
            );
        }
        if self.cache_tokens.is_some_and(|tokens| tokens == 0 || tokens > CACHE_TOKENS_MAX) {
            return refuse("cache-tokens", format!("must be 1 to {CACHE_TOKENS_MAX}"));
        }
        for (field, value_ms) in [
            ("grant-idle-ms", self.grant_idle_ms),
            ("grant-patience-ms", self.grant_patience_ms),
            ("cache-wait-ms", self.cache_wait_ms),
            ("constraint-wait-ms", self.constraint_wait_ms),
        ] {
            if value_ms > WAIT_MS_MAX {
                return refuse(field, format!("must be at most {WAIT_MS_MAX}, a day"));
            }
        }
        if self.step_tokens_max <= self.slots {
            let reason =
                format!("must be more than --slots ({}), or decoding leaves no room for prompts", self.slots);
            return refuse("step-tokens-max", reason);
        }
        if !self.cache_grid_tokens.is_multiple_of(BLOCK_TOKENS) {
            let reason = format!("must be a multiple of {BLOCK_TOKENS}, the block of the state");
            return refuse("cache-grid-tokens", reason);
        }
        if self.cache_dir.is_some() && self.cache_ram_bytes == 0 {
            let reason = "needs memory too: --cache-ram-bytes 0 turns the whole cache off".to_owned();
            return refuse("cache-dir", reason);
        }
        if self.preempt_after_tokens == 0 {
            return refuse("preempt-after-tokens", "must be at least 1".to_owned());
        }
        if !(self.mixed_step_ratio > 1.0 && self.mixed_step_ratio <= MIXED_STEP_RATIO_MAX) {
            let reason =
                format!("must be over 1, which leaves prompts nothing, and at most {MIXED_STEP_RATIO_MAX}");
            return refuse("mixed-step-ratio", reason);
        }
        if !self.model_dir.is_dir() {
            return Err(StartError::NoDirectory(self.model_dir.clone()));
        }
        if !self.model_dir.join("config.json").is_file() {
            return Err(StartError::NoModel(self.model_dir.clone()));
        }
        Ok(())
    }

    fn prefix_limits(&self) -> PrefixLimits {
        let disk = self.cache_dir.clone().map(|dir| DiskLimits { dir, bytes: self.cache_disk_bytes });
        PrefixLimits {
            ram_bytes: self.cache_ram_bytes,
            disk,
            placement: Placement { grid_tokens: self.cache_grid_tokens, turns_max: self.cache_turns_max },
            wait: Duration::from_millis(self.cache_wait_ms),
        }
    }

    fn cache_tokens(&self, model: &Model) -> usize {
        let context = model.config().context_tokens_max;
        self.cache_tokens.unwrap_or_else(|| {
            let affordable = DEFAULT_CACHE_BYTES_MAX / model.cache_bytes_per_token().max(1);
            (self.slots * context).min(usize::try_from(affordable).unwrap_or(usize::MAX)).max(context)
        })
    }
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("--{field} {reason}")]
    Option { field: &'static str, reason: String },
    #[error("{0} is not a directory; a model is one with config.json, *.safetensors and tokenizer.json")]
    NoDirectory(PathBuf),
    #[error(
        "{0} has no config.json; a model is a directory with config.json, *.safetensors and tokenizer.json"
    )]
    NoModel(PathBuf),
    #[error(transparent)]
    Model(#[from] crate::checkpoint::LoadError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("{path}: {reason}")]
    GenerationConfig { path: PathBuf, reason: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Waits beyond a day are a typing error.
const WAIT_MS_MAX: u64 = 24 * 3600 * 1000;
/// Sequences that run or wait beyond this are a typing error.
const SEQUENCES_MAX: usize = 1 << 20;
/// Threads beyond this are a typing error.
const THREADS_MAX: usize = 1024;
/// Beyond it a figure is a typing error: terabytes of any model.
const CACHE_TOKENS_MAX: usize = 1 << 32;
/// Beyond this there is no bound worth the name: `--step-tokens-max` sets it.
const MIXED_STEP_RATIO_MAX: f64 = 1000.0;

/// A running node. Dropped, its engine stops once the last sequence has ended.
pub struct Node {
    dtype: Dtype,
    service: Service,
    health: HealthReporter,
}

impl Node {
    /// Loads the model and starts the engine. Blocks; call it off the async threads.
    pub fn start(options: NodeOptions) -> Result<Node, StartError> {
        options.check()?;
        let dir = &options.model_dir;
        let started_at = Instant::now();
        let model =
            Arc::new(Model::load(dir, &LoadOptions { threads: options.threads, dtype: options.dtype })?);
        let (config, dtype) = (model.config(), model.dtype());
        let tokenizer = Arc::new(Tokenizer::load(dir, config.vocab_size)?);
        let template = ChatTemplate::load(dir, &tokenizer)?;
        let generation = GenerationConfig::load(dir, config.vocab_size)?;
        let end_of_sequence = match generation.end_of_sequence {
            ids if ids.is_empty() => config.eos_token_ids.clone(),
            ids => ids,
        };
        let mut description = describe(&model, &options);
        description.sampling_defaults = Some(generation.sampling);
        let limits = EngineLimits {
            threads: options.threads,
            slots: options.slots,
            waiting_max: options.waiting_max,
            step_tokens_max: options.step_tokens_max,
            cache_tokens: options.cache_tokens(&model),
            grant_idle: Duration::from_millis(options.grant_idle_ms),
            prefixes: options.prefix_limits(),
            grant_patience: Duration::from_millis(options.grant_patience_ms),
            suspended_bytes_max: options.suspended_bytes_max,
            preempt_after_tokens: options.preempt_after_tokens,
            preempt_lag_tokens: options.preempt_lag_tokens,
            mixed_step_ratio: options.mixed_step_ratio,
            mask_threads: options.constraint_threads,
        };
        let grammars = Grammars::start(
            &tokenizer,
            &end_of_sequence,
            template.as_ref().and_then(ChatTemplate::tool_format),
            ConstraintLimits {
                source_bytes_max: options.constraint_bytes_max,
                compile_wait_max: Duration::from_millis(options.constraint_wait_ms),
                compile_threads: options.constraint_threads,
                compile_waiting_max: options.waiting_max,
                compile_given_up_max: options.constraint_given_up_max,
            },
        )
        .map_err(EngineError::Thread)?;
        let engine = engine::start(model, tokenizer.clone(), end_of_sequence, limits)?;
        let limits = ServiceLimits {
            slots: options.slots,
            waiting_max: options.waiting_max,
            tokenize_bytes_max: options.tokenize_bytes_max,
            tokenize_threads: options.threads,
        };
        tracing::info!(
            model = description.name,
            parameters = description.parameters,
            kernel = description.kernel,
            threads = options.threads,
            load_ms = started_at.elapsed().as_millis() as u64,
            "the engine runs"
        );
        let service = Service::new(engine, tokenizer, template, grammars, description, limits);
        Ok(Node { dtype, service, health: HealthReporter::new() })
    }

    /// Serves the node's contract, health and reflection on every connection of `incoming`, TCP or in memory, until
    /// `shutdown`; then finishes what runs on them.
    pub async fn serve<I, IO>(
        &self,
        incoming: I,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error>
    where
        I: Stream<Item = io::Result<IO>>,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        if !self.service.is_draining() {
            self.health.set_serving::<NodeServiceServer<Service>>().await;
        }
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(sluice_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("sluice.node.v1.NodeService")
                .with_service_name("grpc.health.v1.Health")
        };
        let reflection_v1 = reflection().build_v1().expect("the compiled-in descriptors are valid");
        let reflection_v1alpha = reflection().build_v1alpha().expect("the compiled-in descriptors are valid");
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(self.service.streams_max())
            .add_service(
                NodeServiceServer::new(self.service.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(HealthServer::new(HealthService::from_health_reporter(self.health.clone())))
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .serve_with_incoming_shutdown(incoming, shutdown)
            .await
    }

    /// Refuses new sequences (UNAVAILABLE), waits until every sequence has ended and its client has read the end, and until what
    /// they leave to the cache is on disk.
    ///
    /// # Cancel safety
    /// The node goes on draining.
    pub async fn drain(&self) {
        self.service.refuse_new();
        self.health.set_not_serving::<NodeServiceServer<Service>>().await;
        self.health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        self.service.drained().await;
        self.service.engine().flush_cache().await;
    }

    pub fn models(&self) -> &[proto::ModelDescription] {
        self.service.models()
    }

    /// What the model's weights are stored and multiplied as.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same engine, without gRPC between.
    pub fn engine(&self) -> &EngineHandle {
        self.service.engine()
    }

    pub fn service(&self) -> &Service {
        &self.service
    }
}

/// What a model is called that nobody named.
pub fn name_of(dir: &Path) -> String {
    let name = dir.canonicalize().ok();
    let name = name.as_ref().and_then(|dir| dir.file_name()).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".to_owned())
}

fn describe(model: &Model, options: &NodeOptions) -> proto::ModelDescription {
    let config = model.config();
    let dir = &options.model_dir;
    proto::ModelDescription {
        name: options.model_name.clone().unwrap_or_else(|| name_of(dir)),
        content_hash: model.content_hash().to_owned(),
        context_tokens_max: u32::try_from(config.context_tokens_max).unwrap_or(u32::MAX),
        vocabulary_size: u32::try_from(config.vocab_size).unwrap_or(u32::MAX),
        kernel: model.kernel_name().to_owned(),
        weights_dtype: model.dtype().name().to_owned(),
        parameters: model.parameters(),
        active_parameters: model.active_parameters(),
        state_bytes_per_sequence: model.state_bytes_per_sequence(),
        cache_bytes_per_token: model.cache_bytes_per_token(),
        created_s: modified_s(&dir.join("config.json")),
        sampling_defaults: None,
    }
}

fn modified_s(path: &Path) -> i64 {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let since_epoch = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since_epoch.and_then(|age| i64::try_from(age.as_secs()).ok()).unwrap_or(0)
}

/// What generation_config.json says, if there is one.
#[derive(Default)]
struct GenerationConfig {
    end_of_sequence: Vec<u32>,
    sampling: proto::SamplingDefaults,
}

impl GenerationConfig {
    fn load(dir: &Path, vocab_size: usize) -> Result<GenerationConfig, StartError> {
        #[derive(serde::Deserialize)]
        struct File {
            eos_token_id: Option<OneOrMany>,
            temperature: Option<f32>,
            top_p: Option<f32>,
            top_k: Option<u32>,
        }
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum OneOrMany {
            One(u32),
            Many(Vec<u32>),
        }
        let path = dir.join("generation_config.json");
        let refuse = |reason: String| StartError::GenerationConfig { path: path.clone(), reason };
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(GenerationConfig::default()),
            Err(error) => return Err(refuse(error.to_string())),
        };
        let file: File = serde_json::from_slice(&bytes).map_err(|error| {
            refuse(format!("eos_token_id must be a token id or a list of them, temperature, top_p and top_k numbers: {error}"))
        })?;
        let end_of_sequence = match file.eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        };
        if let Some(id) = end_of_sequence.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(refuse(format!("eos_token_id: {id} is not in the vocabulary of {vocab_size}")));
        }
        if file.temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature)) {
            return Err(refuse("temperature must be between 0 and 2".to_owned()));
        }
        if file.top_p.is_some_and(|top_p| !(top_p > 0.0 && top_p <= 1.0)) {
            return Err(refuse("top_p must be over 0 and at most 1".to_owned()));
        }
        let sampling =
            proto::SamplingDefaults { temperature: file.temperature, top_p: file.top_p, top_k: file.top_k };
        Ok(GenerationConfig { end_of_sequence, sampling })
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
