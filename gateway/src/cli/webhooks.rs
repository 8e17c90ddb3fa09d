//! `sluice webhooks create | list | delete | deliveries | replay | alert`: the same as the admin API, beside a running
//! server.

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use sluice_billing::{AccountId, Books, Database, Money};
use time::OffsetDateTime;

use super::{ConfigArgs, print_json, utc};
use crate::{
    auth::Tenancy,
    config::Config,
    up::{DEFAULT_ACCOUNT, DEFAULT_ORG},
    webhooks::{
        DeliveryQuery, DeliveryState, EndpointDraft,
        rest::{delivery_json, endpoint_json},
        store,
    },
};

#[derive(Debug, Args)]
pub struct WebhooksArgs {
    #[command(subcommand)]
    command: WebhooksCommand,
}

#[derive(Debug, Args)]
struct Place {
    #[command(flatten)]
    config: ConfigArgs,
    /// The organisation whose webhooks they are.
    #[arg(long, default_value = DEFAULT_ORG, value_name = "ID")]
    org: String,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum WebhooksCommand {
    /// Register an endpoint and print its secret. Keep it, it is not shown again.
    Create {
        #[command(flatten)]
        place: Place,
        /// Where to send events: https://HOST/PATH.
        #[arg(long)]
        url: String,
        #[arg(long, default_value = "")]
        description: String,
        /// Only these kinds of events, such as balance.low,invoice.ready [default: all].
        #[arg(long, value_delimiter = ',', value_name = "KIND")]
        events: Vec<String>,
        /// A secret of your own, whsec_ and base64 [default: a new one].
        #[arg(long, value_name = "SECRET")]
        secret: Option<String>,
    },
    /// Every endpoint.
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Delete an endpoint, with its deliveries.
    Delete {
        #[command(flatten)]
        place: Place,
        id: String,
    },
    /// Deliveries, newest first: what is on its way, delivered, or given up on.
    Deliveries {
        #[command(flatten)]
        place: Place,
        #[arg(long, value_enum)]
        state: Option<StateArg>,
        /// Only this endpoint's.
        #[arg(long, value_name = "ID")]
        endpoint: Option<String>,
        /// At most so many.
        #[arg(long, default_value = "100", value_name = "N", value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
    },
    /// Send deliveries again, by their ids; or with --dead every one that was given up on.
    Replay {
        #[command(flatten)]
        place: Place,
        #[arg(required_unless_present = "dead", value_name = "ID")]
        ids: Vec<String>,
        #[arg(long, conflicts_with = "ids")]
        dead: bool,
    },
    /// Show or set at what balance an account's owner is told (balance.low).
    Alert {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long, default_value = DEFAULT_ACCOUNT)]
        account: String,
        /// US dollars, such as 5 or 0.50.
        #[arg(long, value_name = "USD", value_parser = super::money::parse_money)]
        low_balance: Option<Money>,
        /// No alert any more.
        #[arg(long, conflicts_with = "low_balance")]
        off: bool,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StateArg {
    Pending,
    Delivered,
    Dead,
}

/// Dead deliveries that `replay --dead` takes at a time.
const REPLAY_BATCH: i64 = 100;

impl WebhooksArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            WebhooksCommand::Create { place, url, description, events, secret } => {
                let (config, database) = place.config.database().await?;
                let account = account_of(&database, &place.org).await?;
                let org_id = place.org.clone();
                let draft = EndpointDraft { org_id, account, url, description, events, secret };
                create(&config, &database, &draft, place.json).await
            }
            WebhooksCommand::List { place } => list(&place).await,
            WebhooksCommand::Delete { place, id } => delete(&place, &id).await,
            WebhooksCommand::Deliveries { place, state, endpoint, limit } => {
                deliveries(&place, state, endpoint.as_deref(), limit).await
            }
            WebhooksCommand::Replay { place, ids, dead } => replay(&place, ids, dead).await,
            WebhooksCommand::Alert { config, account, low_balance, off, json } => {
                alert(&config, AccountId::new(account), low_balance, off, json).await
            }
        }
    }
}

async fn account_of(database: &Database, org: &str) -> anyhow::Result<String> {
    let account = Tenancy::new(database.clone()).account_of_org(org).await?;
    account.with_context(|| format!("--org: there is no organisation {org:?}"))
}

async fn create(
    config: &Config,
    database: &Database,
    draft: &EndpointDraft,
    json: bool,
) -> anyhow::Result<()> {
    let (endpoint, secret) = store::create(database, &config.webhooks, draft, store::now_ms()).await?;
    if json {
        let mut shown = endpoint_json(&endpoint);
        shown["secret"] = secret.reveal().into();
        return print_json(&shown);
    }
    println!("{}", secret.reveal());
    eprintln!("{} for {}: keep this secret, it is not shown again", endpoint.id, endpoint.url);
    Ok(())
}

async fn list(place: &Place) -> anyhow::Result<()> {
    let (_, database) = place.config.database().await?;
    let endpoints = store::endpoints(&database, &place.org).await?;
    if place.json {
        let data: Vec<_> = endpoints.iter().map(endpoint_json).collect();
        return print_json(&json!({ "object": "list", "data": data }));
    }
    println!("{:<36}  {:<3}  {:<19}  {:<40}  URL", "ID", "ON", "CREATED (UTC)", "EVENTS");
    for endpoint in endpoints {
        let on = if endpoint.enabled { "yes" } else { "no" };
        let events = if endpoint.events.is_empty() { "all".to_owned() } else { endpoint.events.join(",") };
        let created = utc(endpoint.created_at_ms / 1000);
        println!("{:<36}  {on:<3}  {created:<19}  {events:<40}  {}", endpoint.id, endpoint.url);
    }
    Ok(())
}

async fn delete(place: &Place, id: &str) -> anyhow::Result<()> {
    let (_, database) = place.config.database().await?;
    store::delete(&database, &place.org, id).await?;
    if place.json {
        return print_json(&json!({ "id": id, "deleted": true }));
    }
    println!("{id} is deleted");
    Ok(())
}

async fn deliveries(
    place: &Place,
    state: Option<StateArg>,
    endpoint_id: Option<&str>,
    limit: i64,
) -> anyhow::Result<()> {
    let (_, database) = place.config.database().await?;
    let state = state.map(|state| match state {
        StateArg::Pending => DeliveryState::Pending,
        StateArg::Delivered => DeliveryState::Delivered,
        StateArg::Dead => DeliveryState::Dead,
    });
    let query = DeliveryQuery { org_id: &place.org, state, endpoint_id, after: None, limit };
    let found = store::deliveries(&database, &query).await?;
    if place.json {
        let data: Vec<_> = found.iter().map(delivery_json).collect();
        return print_json(&json!({ "object": "list", "data": data }));
    }
    println!(
        "{:<36}  {:<24}  {:<9}  {:>8}  {:<19}  LAST",
        "ID", "EVENT", "STATE", "ATTEMPTS", "CREATED (UTC)"
    );
    for delivery in found {
        let created = utc(delivery.created_at_ms / 1000);
        let last = delivery.last_error.or_else(|| delivery.last_status.map(|status| status.to_string()));
        println!(
            "{:<36}  {:<24}  {:<9}  {:>8}  {created:<19}  {}",
            delivery.id,
            delivery.event_type,
            delivery.state,
            delivery.attempts,
            last.unwrap_or_default()
        );
    }
    Ok(())
}

async fn replay(place: &Place, ids: Vec<String>, dead: bool) -> anyhow::Result<()> {
    let (_, database) = place.config.database().await?;
    let ids = if dead { dead_ids(&database, &place.org).await? } else { ids };
    for id in &ids {
        store::replay(&database, &place.org, id, store::now_ms()).await?;
    }
    if place.json {
        return print_json(&json!({ "replayed": ids }));
    }
    println!("{} deliveries are on their way again", ids.len());
    Ok(())
}

/// Of endpoints that are switched on; the others would refuse.
async fn dead_ids(database: &Database, org_id: &str) -> anyhow::Result<Vec<String>> {
    let mut ids = Vec::new();
    for endpoint in store::endpoints(database, org_id).await?.iter().filter(|endpoint| endpoint.enabled) {
        let mut after: Option<String> = None;
        loop {
            let query = DeliveryQuery {
                org_id,
                state: Some(DeliveryState::Dead),
                endpoint_id: Some(&endpoint.id),
                after: after.as_deref(),
                limit: REPLAY_BATCH,
            };
            let found = store::deliveries(database, &query).await?;
            let Some(last) = found.last() else { break };
            after = Some(last.id.clone());
            ids.extend(found.into_iter().map(|delivery| delivery.id));
        }
    }
    Ok(ids)
}

async fn alert(
    config: &ConfigArgs,
    account: AccountId,
    low_balance: Option<Money>,
    off: bool,
    json: bool,
) -> anyhow::Result<()> {
    let (_, database) = config.database().await?;
    let books = Books::open(database).await.context("cannot open the books")?;
    if off || low_balance.is_some() {
        books.set_low_balance_alert(&account, low_balance, OffsetDateTime::now_utc()).await?;
    }
    let threshold = books.low_balance_alert(&account).await?;
    if json {
        let threshold = threshold.map(|amount| amount.to_usd_string());
        let shown = json!({ "account": account.as_str(), "currency": "USD", "low_balance": threshold });
        return print_json(&shown);
    }
    match threshold {
        Some(amount) => println!("balance.low is raised when {account} has less than {amount} left"),
        None => println!("{account} has no alert"),
    }
    Ok(())
}
