//! What finance teams get: every dataset in every format, read back by the tools they read with.

use sluice_tests::{Cluster, focus_validator, pytest};

const DATASETS: [&str; 4] = ["usage", "cost", "focus-1.2", "focus-1.4"];
const FORMATS: [&str; 3] = ["csv", "jsonl", "parquet"];

#[tokio::test]
async fn exports_are_read_back_to_the_ledgers_sums() {
    let mut cluster = Cluster::start().await;
    for tokens in [1, 3, 8] {
        let mut question = cluster.question("How long is the river?", tokens);
        question["user"] = "=HYPERLINK(\"http://evil\")".into();
        cluster.chat(&question).await.ok();
    }
    cluster.settled().await;
    let out = tempfile::tempdir().expect("a temporary folder");
    for dataset in DATASETS {
        for format in FORMATS {
            let dir = out.path().join(format!("{dataset}-{format}"));
            let dir = dir.to_str().expect("temporary paths are UTF-8");
            let export = ["export", "run", "--dataset", dataset, "--format", format, "--out", dir];
            assert_eq!(cluster.cli(&export).await["new"], true);
            assert_eq!(cluster.cli(&export).await["new"], false, "there is nothing to add");
            cluster.cli(&["export", "verify", dir, "--ledger"]).await;
        }
    }
    let usage = cluster.cli(&["usage", "--by", "day"]).await;
    cluster.python_env.push(("SLUICE_EXPORTS", out.path().display().to_string()));
    cluster.python_env.push(("SLUICE_LEDGER_USAGE", usage["data"].to_string()));
    pytest(&cluster, "exports_test.py").await;
    for format in ["csv", "parquet"] {
        let part = out.path().join(format!("focus-1.2-{format}/focus-1.2-000001.{format}"));
        focus_validator(&part).await;
    }
    cluster.finish().await;
}
