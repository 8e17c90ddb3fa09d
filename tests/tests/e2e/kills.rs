//! Gateway, node and PostgreSQL die at random moments under load, again and again. After each death the books are whole:
//! the audit is clean, no request has two bills, and every answer that came to its end has its own.

use std::collections::BTreeMap;
use std::time::Duration;

use sluice_tests::{Dice, Fate, Platform, Signal, StopMode, setting};
use tokio::task::JoinSet;

/// `SLUICE_TEST_ROUNDS` sets another number.
const ROUNDS: u64 = 15;
const CLIENTS: u64 = 6;
/// A client goes on until something breaks, or it has asked so often.
const REQUESTS: usize = 6;
const ANSWER_TOKENS_MAX: u64 = 40;
/// Nobody dies later than this after the load began.
const LIFE_MAX: Duration = Duration::from_millis(700);
/// A database that is gone is given up on soon, so that a round does not wait for it.
const SETTINGS: &str =
    "[database]\nwait_ms_max = 2000\n[billing]\nship_linger_ms = 20\nship_backoff_ms_max = 200\n";

/// Who dies in a round; at least one does.
#[derive(Debug, Clone, Copy)]
struct Victims {
    gateway: bool,
    node: bool,
    postgres: bool,
}

impl Victims {
    fn any(dice: &mut Dice, platform: &Platform) -> Victims {
        loop {
            let mut chosen = |of: u64| dice.below(of) == 0;
            let victims = Victims {
                gateway: chosen(2),
                node: chosen(3),
                postgres: chosen(3) && platform.postgres.is_some(),
            };
            if victims.gateway || victims.node || victims.postgres {
                return victims;
            }
        }
    }
}

/// Clients that ask until they are answered no more.
fn load(platform: &Platform, dice: &mut Dice) -> JoinSet<Vec<Fate>> {
    let gateway = platform.gateway();
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let caller = gateway.caller(&gateway.api_key);
        let bodies: Vec<_> = (0..REQUESTS)
            .map(|_| gateway.question(&number.to_string(), 1 + dice.below(ANSWER_TOKENS_MAX) as u32))
            .collect();
        clients.spawn(async move {
            let mut fates = Vec::new();
            for body in bodies {
                let fate = caller.ask(&body).await;
                let goes_on = fate != Fate::Broken;
                fates.push(fate);
                if !goes_on {
                    break;
                }
            }
            fates
        });
    }
    clients
}

async fn die_and_come_back(
    platform: &mut Platform,
    dice: &mut Dice,
    clients: JoinSet<Vec<Fate>>,
) -> Vec<Fate> {
    let victims = Victims::any(dice, platform);
    tokio::time::sleep(dice.pause_below(LIFE_MAX)).await;
    if victims.postgres {
        platform.postgres.as_ref().expect("it was chosen").stop(StopMode::Immediate).await;
    }
    if victims.node {
        platform.node.kill().await;
    }
    if victims.gateway {
        tokio::time::sleep(dice.pause_below(LIFE_MAX / 4)).await;
        platform.gateways[0].stop(Signal::Kill).await;
    }
    let fates = clients.join_all().await.concat();
    if victims.postgres {
        platform.postgres.as_ref().expect("it was chosen").start_again().await;
    }
    if victims.node {
        platform.node.restart().await;
    }
    if victims.gateway {
        platform.gateways[0].restart().await;
    }
    platform.serving().await;
    fates
}

async fn rounds(mut platform: Platform) {
    let rounds = setting("SLUICE_TEST_ROUNDS").unwrap_or(ROUNDS);
    let mut dice = Dice::new("kills");
    let mut completed = BTreeMap::new();
    let (mut broken, mut refused) = (0, 0);
    for round in 1..=rounds {
        let clients = load(&platform, &mut dice);
        for fate in die_and_come_back(&mut platform, &mut dice, clients).await {
            match fate {
                Fate::Completed { request_id, usage } => drop(completed.insert(request_id, usage)),
                Fate::Refused { status, text } => {
                    assert!(status == 503 || status == 200, "round {round}: {status}: {text}");
                    refused += 1;
                }
                Fate::Broken => broken += 1,
            }
        }
        platform.settled().await;
        platform.gateway().assert_books_balance().await;
        let bills = platform.gateway().bills().await;
        for (request_id, usage) in &completed {
            let bill =
                bills.get(request_id).unwrap_or_else(|| panic!("round {round}: {request_id} has no bill"));
            assert_eq!((bill.prompt_tokens(), bill.output_tokens), *usage, "round {round}: {request_id}");
        }
    }
    println!("{rounds} rounds: {} answers completed, {refused} refused, {broken} broken", completed.len());
    assert!(!completed.is_empty(), "some answers were completed");
    platform.finish().await;
}

#[tokio::test]
async fn the_books_survive_deaths_with_sqlite() {
    rounds(Platform::on_sqlite(SETTINGS).await).await;
}

#[tokio::test]
async fn the_books_survive_deaths_with_postgres() {
    rounds(Platform::on_postgres(1, SETTINGS).await).await;
}
