//! `sluice credits list | expire`.

use clap::{Args, Subcommand};
use sluice_billing::{AccountId, Money};
use time::OffsetDateTime;

use super::{ConfigArgs, print_json, utc};
use crate::up::DEFAULT_ACCOUNT;

#[derive(Debug, Args)]
pub struct CreditsArgs {
    #[command(subcommand)]
    command: CreditsCommand,
}

#[derive(Debug, Subcommand)]
enum CreditsCommand {
    /// The grants of an account, oldest first, and what is left of each.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long, default_value = DEFAULT_ACCOUNT)]
        account: String,
        #[arg(long)]
        json: bool,
    },
    /// Post out what is left of expired grants now. A running server does so every invoices.sweep_interval_s.
    Expire {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long)]
        json: bool,
    },
}

impl CreditsArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            CreditsCommand::List { config, account, json } => list(&config, &account, json).await,
            CreditsCommand::Expire { config, json } => expire(&config, json).await,
        }
    }
}

async fn list(config: &ConfigArgs, account: &str, json: bool) -> anyhow::Result<()> {
    let grants = config.books().await?.grants(&AccountId::new(account)).await?;
    if json {
        return print_json(&serde_json::json!({ "object": "list", "currency": "USD", "data": grants }));
    }
    println!(
        "{:<36}  {:>18}  {:>18}  {:>8}  {:<19}  {:<19}  MEMO",
        "ID", "AMOUNT", "LEFT", "PRIORITY", "GRANTED (UTC)", "EXPIRES (UTC)"
    );
    for grant in grants {
        let expires = grant.expires_at.map_or_else(|| "never".to_owned(), utc);
        let granted = utc(grant.granted_at);
        println!(
            "{:<36}  {:>18}  {:>18}  {:>8}  {granted:<19}  {expires:<19}  {}",
            grant.id, grant.amount, grant.left, grant.priority, grant.memo
        );
    }
    Ok(())
}

async fn expire(config: &ConfigArgs, json: bool) -> anyhow::Result<()> {
    let expiries = config.books().await?.expire_credits(OffsetDateTime::now_utc()).await?;
    if json {
        return print_json(&serde_json::json!({ "object": "list", "currency": "USD", "data": expiries }));
    }
    for expiry in &expiries {
        print!("grant {} of {}: {} expired", expiry.grant, expiry.account, expiry.expired);
        match expiry.waiting {
            Money::ZERO => println!(),
            waiting => println!(", {waiting} leased by gateways and left for later"),
        }
    }
    if expiries.is_empty() {
        println!("nothing to expire");
    }
    Ok(())
}
