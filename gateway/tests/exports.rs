//! `sluice export`, killed wherever it is: what is written in the end is what an undisturbed run writes, byte for byte.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use sluice_billing::{
    AccountId, AccountKind, AdmitRequest, Billing, BillingLimits, BillingOptions, CreditGrant, Database,
    DatabaseOptions, FinishReason, Money, Outcome, PICO_PER_USD, PriceBook, RequestId, ServiceTier,
};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;

const BILLS: usize = 300;
const PRICES: &str = r#"
    currency = "USD"
    effective_from = "2020-01-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "0.3" },
        { model = "m", meter = "cached_input", usd_per_million = "0.03" },
        { model = "m", meter = "output", usd_per_million = "1.5" },
    ]
"#;

/// A data directory whose ledger has some hundred bills.
async fn billed() -> TempDir {
    let dir = TempDir::new().unwrap();
    let options = DatabaseOptions { create: true, ..DatabaseOptions::default() };
    let url = format!("sqlite:{}", dir.path().join("ledger.db").display());
    let database = Database::open(&url, &options).await.unwrap();
    let options = BillingOptions {
        database: database.clone(),
        outbox_path: dir.path().join("outbox.db"),
        gateway: "gateway".into(),
        limits: BillingLimits::default(),
    };
    let billing = Billing::open(options).await.unwrap();
    billing.apply_price_book(&PriceBook::from_toml(PRICES).unwrap()).await.unwrap();
    let account = AccountId::new("acme");
    billing.create_account(&account, AccountKind::Prepaid).await.unwrap();
    let grant = CreditGrant {
        id: Uuid::now_v7(),
        account: account.clone(),
        amount: Money::from_pico(100 * PICO_PER_USD),
        memo: "=cmd|' /C calc'!A0".into(),
        granted_at: OffsetDateTime::now_utc(),
    };
    billing.credit(&grant).await.unwrap();
    let mut bills = JoinSet::new();
    for number in 0..BILLS {
        let (billing, account) = (billing.clone(), account.clone());
        bills.spawn(async move {
            let request = AdmitRequest {
                media_max: Default::default(),
                request_id: RequestId::new(Uuid::now_v7()),
                account,
                org: "org".into(),
                project: format!("project-{}", number % 3),
                api_key: format!("key-{}", number % 7),
                user: "=1+1".into(),
                model: "m".into(),
                service_tier: ServiceTier::Default,
                input_tokens: 100,
                output_tokens_max: 64,
                admitted_at: OffsetDateTime::now_utc(),
            };
            let outcome = Outcome {
                media: Default::default(),
                reasoning_tokens: 0,
                input_tokens: 60,
                cached_input_tokens: 40,
                output_tokens: number as u64 % 64,
                finish_reason: FinishReason::Stop,
                node: "node".into(),
                time_to_first_token_ms: Some(7),
                duration_ms: 70,
            };
            billing.admit(request).await.unwrap().settle(outcome).await.unwrap();
        });
    }
    bills.join_all().await;
    billing.close().await.unwrap();
    database.close().await.unwrap();
    dir
}

fn sluice(data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(args).arg("--data-dir").arg(data).env_remove("SLUICE_CONFIG").env("SLUICE_LOG", "warn");
    command
}

fn export(data: &Path, dataset: &str, format: &str, out: &Path) -> Command {
    let out = out.to_str().unwrap();
    let args = [
        "export",
        "run",
        "--dataset",
        dataset,
        "--format",
        format,
        "--part-rows",
        "5",
        "--out",
        out,
        "--json",
    ];
    sluice(data, &args)
}

fn succeeded(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Kills the process once a folder has so many whole parts; false if it ended before.
fn kill_at(mut child: Child, out: &Path, parts: usize) -> bool {
    loop {
        let names =
            fs::read_dir(out).map(|dir| dir.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>());
        let whole =
            names.unwrap_or_default().iter().filter(|name| name.to_string_lossy().contains("-0")).count();
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if whole >= parts {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        std::thread::yield_now();
    }
}

fn bytes_of(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.file_name().is_some_and(|name| name != ".lock"));
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[tokio::test]
async fn an_export_that_is_killed_anywhere_ends_in_the_same_bytes() {
    let data = billed().await;
    let mut killed = 0;
    for (dataset, format) in
        [("usage", "parquet"), ("cost", "csv"), ("focus-1.2", "parquet"), ("focus-1.4", "csv")]
    {
        let undisturbed = TempDir::new().unwrap();
        let report = succeeded(&export(data.path(), dataset, format, undisturbed.path()).output().unwrap());
        let files = report["files"].as_u64().unwrap() as usize;
        assert!(files > 50, "{report}");
        let out = TempDir::new().unwrap();
        let mut at = 0;
        // Each try is let live a random bit longer than the one before.
        while at < files {
            let mut command = export(data.path(), dataset, format, out.path());
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            killed += usize::from(kill_at(child, out.path(), at));
            at += 1 + usize::from(Uuid::now_v7().as_bytes()[15]) % (files / 4);
        }
        succeeded(&export(data.path(), dataset, format, out.path()).output().unwrap());
        let (expected, found) = (bytes_of(undisturbed.path()), bytes_of(out.path()));
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        assert!(expected == found, "{dataset} as {format} differs after kills");
        let dir = out.path().to_str().unwrap();
        let audit = succeeded(
            &sluice(data.path(), &["export", "verify", dir, "--ledger", "--json"]).output().unwrap(),
        );
        assert_eq!(audit["checks"].as_array().unwrap().len(), 5, "{audit}");

        let manifest = out.path().join("manifest-000001.json");
        let copy = TempDir::new().unwrap();
        let args =
            ["export", "run", "--repeat", manifest.to_str().unwrap(), "--out", copy.path().to_str().unwrap()];
        let repeated = sluice(data.path(), &args).output().unwrap();
        assert!(repeated.status.success(), "{}", String::from_utf8_lossy(&repeated.stderr));
        assert!(bytes_of(copy.path()) == expected, "{dataset} as {format} differs when it is repeated");
    }
    assert!(killed >= 4, "only {killed} runs were killed before they ended");
}

#[tokio::test]
async fn a_damaged_export_fails_its_check_and_says_where() {
    let data = billed().await;
    let out = TempDir::new().unwrap();
    succeeded(&export(data.path(), "usage", "csv", out.path()).output().unwrap());
    let csv = fs::read_to_string(out.path().join("usage-000001.csv")).unwrap();
    assert!(csv.contains(",'=1+1,"), "text that a spreadsheet would run is guarded: {csv}");
    fs::write(out.path().join("usage-000001.csv"), csv.replacen("stop", "shop", 1)).unwrap();
    let failed = sluice(data.path(), &["export", "verify", out.path().to_str().unwrap()]).output().unwrap();
    assert!(!failed.status.success());
    let said = String::from_utf8_lossy(&failed.stdout);
    assert!(said.contains("FAILED") && said.contains("usage-000001.csv"), "{said}");
}

#[test]
fn help_teaches_by_example() {
    let data = TempDir::new().unwrap();
    let help = sluice(data.path(), &["export", "--help"]).output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout);
    for word in ["sluice export run", "focus-1.2", "manifest", "verify", "--csv-raw", "same bytes"] {
        assert!(help.contains(word), "{word} is not in:\n{help}");
    }
}
