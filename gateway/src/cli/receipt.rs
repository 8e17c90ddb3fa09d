//! `sluice receipt verify | keys`: receipts, checked by whoever holds them.

use std::{io::Read, path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};
use sluice_billing::{Books, PriceBook, RECEIPT_BYTES_MAX, Receipt, ReceiptKey, ReceiptKeys};

use super::{ConfigArgs, print_json};
use crate::receipts;

/// A set of public keys takes a quarter of a kilobyte a key.
const JWKS_BYTES_MAX: usize = 256 * 1024;
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub struct ReceiptArgs {
    #[command(subcommand)]
    command: ReceiptCommand,
}

#[derive(Debug, Subcommand)]
enum ReceiptCommand {
    /// Check a receipt: who signed it and, given the prices or the books, its cost and its bill. Fails if one is wrong.
    #[command(after_help = "\
Examples:
  sluice receipt verify --jwks http://127.0.0.1:8080/.well-known/sluice/jwks.json eyJhbGciOi..
  curl -so keys.json https://api.example.com/.well-known/sluice/jwks.json
  curl -sD- .. | sed -n 's/^x-sluice-receipt: //p' | sluice receipt verify --jwks keys.json --prices prices.toml -
  sluice receipt verify --data-dir /var/lib/sluice -      also against the ledger, with the folder's own keys")]
    Verify(VerifyArgs),
    /// The public keys of this installation's receipts: the JWK set that it serves.
    Keys {
        #[command(flatten)]
        config: ConfigArgs,
        /// It is JSON with and without this.
        #[arg(long, hide = true)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The receipt; - reads it from stdin.
    receipt: String,
    /// The issuer's public keys, a JWK set, from a file or over plain http [default: those of the data folder].
    #[arg(long, value_name = "URL|FILE")]
    jwks: Option<String>,
    /// One public key, a JWK.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The price book that the receipt names: its cost is derived again.
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    #[arg(long)]
    json: bool,
}

/// What one check came to.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    outcome: Outcome,
    detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Holds,
    Failed,
    Skipped,
}

impl ReceiptArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            ReceiptCommand::Verify(args) => args.run().await,
            ReceiptCommand::Keys { config, .. } => {
                let keys = receipts::public_keys(&config.load()?)?;
                print_json(&serde_json::from_str::<Value>(&keys.to_jwks())?)
            }
        }
    }
}

impl VerifyArgs {
    async fn run(self) -> anyhow::Result<()> {
        let text = self.text()?;
        let keys = self.keys().await?;
        let (receipt, findings) = match keys.verify(&text) {
            Ok(receipt) => {
                let findings = vec![
                    Finding::holds("signature", "it is as one of the keys signed it"),
                    self.check_prices(&receipt)?,
                    self.check_books(&receipt).await?,
                ];
                (Some(receipt), findings)
            }
            Err(error) => (None, vec![Finding::failed("signature", &anyhow::Error::new(error))]),
        };
        let failure = findings.iter().find(|finding| finding.outcome == Outcome::Failed);
        match self.json {
            true => {
                let valid = failure.is_none();
                print_json(&json!({ "valid": valid, "receipt": receipt, "checks": findings }))?;
            }
            false => print(receipt.as_ref(), &findings),
        }
        match failure {
            Some(Finding { check, detail, .. }) => bail!("the receipt is not good: {check}: {detail}"),
            None => Ok(()),
        }
    }

    fn text(&self) -> anyhow::Result<String> {
        if self.receipt != "-" {
            return Ok(self.receipt.clone());
        }
        let mut text = String::new();
        // One byte more than there may be, and the end of the line.
        let bytes_max = RECEIPT_BYTES_MAX as u64 + 3;
        std::io::stdin().take(bytes_max).read_to_string(&mut text).context("cannot read stdin")?;
        let line = text.strip_suffix('\n').unwrap_or(&text);
        Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
    }

    async fn keys(&self) -> anyhow::Result<ReceiptKeys> {
        let mut keys = Vec::new();
        if let Some(place) = &self.jwks {
            let text = match place.starts_with("http://") || place.starts_with("https://") {
                true => fetch(place).await?,
                false => {
                    std::fs::read_to_string(place).with_context(|| format!("cannot read --jwks {place}"))?
                }
            };
            let set = ReceiptKeys::from_jwks(&text).with_context(|| format!("--jwks {place}"))?;
            keys.extend(set.iter().cloned());
        }
        if let Some(path) = &self.key {
            let shown = path.display();
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read --key {shown}"))?;
            keys.push(ReceiptKey::from_jwk(&text).with_context(|| format!("--key {shown}"))?);
        }
        match keys.is_empty() {
            true => receipts::public_keys(&self.config.load()?),
            false => Ok(ReceiptKeys::new(keys)),
        }
    }

    fn check_prices(&self, receipt: &Receipt) -> anyhow::Result<Finding> {
        let Some(path) = &self.prices else {
            return Ok(Finding::skipped("prices", "name the price book with --prices FILE"));
        };
        let shown = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read --prices {shown}"))?;
        let book = PriceBook::from_toml(&text).with_context(|| format!("--prices {shown}"))?;
        Ok(match receipt.check_cost(&book) {
            Ok(()) => Finding::holds("prices", "the cost follows from the quantities and this price book"),
            Err(mismatch) => Finding::failed("prices", &mismatch.into()),
        })
    }

    /// Against the ledger: its price book of that hash, and its bill of that request.
    async fn check_books(&self, receipt: &Receipt) -> anyhow::Result<Finding> {
        if !self.config.is_given() {
            return Ok(Finding::skipped("ledger", "name the books with --data-dir DIR"));
        }
        let (_, database) = self.config.database().await?;
        let books = Books::open(database).await.context("cannot open the books")?;
        let compared = async {
            receipt.check_cost(&books.price_book(&receipt.price_book).await?)?;
            let Some(billed) = books.billed(receipt.request_id).await? else {
                bail!("the ledger has no bill of this request; one arrives there a moment after its answer");
            };
            Ok(receipt.check_bill(&billed)?)
        };
        Ok(match compared.await {
            Ok(()) => Finding::holds("ledger", "the ledger's bill and price book say the same"),
            Err(error) => Finding::failed("ledger", &error),
        })
    }
}

impl Finding {
    fn holds(check: &'static str, detail: &str) -> Finding {
        Finding { check, outcome: Outcome::Holds, detail: detail.to_owned() }
    }

    fn skipped(check: &'static str, detail: &str) -> Finding {
        Finding { check, outcome: Outcome::Skipped, detail: detail.to_owned() }
    }

    fn failed(check: &'static str, error: &anyhow::Error) -> Finding {
        Finding { check, outcome: Outcome::Failed, detail: format!("{error:#}") }
    }
}

fn print(receipt: Option<&Receipt>, findings: &[Finding]) {
    for Finding { check, outcome, detail } in findings {
        let verdict = match outcome {
            Outcome::Holds => "holds",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        };
        println!("{verdict:<8} {check:<10} {detail}");
    }
    let Some(receipt) = receipt else { return };
    println!();
    let fields = serde_json::to_value(receipt).expect("a receipt is plain data");
    print_fields("", &fields);
}

fn print_fields(prefix: &str, value: &Value) {
    for (name, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => print_fields(&format!("{name}."), value),
            Value::String(text) => println!("{:<34} {text}", format!("{prefix}{name}")),
            other => println!("{:<34} {other}", format!("{prefix}{name}")),
        }
    }
}

/// A JWK set from its issuer.
async fn fetch(url: &str) -> anyhow::Result<String> {
    ensure!(
        url.starts_with("http://"),
        "--jwks {url}: this program has no TLS of its own here; write `curl -so keys.json {url}`, then --jwks keys.json"
    );
    let advice = || format!("cannot fetch --jwks {url}; fetch it yourself, and name the file");
    let client = reqwest::Client::builder().timeout(FETCH_TIMEOUT).build()?;
    let mut response = client.get(url).send().await.with_context(advice)?;
    ensure!(response.status().is_success(), "--jwks {url}: the answer is {}", response.status());
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.with_context(advice)? {
        body.extend_from_slice(&part);
        ensure!(body.len() <= JWKS_BYTES_MAX, "--jwks {url}: the answer is over {JWKS_BYTES_MAX} bytes");
    }
    String::from_utf8(body).with_context(advice)
}
