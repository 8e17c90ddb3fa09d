//! Exports say what was billed, to the last digit; they go on, repeat themselves byte for byte, and notice every forgery.

use std::{collections::BTreeMap, fs, path::Path};

use sluice_billing::{
    AccountId, AccountKind, AdmitRequest, Audit, Dataset, ExportError, ExportFilter, ExportOptions,
    ExportRange, ExportReport, Format, Manifest, verify_export,
};
use tempfile::TempDir;
use time::{Duration, macros::date};

use crate::support::*;

const EACH: i64 = 6 * INPUT + 4 * CACHED + 4 * OUTPUT;

fn options(dir: &Path, dataset: Dataset, format: Format) -> ExportOptions {
    ExportOptions {
        dir: dir.to_owned(),
        dataset,
        format,
        filter: ExportFilter::default(),
        range: ExportRange::Next,
        part_rows: 4,
        provider: "Sluice".into(),
        csv_guard: true,
    }
}

fn late() -> AccountId {
    AccountId::new("late")
}

/// Bills of a prepaid and a postpaid account, over three hours and two days, shipped.
async fn bill(world: &World, count: usize) {
    let postpaid = AccountKind::Postpaid { credit_limit: pico(1_000_000) };
    world.billing.create_account(&late(), postpaid).await.unwrap();
    for number in 0..count {
        let request = AdmitRequest {
            account: if number % 3 == 0 { late() } else { account() },
            user: if number % 2 == 0 { "=1+1".into() } else { String::new() },
            admitted_at: START + Duration::hours([0, 1, 13][number % 3]),
            ..request(10, 4)
        };
        world.billing.admit(request).await.unwrap().settle(outcome(6, 4, 4)).await.unwrap();
    }
    world.billing.flush().await.unwrap();
}

async fn export(world: &World, options: ExportOptions) -> Result<ExportReport, ExportError> {
    world.billing.books().export(options, |_| {}).await
}

/// Every file of a folder, but for the lock.
fn bytes_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let named =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    named.filter(|(name, _)| name != ".lock").collect()
}

fn assert_holds(audit: &Audit) {
    assert!(audit.is_clean(), "{audit:#?}");
    assert!(audit.checks.iter().all(|check| check.checked > 0), "{audit:#?}");
}

async fn every_dataset_in_every_format_sums_to_the_ledger() {
    let world = World::new(1_000_000).await;
    bill(&world, 10).await;
    for dataset in Dataset::ALL {
        for format in Format::ALL {
            let dir = TempDir::new().unwrap();
            let manifest =
                export(&world, options(dir.path(), dataset, format)).await.unwrap().manifest.unwrap();
            let total = |column: &str| manifest.totals["USD"][column].clone();
            let cost = pico(10 * EACH).to_usd_string();
            match dataset {
                Dataset::Usage => {
                    assert_eq!((manifest.rows, total("cost"), total("input_tokens")), (10, cost, "60".into()))
                }
                Dataset::Cost => {
                    assert_eq!((manifest.rows, total("cost"), total("quantity")), (30, cost, "140".into()))
                }
                Dataset::Focus12 | Dataset::Focus14 => {
                    let billed = pico(1_000_000 + 4 * EACH).to_usd_string();
                    assert_eq!((total("EffectiveCost"), total("BilledCost")), (cost, billed));
                }
            }
            assert_holds(&world.billing.books().verify_export(dir.path()).await.unwrap());
        }
    }
}

async fn a_further_run_adds_what_is_new_and_nothing_twice() {
    let world = World::new(1_000_000).await;
    let dir = TempDir::new().unwrap();
    let asked = || options(dir.path(), Dataset::Usage, Format::Parquet);
    let mut rows = 0;
    for count in [5, 9, 1] {
        bill(&world, count).await;
        let report = export(&world, asked()).await.unwrap();
        let manifest = report.manifest.unwrap();
        rows += count as i64;
        assert_eq!((report.new, report.resumed, manifest.rows), (true, false, count as u64));
        assert_eq!(manifest.ranges[0].through, rows);
        let before = bytes_of(dir.path());
        assert!(!export(&world, asked()).await.unwrap().new);
        assert_eq!(bytes_of(dir.path()), before, "nothing new changes nothing");
    }
    assert_holds(&world.billing.books().verify_export(dir.path()).await.unwrap());
    let manifests = Manifest::read_all(dir.path()).unwrap();
    assert_eq!(manifests.iter().map(|(manifest, _)| manifest.run).collect::<Vec<_>>(), [1, 2, 3]);

    // Bills between are another range, and a run that would leave a gap or tell something twice is refused.
    let between = |after, through| ExportRange::Between { after: Some(after), through };
    for (range, field) in [(between(3, None), "--after-seq"), (between(rows, Some(99)), "--through-seq")] {
        let refused = export(&world, ExportOptions { range, ..asked() }).await.unwrap_err().to_string();
        assert!(refused.starts_with(field), "{refused}");
    }
    let other = TempDir::new().unwrap();
    let range = between(2, Some(7));
    let options = ExportOptions { range, ..options(other.path(), Dataset::Usage, Format::Csv) };
    let manifest = export(&world, options).await.unwrap().manifest.unwrap();
    assert_eq!((manifest.rows, manifest.files[0].first_sequence), (5, 3));
    assert_holds(&world.billing.books().verify_export(other.path()).await.unwrap());
}

on_both!(every_dataset_in_every_format_sums_to_the_ledger, a_further_run_adds_what_is_new_and_nothing_twice);

#[tokio::test]
async fn the_same_runs_are_the_same_bytes_on_any_day() {
    let world = World::new(1_000_000).await;
    for (dataset, format) in [
        (Dataset::Usage, Format::Parquet),
        (Dataset::Cost, Format::Csv),
        (Dataset::Focus12, Format::Parquet),
        (Dataset::Focus14, Format::Jsonl),
    ] {
        let (dir, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        for count in [11, 6] {
            bill(&world, count).await;
            export(&world, options(dir.path(), dataset, format)).await.unwrap();
        }
        world.credit(7).await;
        bill(&world, 3).await;
        for (manifest, _) in Manifest::read_all(dir.path()).unwrap() {
            let options = ExportOptions::repeating(manifest, copy.path().to_owned()).unwrap();
            export(&world, options).await.unwrap();
        }
        let (first, second) = (bytes_of(dir.path()), bytes_of(copy.path()));
        assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>());
        assert!(first == second, "{dataset:?} as {format:?} differs");
    }
}

#[tokio::test]
async fn every_forgery_of_an_export_is_found() {
    let world = World::new(1_000_000).await;
    let original = TempDir::new().unwrap();
    for count in [9, 4] {
        bill(&world, count).await;
        export(&world, options(original.path(), Dataset::Cost, Format::Csv)).await.unwrap();
    }
    let chain = "every manifest follows the one before, and every range begins where the last ended";
    let hash = "every file has the size and SHA-256 of its manifest";
    let count = "every file's rows and control totals are those of its manifest";
    let sum = "every manifest's totals are the sum of its files";
    let billed = "every run's cost is the sum of the ledger's bills in its range";
    let edit = |name: &'static str, from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let text = fs::read_to_string(dir.join(name)).unwrap();
            assert!(text.contains(from), "{name}: {from}");
            fs::write(dir.join(name), text.replacen(from, to, 1)).unwrap();
        }
    };
    type Forgery = Box<dyn Fn(&Path)>;
    let remove = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).unwrap();
    let forgeries: Vec<(&str, Forgery, Vec<&str>)> = vec![
        ("a price", Box::new(edit("cost-000001.csv", "0.000000000003", "0.000000000002")), vec![hash]),
        ("a quantity", Box::new(edit("cost-000001.csv", ",6,", ",7,")), vec![hash, count]),
        ("a part is gone", Box::new(remove("cost-000002.csv")), vec![hash]),
        ("a run is gone", Box::new(remove("manifest-000001.json")), vec![chain]),
        ("the newest is gone", Box::new(remove("manifest-000002.json")), vec![chain]),
        (
            "a total",
            Box::new(edit("manifest-000002.json", "\"rows\": 12,", "\"rows\": 11,")),
            vec![chain, sum],
        ),
        (
            "a range",
            Box::new(edit("manifest-000002.json", "\"after\": 9", "\"after\": 8")),
            vec![chain, billed],
        ),
        (
            "a name",
            Box::new(edit("manifest-000001.json", "\"provider\": \"Sluice\"", "\"provider\": \"Mallory\"")),
            vec![chain],
        ),
    ];
    for (what, forge, expected) in forgeries {
        let dir = TempDir::new().unwrap();
        for (name, bytes) in bytes_of(original.path()) {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        assert_holds(&world.billing.books().verify_export(dir.path()).await.unwrap());
        forge(dir.path());
        let audit = world.billing.books().verify_export(dir.path()).await.unwrap();
        let found: Vec<_> =
            audit.checks.iter().filter(|check| check.failed > 0).map(|check| check.name).collect();
        for name in &expected {
            assert!(found.contains(name), "{what}: {name} is not in {found:?}");
        }
    }
    assert!(
        !verify_export(TempDir::new().unwrap().path()).unwrap().is_clean(),
        "no export is no clean export"
    );
}

#[tokio::test]
async fn books_that_do_not_hold_are_not_exported() {
    let world = World::new(1_000_000).await;
    bill(&world, 2).await;
    run(&world.database, "DROP TRIGGER usage_events_no_update").await.unwrap();
    run(&world.database, "UPDATE usage_events SET cost_pico = cost_pico + 1 WHERE ordinal = 2")
        .await
        .unwrap();
    let dir = TempDir::new().unwrap();
    let refused =
        export(&world, options(dir.path(), Dataset::Usage, Format::Csv)).await.unwrap_err().to_string();
    assert!(refused.contains("run `sluice audit`"), "{refused}");
    // Mended, the same folder goes on.
    run(&world.database, "UPDATE usage_events SET cost_pico = cost_pico - 1 WHERE ordinal = 2")
        .await
        .unwrap();
    export(&world, options(dir.path(), Dataset::Usage, Format::Csv)).await.unwrap();
    assert_holds(&world.billing.books().verify_export(dir.path()).await.unwrap());
}

#[tokio::test]
async fn a_folder_keeps_to_one_kind_of_export() {
    let world = World::new(1_000_000).await;
    bill(&world, 2).await;
    let dir = TempDir::new().unwrap();
    let asked = options(dir.path(), Dataset::Usage, Format::Csv);
    export(&world, asked.clone()).await.unwrap();
    let filter = ExportFilter { account: Some("acme".into()), ..ExportFilter::default() };
    for (field, other) in [
        ("--dataset", ExportOptions { dataset: Dataset::Cost, ..asked.clone() }),
        ("--format", ExportOptions { format: Format::Jsonl, ..asked.clone() }),
        ("--part-rows", ExportOptions { part_rows: 5, ..asked.clone() }),
        ("--csv-raw", ExportOptions { csv_guard: false, ..asked.clone() }),
        ("--account", ExportOptions { filter, ..asked.clone() }),
        ("--part-rows", ExportOptions { part_rows: 0, ..asked.clone() }),
    ] {
        let refused = export(&world, other).await.unwrap_err().to_string();
        assert!(refused.starts_with(field), "{field}: {refused}");
    }
}

#[tokio::test]
async fn filters_leave_out_what_they_say() {
    let world = World::new(1_000_000).await;
    bill(&world, 9).await;
    let rows = async |filter: ExportFilter, dataset| {
        let dir = TempDir::new().unwrap();
        let options = ExportOptions { filter, ..options(dir.path(), dataset, Format::Csv) };
        let manifest = export(&world, options).await.unwrap().manifest.unwrap();
        assert_holds(&world.billing.books().verify_export(dir.path()).await.unwrap());
        manifest.rows
    };
    let of = |account: &str| ExportFilter { account: Some(account.into()), ..ExportFilter::default() };
    assert_eq!(rows(of("late"), Dataset::Usage).await, 3);
    assert_eq!(rows(of("acme"), Dataset::Usage).await, 6);
    let days = |from, to| ExportFilter { from: Some(from), to: Some(to), ..ExportFilter::default() };
    assert_eq!(rows(days(date!(2026 - 03 - 01), date!(2026 - 03 - 02)), Dataset::Usage).await, 6);
    assert_eq!(rows(days(date!(2026 - 03 - 02), date!(2026 - 03 - 03)), Dataset::Usage).await, 3);
    let org = ExportFilter { org: Some("org".into()), ..ExportFilter::default() };
    assert_eq!(rows(org.clone(), Dataset::Usage).await, 9);
    let (with, without) =
        (rows(ExportFilter::default(), Dataset::Focus12).await, rows(org, Dataset::Focus12).await);
    assert_eq!(with, without + 1, "the purchase is an account's, and of no organisation");
}

/// A row for an hour, key and SKU; a purchase for the credit; prepaid usage was billed by the purchase.
#[tokio::test]
async fn focus_rows_are_charges_by_the_hour() {
    let world = World::new(1_000_000).await;
    bill(&world, 6).await;
    let dir = TempDir::new().unwrap();
    let asked = options(dir.path(), Dataset::Focus12, Format::Jsonl);
    export(&world, ExportOptions { part_rows: 1_000, ..asked }).await.unwrap();
    let mut rows = Vec::new();
    for name in ["focus-1.2-000001.jsonl", "focus-1.2-000002.jsonl"] {
        let text = fs::read_to_string(dir.path().join(name)).unwrap();
        rows.extend(text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()));
    }
    // Three hours, of which one is the postpaid account's, times three SKUs; and the purchase.
    assert_eq!(rows.len(), 3 * 3 + 1);
    let row =
        rows.iter().find(|row| row["BillingAccountId"] == "late" && row["x_TokenClass"] == "output").unwrap();
    for (column, expected) in [
        ("ChargeCategory", "Usage"),
        ("BillingAccountId", "late"),
        ("BilledCost", "0.00000000004"),
        ("EffectiveCost", "0.00000000004"),
        ("PricingQuantity", "8.00"),
        ("ListUnitPrice", "0.000000000005"),
        ("BillingPeriodStart", "2026-03-01T00:00:00Z"),
        ("BillingPeriodEnd", "2026-04-01T00:00:00Z"),
        ("ChargePeriodStart", "2026-03-01T12:00:00Z"),
        ("ChargePeriodEnd", "2026-03-01T13:00:00Z"),
        ("SubAccountId", "project"),
        ("ResourceId", "key"),
    ] {
        assert_eq!(row[column], expected, "{column} of {row}");
    }
    let prepaid =
        rows.iter().filter(|row| row["BillingAccountId"] == "acme" && row["ChargeCategory"] == "Usage");
    for row in prepaid {
        assert_eq!(
            (row["BilledCost"].as_str(), row["EffectiveCost"] != "0.00"),
            (Some("0.00"), true),
            "{row}"
        );
    }
    let purchase = rows.last().unwrap();
    assert_eq!(purchase["ChargeCategory"], "Purchase");
    assert_eq!((&purchase["BilledCost"], &purchase["EffectiveCost"]), (&"0.000001".into(), &"0.00".into()));
    assert!(purchase["ResourceId"].is_null() && purchase["ConsumedQuantity"].is_null());
}
