//! `sluice usage | balance | credit | audit`: the books, read beside a running server.

use anyhow::Context;
use clap::{Args, ValueEnum};
use sluice_billing::{AccountId, Audit, Books, CreditGrant, CreditTerms, Money, UsageGroup, UsageQuery};
use time::{Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};
use uuid::Uuid;

use super::{ConfigArgs, print_json};
use crate::up::DEFAULT_ACCOUNT;

#[derive(Debug, Args)]
pub struct UsageArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Group by any of these.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "key,model,day")]
    by: Vec<GroupArg>,
    /// First day, YYYY-MM-DD (UTC).
    #[arg(long, value_parser = parse_day)]
    from: Option<Date>,
    /// The day after the last, YYYY-MM-DD (UTC).
    #[arg(long, value_parser = parse_day)]
    to: Option<Date>,
    /// Only this key's usage (its id).
    #[arg(long, value_name = "ID")]
    key: Option<String>,
    /// Only this project's usage (its id).
    #[arg(long, value_name = "ID")]
    project: Option<String>,
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GroupArg {
    Key,
    Model,
    Day,
    Project,
}

impl UsageArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        let group_by = self
            .by
            .iter()
            .map(|group| match group {
                GroupArg::Key => UsageGroup::Key,
                GroupArg::Model => UsageGroup::Model,
                GroupArg::Day => UsageGroup::Day,
                GroupArg::Project => UsageGroup::Project,
            })
            .collect();
        let query = UsageQuery {
            from: self.from,
            to: self.to,
            api_key: self.key,
            project: self.project,
            group_by,
            ..UsageQuery::default()
        };
        let rows = books(&self.config).await?.usage(&query).await?;
        if self.json {
            return print_json(&serde_json::json!({ "object": "usage", "currency": "USD", "data": rows }));
        }
        println!(
            "{:<10}  {:<12}  {:<37}  {:<14}  {:>8}  {:>10}  {:>10}  {:>10}  {:>20}",
            "DAY (UTC)", "PROJECT", "KEY", "MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT", "COST"
        );
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        for row in &rows {
            println!(
                "{:<10}  {:<12}  {:<37}  {:<14}  {:>8}  {:>10}  {:>10}  {:>10}  {:>20}",
                shown(&row.day),
                shown(&row.project),
                shown(&row.api_key),
                shown(&row.model),
                row.requests,
                row.input_tokens,
                row.cached_input_tokens,
                row.output_tokens,
                row.cost
            );
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct BalanceArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long, default_value = DEFAULT_ACCOUNT)]
    account: String,
    #[arg(long)]
    json: bool,
}

impl BalanceArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        let balance = books(&self.config).await?.balance(&AccountId::new(self.account)).await?;
        if self.json {
            return print_json(&serde_json::json!({
                "account": balance.account.as_str(),
                "currency": "USD",
                "posted": balance.posted.to_usd_string(),
                "leased": balance.leased.to_usd_string(),
                "available": balance.available.to_usd_string(),
            }));
        }
        println!("posted     {}   credits less usage", balance.posted);
        println!("leased     {}   set aside by running gateways", balance.leased);
        println!("available  {}", balance.available);
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct CreditArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// US dollars, such as 25 or 0.50.
    #[arg(long, value_name = "USD", value_parser = parse_money)]
    amount: Money,
    #[arg(long, default_value = DEFAULT_ACCOUNT)]
    account: String,
    /// Why; shown on the statement.
    #[arg(long, default_value = "credit added on the command line")]
    memo: String,
    /// When what is left of it ends: a day, or a moment like 2027-01-31T12:00:00Z (UTC) [default: never].
    #[arg(long, value_name = "WHEN", value_parser = parse_moment)]
    expires_at: Option<OffsetDateTime>,
    /// The lowest pays first; of equal ones the earliest to expire, of those the oldest.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Posting the same id again is a no-op: give one to make the command safe to repeat.
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    #[arg(long)]
    json: bool,
}

impl CreditArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        let grant = CreditGrant {
            id: self.id.unwrap_or_else(Uuid::now_v7),
            account: AccountId::new(self.account),
            amount: self.amount,
            memo: self.memo,
            granted_at: OffsetDateTime::now_utc(),
        };
        let books = books(&self.config).await?;
        let terms = CreditTerms { expires_at: self.expires_at, priority: self.priority };
        books.credit_on(&grant, &terms).await?;
        let balance = books.balance(&grant.account).await?;
        if self.json {
            return print_json(&serde_json::json!({
                "id": grant.id,
                "account": grant.account.as_str(),
                "amount": grant.amount.to_usd_string(),
                "posted": balance.posted.to_usd_string(),
            }));
        }
        println!("credited {}; posted balance {}", grant.amount, balance.posted);
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long)]
    json: bool,
}

impl AuditArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        let report = books(&self.config).await?.audit().await?;
        if self.json {
            print_json(&report)?;
        } else {
            print_checks(&report);
        }
        anyhow::ensure!(report.is_clean(), "the books do not hold: see the findings above");
        Ok(())
    }
}

pub(super) fn print_checks(report: &Audit) {
    for check in &report.checks {
        let verdict = if check.failed == 0 { "holds " } else { "FAILED" };
        println!("{verdict}  {:>8} checked  {}", check.checked, check.name);
        for evidence in &check.evidence {
            println!("          {evidence}");
        }
    }
}

pub(super) async fn books(config: &ConfigArgs) -> anyhow::Result<Books> {
    let (_, database) = config.database().await?;
    Books::open(database).await.context("cannot open the books")
}

pub(super) fn parse_day(text: &str) -> Result<Date, String> {
    Date::parse(text, format_description!("[year]-[month]-[day]"))
        .map_err(|_| format!("{text:?} is not a day: write YYYY-MM-DD"))
}

/// The start of a day, or a moment.
fn parse_moment(text: &str) -> Result<OffsetDateTime, String> {
    let day = || parse_day(text).ok().map(|day| day.midnight().assume_utc());
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .or_else(day)
        .ok_or_else(|| format!("{text:?} is not a moment: write YYYY-MM-DD, or YYYY-MM-DDTHH:MM:SSZ"))
}

/// An amount of dollars that is not negative.
pub fn parse_amount(text: &str) -> Result<Money, String> {
    match Money::from_usd_str(text) {
        Ok(amount) if amount >= Money::ZERO => Ok(amount),
        Ok(_) => Err("the amount must not be negative".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub fn parse_money(text: &str) -> Result<Money, String> {
    match Money::from_usd_str(text) {
        Ok(amount) if amount > Money::ZERO => Ok(amount),
        Ok(_) => Err("the amount must be over 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
