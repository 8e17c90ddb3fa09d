//! Price books at work: applied beside a running server, by service tier, and kept across a restart.

use serde_json::{Value, json};
use sluice_tests::{Cluster, Signal, assert_error, eventually};

/// A book with a price of a batch, and none of a priority.
fn book(model: &str, effective_from: &str) -> String {
    let mut text = format!("currency = \"USD\"\neffective_from = \"{effective_from}\"\n");
    for (tier, input, output) in [("default", "4.00", "22.00"), ("batch", "2.00", "11.00")] {
        for (meter, price) in [("input", input), ("cached_input", input), ("output", output)] {
            text += &format!(
                "\n[[price]]\nmodel = \"{model}\"\nmeter = \"{meter}\"\nservice_tier = \"{tier}\"\n\
                 usd_per_million = \"{price}\"\n"
            );
        }
    }
    text
}

/// What a whole answer cost by these prices, in pico-USD.
fn cost(usage: &Value, input_pico: i64, output_pico: i64) -> i64 {
    let count = |name: &str| usage[name].as_i64().unwrap_or_else(|| panic!("no {name}: {usage}"));
    count("prompt_tokens") * input_pico + count("completion_tokens") * output_pico
}

#[tokio::test]
async fn a_book_applied_by_command_prices_the_next_requests_and_outlasts_the_file() {
    let mut cluster = Cluster::start().await;
    let path = cluster.data_dir().join("new-prices.toml");
    let name = path.display().to_string();
    let apply = ["prices", "apply", name.as_str()];

    std::fs::write(&path, book(&cluster.model, "2026-01-02T00:00:00Z").replace("\"4.00\"", "\"-4\""))
        .expect("write");
    let refused = cluster.cli_output(&apply).await;
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("price[0]") && said.contains("must not be negative"), "{said}");

    std::fs::write(&path, book(&cluster.model, "2026-01-02T00:00:00Z")).expect("write");
    let past = cluster.cli_output(&apply).await;
    assert_eq!(past.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&past.stderr).contains("--backdated"));
    let before = cluster.cli(&["prices", "show"]).await;
    let backdated = [&apply[..], &["--backdated"]].concat();
    let dry = cluster.cli(&[&backdated[..], &["--dry-run"]].concat()).await;
    assert_eq!((&dry["status"], &dry["replaces"]), (&json!("dry_run"), &before["hash"]));
    let changes = dry["changes"].as_array().expect("changes");
    assert_eq!((changes.len(), &changes[0]["change"]), (6, &json!("changed")));
    assert_eq!(cluster.cli(&["prices", "show"]).await, before, "a dry run stores nothing");

    let applied = cluster.cli(&backdated).await;
    assert_eq!(applied["status"], "applied");
    assert_eq!(cluster.cli(&backdated).await["status"], "known");
    let shown = cluster.cli(&["prices", "show"]).await;
    assert_eq!(shown["hash"], applied["hash"]);
    assert_eq!(cluster.cli(&["prices", "list"]).await["data"][0]["state"], "in force");

    // The running server takes it up by itself.
    let question = cluster.question("What is a price?", 4);
    eventually("a request is billed by the new book", async || {
        let before = cluster.balance_pico().await;
        let answer = cluster.chat(&question).await.ok();
        cluster.settled().await;
        match before - cluster.balance_pico().await {
            billed if billed == cost(&answer["usage"], 4_000_000, 22_000_000) => Ok(()),
            billed => Err(format!("billed {billed} for {}", answer["usage"])),
        }
    })
    .await;

    cluster.stop(Signal::Terminate).await;
    // prices.toml is the older book by now, which is no reason not to start.
    cluster.restart().await;
    assert_eq!(cluster.cli(&["prices", "show"]).await["hash"], applied["hash"]);

    let mut flexible = question.clone();
    flexible["service_tier"] = json!("flex");
    let before = cluster.balance_pico().await;
    let answer = cluster.chat(&flexible).await.ok();
    assert_eq!(answer["service_tier"], "flex");
    cluster.settled().await;
    assert_eq!(before - cluster.balance_pico().await, cost(&answer["usage"], 2_000_000, 11_000_000));
    let mut urgent = question.clone();
    urgent["service_tier"] = json!("priority");
    let refused = cluster.chat(&urgent).await;
    let code = Some("unsupported_value");
    let told = assert_error("a tier without a price", &refused, 400, code, Some("service_tier"));
    assert!(told.contains("no priority price"), "{told}");
    cluster.finish().await;
}
