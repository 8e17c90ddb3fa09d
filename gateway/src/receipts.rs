//! Receipts at the front door: the key that signs them, and the keys that everybody may check them by.
//!
//! ```text
//! x-sluice-receipt, x-sluice-cost-usd    header of a whole answer, trailer over gRPC
//! "sluice":{"cost_usd":..,"receipt":..}  in the last chunk of a stream
//! GET /.well-known/sluice/jwks.json      the public keys: the one in use, then those of `receipts.retired_keys`
//! ```
//! The secret is a JWK in `receipt-key` of the data folder, made at the first start, or in `receipts.key_file`, which
//! several gateways can share. A new key: list the old one's `x` under `receipts.retired_keys`, move its file away, start.

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::Arc,
};

use anyhow::{Context, ensure};
use axum::{Router, extract::State, response::IntoResponse, routing::get};
use http::{HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};
use sluice_billing::{ReceiptKey, ReceiptKeys, ReceiptSigner, UsageEvent};

use crate::{app::App, complete::Finish, config::Config};

/// Where the public keys are, as well-known paths go (RFC 8615).
pub const JWKS_PATH: &str = "/.well-known/sluice/jwks.json";
/// Checkers may keep the keys this long: a new key is listed when it is first used, and an unknown one is looked up.
const JWKS_CACHE: HeaderValue = HeaderValue::from_static("public, max-age=300");
const JWKS_TYPE: HeaderValue = HeaderValue::from_static("application/jwk-set+json");
const RECEIPT: HeaderName = HeaderName::from_static("x-sluice-receipt");
const COST: HeaderName = HeaderName::from_static("x-sluice-cost-usd");
/// Mode bits of everybody who is neither the owner nor in the group.
const OTHERS: u32 = 0o007;

/// What an operator can set.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReceiptSettings {
    /// The secret key, a JWK; made where there is none. Absent: `receipt-key` in the data folder.
    pub key_file: Option<std::path::PathBuf>,
    /// Public keys (their `x`) that are not used any more and whose receipts are still to be checked.
    pub retired_keys: Vec<String>,
}

/// Signs bills. One for the life of the process.
pub struct Receipts {
    signer: ReceiptSigner,
    jwks: String,
}

impl Receipts {
    /// Reads the key, and makes one if there is none.
    pub fn open(config: &Config) -> anyhow::Result<Receipts> {
        let path = config.receipt_key_path();
        if !path.exists() {
            make_key(&path).with_context(|| {
                format!("cannot make the key that signs receipts, {}: check its folder", path.display())
            })?;
        }
        let signer = read_signer(&path)?;
        let jwks = with_retired(&signer, config)?.to_jwks();
        Ok(Receipts { signer, jwks })
    }

    /// The receipt of a durable bill.
    pub fn sign(&self, bill: &UsageEvent) -> String {
        self.signer.sign(bill)
    }
}

/// The public keys of an installation, without making one.
pub fn public_keys(config: &Config) -> anyhow::Result<ReceiptKeys> {
    let path = config.receipt_key_path();
    ensure!(
        path.exists(),
        "no receipt key at {}: name the issuer's public keys with --jwks, or its data folder with --data-dir",
        path.display()
    );
    with_retired(&read_signer(&path)?, config)
}

fn with_retired(signer: &ReceiptSigner, config: &Config) -> anyhow::Result<ReceiptKeys> {
    let mut keys = vec![signer.public().clone()];
    for (index, x) in config.receipts.retired_keys.iter().enumerate() {
        keys.push(ReceiptKey::from_x(x).with_context(|| format!("receipts.retired_keys[{index}] is {x:?}"))?);
    }
    Ok(ReceiptKeys::new(keys))
}

fn read_signer(path: &Path) -> anyhow::Result<ReceiptSigner> {
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the receipt key {shown}"))?;
    let mode = fs::metadata(path)?.permissions().mode();
    ensure!(
        mode & OTHERS == 0,
        "every user of this machine may read the receipt key {shown}: chmod 600 {shown}"
    );
    ReceiptSigner::from_jwk(&text)
        .with_context(|| format!("the receipt key {shown} is damaged: bring it back from a backup"))
}

/// Of several gateways that make one at the same time, the first wins: a link does not replace a file.
fn make_key(path: &Path) -> anyhow::Result<()> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)?;
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&partial)?;
    file.write_all(ReceiptSigner::jwk_of_seed(&seed).as_bytes())?;
    file.sync_all()?;
    let linked = fs::hard_link(&partial, path);
    fs::remove_file(&partial)?;
    match linked {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error.into()),
        // Receipts of a key that a power cut takes away could never be checked.
        Ok(()) => Ok(fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?),
    }
}

/// What a finished answer carries outside of its body.
pub fn headers(finish: &Finish) -> [(HeaderName, HeaderValue); 2] {
    let ascii = |text: &str| HeaderValue::try_from(text).expect("digits, points and base64url are ASCII");
    [(RECEIPT, ascii(&finish.receipt)), (COST, ascii(&finish.cost.to_usd_string()))]
}

pub fn routes() -> Router<Arc<App>> {
    Router::new().route(JWKS_PATH, get(jwks))
}

/// `GET /.well-known/sluice/jwks.json`.
async fn jwks(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, JWKS_TYPE), (header::CACHE_CONTROL, JWKS_CACHE)], app.receipts.jwks.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        Config { data_dir: folder.to_path_buf(), ..Config::default() }
    }

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).expect("the key").permissions().mode() & 0o777
    }

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config(folder.path());
        assert!(public_keys(&config).expect_err("looking makes no key").to_string().contains("--jwks"));
        let first = Receipts::open(&config).expect("a first start");
        let again = Receipts::open(&config).expect("a second start");
        assert_eq!(first.jwks, again.jwks);
        assert_eq!(public_keys(&config).expect("the key").to_jwks(), first.jwks);
        let path = config.receipt_key_path();
        assert_eq!((mode_of(&path), fs::read_dir(folder.path()).expect("a folder").count()), (0o600, 1));

        make_key(&path).expect("a second maker");
        assert_eq!(Receipts::open(&config).expect("the first one's key").jwks, first.jwks);
    }

    #[test]
    fn a_key_that_is_damaged_or_open_to_others_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = config(folder.path());
        Receipts::open(&config).expect("a first start");
        let path = config.receipt_key_path();
        let refusal = || format!("{:#}", Receipts::open(&config).err().expect("a refusal"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).expect("chmod");
        assert!(refusal().contains("chmod 600"), "{}", refusal());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        Receipts::open(&config).expect("a group may share a key");
        fs::write(&path, "{\"kty\":\"OKP\"}").expect("write");
        assert!(refusal().contains("is damaged"), "{}", refusal());
    }

    #[test]
    fn a_retired_key_stays_listed() {
        let (old, new) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let retired: serde_json::Value =
            serde_json::from_str(&Receipts::open(&config(old.path())).expect("a key").jwks).expect("JSON");
        let x = retired["keys"][0]["x"].as_str().expect("a public key").to_owned();
        let mut config = config(new.path());
        config.receipts.retired_keys = vec![x];
        let listed: serde_json::Value =
            serde_json::from_str(&Receipts::open(&config).expect("a key").jwks).expect("JSON");
        assert_eq!(listed["keys"].as_array().map(Vec::len), Some(2));
        assert_eq!(listed["keys"][1], retired["keys"][0], "the one in use comes first");
        config.receipts.retired_keys.push("AAAA".into());
        let refusal = Receipts::open(&config).err().expect("a refusal").to_string();
        assert!(refusal.contains("receipts.retired_keys[1]"), "{refusal}");
    }
}
