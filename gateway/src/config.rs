//! One configuration: built-in defaults, then a TOML file, then `SLUICE_*` environment variables, then flags.
//!
//! ```toml
//! listen = "0.0.0.0:8080"
//! data_dir = "/var/lib/sluice"
//! nodes = ["http://10.0.0.7:50051"]
//!
//! [connections]
//! connections_max = 20000
//!
//! [billing]
//! outbox_events_max = 500000
//! ```
//! Nested names take two underscores in the environment: `SLUICE_CONNECTIONS__CONNECTIONS_MAX=20000`.

use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Serialize};
use sluice_billing::{BillingLimits, InvoiceRules, Money, PICO_PER_USD, TaxRules};

use crate::{app::Limits, receipts::ReceiptSettings, server::ConnectionLimits, webhooks::WebhookSettings};

const PICO_PER_MICRO_USD: i64 = PICO_PER_USD / 1_000_000;

/// Everything an operator can set. Unknown names are refused, so that a typing error is not a silent default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port for REST and gRPC; port 0 takes a free one.
    pub listen: String,
    /// Outbox, first keys and, unless `database_url` says otherwise, the database.
    pub data_dir: PathBuf,
    /// `postgres://USER:PASSWORD@HOST/DATABASE`, which several gateways may share, or `sqlite:PATH`. Absent: a SQLite file in
    /// `data_dir`.
    pub database_url: Option<String>,
    /// The name of this gateway in the ledger and in logs.
    pub gateway: String,
    /// Remote inference nodes. Empty: one runs in this process.
    pub nodes: Vec<String>,
    /// How long a drain waits for streams in flight before it gives up on them.
    pub drain_timeout_ms: u64,
    pub database: DatabaseLimits,
    pub billing: BillingSettings,
    pub node: EmbeddedNode,
    pub connections: ConnectionLimits,
    pub limits: Limits,
    pub receipts: ReceiptSettings,
    pub webhooks: WebhookSettings,
    pub invoices: InvoiceRules,
    pub tax: TaxRules,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: "127.0.0.1:8080".to_owned(),
            data_dir: default_data_dir(),
            database_url: None,
            gateway: "gateway-0".to_owned(),
            nodes: Vec::new(),
            drain_timeout_ms: 120_000,
            database: DatabaseLimits::default(),
            billing: BillingSettings::default(),
            node: EmbeddedNode::default(),
            connections: ConnectionLimits::default(),
            limits: Limits::default(),
            receipts: ReceiptSettings::default(),
            webhooks: WebhookSettings::default(),
            invoices: InvoiceRules::default(),
            tax: TaxRules::default(),
        }
    }
}

/// Connections to the database.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseLimits {
    pub connections_max: u32,
    /// How long a statement waits for a connection, and in SQLite for another writer.
    pub wait_ms_max: u64,
}

impl Default for DatabaseLimits {
    fn default() -> Self {
        DatabaseLimits { connections_max: 8, wait_ms_max: 10_000 }
    }
}

/// The limits of holds, leases, outbox and shipper: billing's own ([`BillingLimits`]) as an operator writes them. 0 is
/// refused where it would stop the platform rather than limit it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BillingSettings {
    /// Output tokens that a hold covers at admission, if the account affords them.
    pub hold_output_tokens: u64,
    /// Millionths of a dollar that this gateway leases of an account at a time; it fetches more when half of it is used. 0
    /// leases for one request at a time.
    pub lease_slice_micro_usd: u64,
    /// A lease that its gateway has not renewed for this long goes back to the account. No stream may last longer while the
    /// database does not answer.
    pub lease_ttl_s: NonZeroU64,
    /// What was leased and not used for this long goes back, so that other gateways can have it.
    pub lease_idle_ms: u64,
    /// Bills that may wait for the database, those of open requests included; at the limit, new requests get 503.
    pub outbox_events_max: NonZeroU64,
    /// Bills that share one fsync at most.
    pub commit_events_max: NonZeroUsize,
    /// Bills that one ledger transaction posts at most.
    pub ship_events_max: NonZeroUsize,
    /// How long a bill waits for others before it is shipped.
    pub ship_linger_ms: u64,
    /// The longest pause between two attempts while the database does not answer, and the Retry-After of a full outbox.
    pub ship_backoff_ms_max: NonZeroU64,
    /// How soon new price books and budgets are taken up, and how often idle leases are looked for.
    pub refresh_ms: NonZeroU64,
}

impl Default for BillingSettings {
    fn default() -> Self {
        let limits = BillingLimits::default();
        let positive = |number: u64| NonZeroU64::new(number).expect("the defaults are positive");
        let count = |number: usize| NonZeroUsize::new(number).expect("the defaults are positive");
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).expect("the defaults are short");
        BillingSettings {
            hold_output_tokens: limits.hold_output_tokens,
            lease_slice_micro_usd: (limits.lease_slice.pico() / PICO_PER_MICRO_USD).unsigned_abs(),
            lease_ttl_s: positive(limits.lease_ttl.as_secs()),
            lease_idle_ms: ms(limits.lease_idle),
            outbox_events_max: positive(limits.outbox_events_max),
            commit_events_max: count(limits.commit_events_max),
            ship_events_max: count(limits.ship_events_max),
            ship_linger_ms: ms(limits.ship_linger),
            ship_backoff_ms_max: positive(ms(limits.ship_backoff_max)),
            refresh_ms: positive(ms(limits.refresh)),
        }
    }
}

impl BillingSettings {
    pub fn limits(&self) -> BillingLimits {
        // More than a Money can hold is as good as the most it can hold: nobody has that.
        let slice_pico = i64::try_from(self.lease_slice_micro_usd)
            .ok()
            .and_then(|micro| micro.checked_mul(PICO_PER_MICRO_USD));
        BillingLimits {
            hold_output_tokens: self.hold_output_tokens,
            lease_slice: slice_pico.map_or(Money::MAX, Money::from_pico),
            lease_ttl: Duration::from_secs(self.lease_ttl_s.get()),
            lease_idle: Duration::from_millis(self.lease_idle_ms),
            outbox_events_max: self.outbox_events_max.get(),
            commit_events_max: self.commit_events_max.get(),
            ship_events_max: self.ship_events_max.get(),
            ship_linger: Duration::from_millis(self.ship_linger_ms),
            ship_backoff_max: Duration::from_millis(self.ship_backoff_ms_max.get()),
            refresh: Duration::from_millis(self.refresh_ms.get()),
        }
    }
}

/// The node that runs in this process where no remote one is named. A value left out is the node's own default.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddedNode {
    /// A Hugging Face model directory; absent: the bundled model.
    pub model: Option<PathBuf>,
    /// What weights are stored and multiplied as: f32, bf16 or int8; absent: bf16 where the checkpoint is bf16, else f32.
    pub dtype: Option<String>,
    pub threads: Option<usize>,
    /// Sequences computed at the same time.
    pub slots: Option<usize>,
    /// Sequences that may wait for a slot before new ones are refused.
    pub waiting_max: Option<usize>,
    /// Memory for what prompts have in common; 0 turns the cache off.
    pub cache_ram_bytes: Option<u64>,
    /// Folder in which ended conversations outlast a restart; absent: memory only.
    pub cache_dir: Option<PathBuf>,
    pub cache_disk_bytes: Option<u64>,
}

impl Config {
    /// Layers `flags` (anything that serialises to a map; absent values left out) over environment, file and defaults.
    pub fn load(file: Option<&Path>, flags: impl Serialize) -> anyhow::Result<Config> {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        if let Some(file) = file {
            anyhow::ensure!(file.is_file(), "no configuration file at {}", file.display());
            figment = figment.merge(Toml::file_exact(file));
        }
        let config: Config = figment
            .merge(environment())
            .merge(Serialized::defaults(flags))
            .extract()
            .map_err(|error| anyhow::anyhow!("configuration: {error}"))?;
        config.invoices.check().context("configuration")?;
        config.tax.check().context("configuration")?;
        Ok(config)
    }

    /// The font of invoices, where one is named. One that cannot be used is refused.
    pub fn invoice_font(&self) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(path) = &self.invoices.font else { return Ok(None) };
        let problem = || format!("invoices.font: {}", path.display());
        let font = std::fs::read(path).with_context(problem)?;
        sluice_billing::check_font(&font).with_context(problem)?;
        Ok(Some(font))
    }

    /// Where the database is.
    pub fn database_url(&self) -> String {
        let file = || format!("sqlite:{}", self.data_dir.join("ledger.db").display());
        self.database_url.clone().unwrap_or_else(file)
    }

    pub fn outbox_path(&self) -> PathBuf {
        self.data_dir.join("outbox.db")
    }

    /// The key that signs receipts.
    pub fn receipt_key_path(&self) -> PathBuf {
        self.receipts.key_file.clone().unwrap_or_else(|| self.data_dir.join("receipt-key"))
    }

    pub fn credentials_path(&self) -> PathBuf {
        self.data_dir.join("credentials.json")
    }
}

/// Variables whose first name is a setting. Others are somebody else's: an orchestrator that knows a service called
/// `sluice` sets `SLUICE_PORT`, say.
fn environment() -> Env {
    let settings = settings();
    Env::prefixed("SLUICE_").filter(move |name| is_setting(&settings, name.as_str())).split("__")
}

fn settings() -> serde_json::Value {
    serde_json::to_value(Config::default()).expect("a configuration is plain data")
}

fn is_setting(settings: &serde_json::Value, name: &str) -> bool {
    let first = name.split("__").next().unwrap_or_default();
    settings.get(first.to_ascii_lowercase()).is_some()
}

/// `$XDG_DATA_HOME/sluice`, else `~/.local/share/sluice`, else `./sluice-data`.
fn default_data_dir() -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map_or_else(|| PathBuf::from("sluice-data"), |base| base.join("sluice"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_sets_what_is_a_setting_and_nothing_else() {
        let settings = settings();
        for (name, expect) in [
            ("LISTEN", true),
            ("data_dir", true),
            ("CONNECTIONS__HEADERS_MAX", true),
            ("PORT", false),
            ("SERVICE_HOST", false),
            ("NODE_SERVICE_HOST", false),
        ] {
            assert_eq!(is_setting(&settings, name), expect, "{name}");
        }
    }

    #[test]
    fn billing_settings_are_billings_own_limits_by_default() {
        let (written, meant) = (BillingSettings::default().limits(), BillingLimits::default());
        assert_eq!(format!("{written:?}"), format!("{meant:?}"));
        let boundless = BillingSettings { lease_slice_micro_usd: u64::MAX, ..BillingSettings::default() };
        assert_eq!(boundless.limits().lease_slice, Money::MAX);
    }

    #[test]
    fn flags_win_over_the_file_and_typing_errors_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("sluice.toml");
        std::fs::write(
            &file,
            "listen = \"127.0.0.1:1\"\ndrain_timeout_ms = 7\n[connections]\nconnections_max = 3\n",
        )
        .expect("write");
        let flags = serde_json::json!({ "listen": "127.0.0.1:2" });
        let config = Config::load(Some(&file), flags).expect("a configuration");
        assert_eq!(config.listen, "127.0.0.1:2");
        assert_eq!((config.drain_timeout_ms, config.connections.connections_max), (7, 3));
        assert_eq!(config.connections.headers_max, ConnectionLimits::default().headers_max);

        std::fs::write(&file, "[billing]\noutbox_events_max = 7\nlease_slice_micro_usd = 3\n")
            .expect("write");
        let limits =
            Config::load(Some(&file), serde_json::json!({})).expect("a configuration").billing.limits();
        assert_eq!((limits.outbox_events_max, limits.lease_slice), (7, Money::from_pico(3_000_000)));
        for (text, field) in
            [("commit_events_max = 0", "commit_events_max"), ("outbox_event_max = 5", "outbox_event_max")]
        {
            std::fs::write(&file, format!("[billing]\n{text}\n")).expect("write");
            let error = Config::load(Some(&file), serde_json::json!({})).expect_err(text).to_string();
            assert!(error.contains(field), "{error}");
        }

        std::fs::write(&file, "lisen = \"127.0.0.1:1\"").expect("write");
        let error = Config::load(Some(&file), serde_json::json!({})).expect_err("a typing error").to_string();
        assert!(error.contains("lisen"), "{error}");
    }
}
