//! Clients hang up at random points: each is billed what the engine counted for its request, and nothing else.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use sluice_tests::{Bill, Cluster, ClusterOptions, Dice, NodeServer, Tap, eventually, setting};

/// `SLUICE_TEST_HANG_UPS` sets another number.
const STREAMS: u64 = 300;
const AT_A_TIME: usize = 24;
const ANSWER_TOKENS: u32 = 48;
/// A loaded machine may take its time to answer a cancel; what is billed must still be the engine's last word.
const SETTINGS: &str = "[limits]\ncancel_wait_ms_max = 60000\n";

/// When a client has had enough.
#[derive(Debug, Clone, Copy)]
enum Patience {
    Frames(usize),
    /// Perhaps before the answer begins, perhaps after its end.
    Time(Duration),
    /// The same, for an answer that comes whole.
    TimeWhole(Duration),
}

impl Patience {
    fn any(dice: &mut Dice) -> Patience {
        match dice.below(4) {
            0 => Patience::Time(dice.pause_below(Duration::from_millis(400))),
            1 => Patience::TimeWhole(dice.pause_below(Duration::from_millis(400))),
            _ => Patience::Frames(1 + dice.below(u64::from(ANSWER_TOKENS)) as usize),
        }
    }

    async fn hang_up(self, cluster: &Cluster, body: &Value) {
        let caller = cluster.caller(&cluster.api_key);
        match self {
            Patience::Frames(frames) => drop(caller.hang_up_after(body, frames).await),
            Patience::Time(time) => drop(tokio::time::timeout(time, caller.ask(body)).await),
            Patience::TimeWhole(time) => drop(tokio::time::timeout(time, cluster.chat(body)).await),
        }
    }
}

#[tokio::test]
async fn whoever_hangs_up_pays_for_what_the_engine_counted() {
    let streams = setting("SLUICE_TEST_HANG_UPS").unwrap_or(STREAMS);
    let mut dice = Dice::new("hang-ups");
    let node = NodeServer::start().await;
    let tap = Tap::on(&node.url).await;
    let cluster = Cluster::start_with(ClusterOptions {
        node_url: Some(tap.url.clone()),
        settings: SETTINGS.to_owned(),
        ..ClusterOptions::default()
    })
    .await;

    let hang_ups: Vec<(u64, Patience)> = (0..streams).map(|seed| (seed, Patience::any(&mut dice))).collect();
    futures::stream::iter(hang_ups)
        .for_each_concurrent(AT_A_TIME, |(seed, patience)| {
            let cluster = &cluster;
            async move {
                let mut body = cluster.question("Tell me everything.", ANSWER_TOKENS);
                body["temperature"] = json!(1.0);
                body["seed"] = json!(seed);
                patience.hang_up(cluster, &body).await;
            }
        })
        .await;

    // A request that was given up on before it was admitted is still on its way for a moment.
    let (billed, computed) = eventually("each bill is the engine's count", async || {
        let metrics = cluster.metrics().await;
        if metrics.holds_open() + metrics.outbox_backlog() > 0 {
            return Err("requests are open".to_owned());
        }
        let (counts, bills) = (tap.counts(), cluster.bills().await);
        let counted = |id: &String| {
            let usage = counts.get(id).copied().unwrap_or_default();
            [usage.input_tokens, usage.cached_input_tokens, usage.output_tokens]
        };
        let billed = |id: &String| {
            let Bill { input_tokens, cached_input_tokens, output_tokens, .. } =
                bills.get(id).copied().unwrap_or_default();
            [input_tokens, cached_input_tokens, output_tokens]
        };
        let mut waste = 0;
        for id in counts.keys().chain(bills.keys()).collect::<BTreeSet<_>>() {
            match (counted(id), bills.contains_key(id)) {
                (counted, true) if counted != billed(id) => {
                    return Err(format!("{id}: the engine counted {counted:?}, billed are {:?}", billed(id)));
                }
                (_, true) => {}
                (counted, false) => waste += counted.iter().sum::<u64>(),
            }
        }
        if waste != metrics.wasted_tokens() {
            return Err(format!(
                "{waste} tokens have no bill, {} are named as waste",
                metrics.wasted_tokens()
            ));
        }
        let sum: u64 = bills.values().map(|bill| bill.prompt_tokens() + bill.output_tokens).sum();
        match metrics.node_tokens() == sum + waste {
            true => Ok((bills.len(), metrics.node_tokens())),
            false => Err(format!(
                "{sum} billed and {waste} wasted, but the odometer says {}",
                metrics.node_tokens()
            )),
        }
    })
    .await;
    println!(
        "{streams} clients hung up; {billed} were billed, for the {computed} tokens that the engine computed"
    );
    assert!(billed as u64 > streams / 2, "most of them came to an answer");
    assert!(computed < streams * u64::from(ANSWER_TOKENS + 40), "and most of them left before its end");
    cluster.finish().await;
    drop(tap);
    node.stop().await;
}
