//! `sluice budgets set | list | delete`: what an organisation, a project or a key may spend.

use clap::{Args, Subcommand, ValueEnum};
use sluice_billing::{Books, Budget, BudgetPeriod, BudgetScope, Money};
use time::OffsetDateTime;

use super::{ConfigArgs, money::parse_amount, print_json};
use crate::auth::Tenancy;

#[derive(Debug, Args)]
pub struct BudgetsArgs {
    #[command(subcommand)]
    command: BudgetsCommand,
}

#[derive(Debug, Subcommand)]
enum BudgetsCommand {
    /// Make a budget, or change limit, thresholds and hardness of the one with this id. Servers keep to it within a second.
    Set(SetArgs),
    /// Every budget, with what is spent in its present window.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long)]
        json: bool,
    },
    /// End a budget by its id.
    Delete {
        #[command(flatten)]
        config: ConfigArgs,
        id: String,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sluice budgets set ci-a-day --key key-0190 --period day --limit 5
  sluice budgets set acme --org org-acme --period month --limit 2000 --thresholds 50,80,100
  sluice budgets set watch --project proj-web --period month --limit 300 --soft
")]
struct SetArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its name: letters, digits, '-', '_' and '.'.
    id: String,
    #[command(flatten)]
    scope: ScopeArgs,
    /// When it begins anew, in UTC.
    #[arg(long, value_enum)]
    period: PeriodArg,
    /// US dollars, such as 25 or 0.50.
    #[arg(long, value_name = "USD", value_parser = parse_amount)]
    limit: Money,
    /// Only raise notices. Without it, generation ends at the token that the limit still affords.
    #[arg(long)]
    soft: bool,
    /// Percentages of the limit at which a notice is raised.
    #[arg(long, value_delimiter = ',', default_value = "80,100", value_name = "PERCENT")]
    thresholds: Vec<u16>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ScopeArgs {
    /// The organisation whose spending is limited.
    #[arg(long, value_name = "ID")]
    org: Option<String>,
    #[arg(long, value_name = "ID")]
    project: Option<String>,
    #[arg(long, value_name = "ID")]
    key: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PeriodArg {
    Day,
    Month,
    Total,
}

impl BudgetsArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            BudgetsCommand::Set(args) => set(args).await,
            BudgetsCommand::List { config, json } => list(config, json).await,
            BudgetsCommand::Delete { config, id, json } => delete(config, &id, json).await,
        }
    }
}

async fn set(args: SetArgs) -> anyhow::Result<()> {
    let (scope, scope_id) = match (args.scope.org, args.scope.project, args.scope.key) {
        (Some(id), ..) => (BudgetScope::Org, id),
        (None, Some(id), _) => (BudgetScope::Project, id),
        (None, None, id) => (BudgetScope::Key, id.unwrap_or_default()),
    };
    let period = match args.period {
        PeriodArg::Day => BudgetPeriod::Day,
        PeriodArg::Month => BudgetPeriod::Month,
        PeriodArg::Total => BudgetPeriod::Total,
    };
    let (_, database) = args.config.database().await?;
    let owner = Tenancy::new(database.clone()).org_of(scope, &scope_id).await?;
    anyhow::ensure!(owner.is_some(), "--{}: there is no {scope_id:?}", scope.as_str());
    let budget = Budget {
        id: args.id,
        scope,
        scope_id,
        period,
        limit: args.limit,
        hard: !args.soft,
        thresholds: args.thresholds,
    };
    Books::open(database).await?.put_budget(&budget).await?;
    if args.json {
        return print_json(&budget);
    }
    println!("{budget}: in force within a second");
    Ok(())
}

async fn list(config: ConfigArgs, json: bool) -> anyhow::Result<()> {
    let (_, database) = config.database().await?;
    let budgets = Books::open(database).await?.budgets(OffsetDateTime::now_utc()).await?;
    if json {
        return print_json(&serde_json::json!({ "object": "list", "currency": "USD", "data": budgets }));
    }
    println!(
        "{:<20}  {:<7}  {:<37}  {:<5}  {:<4}  {:>18}  {:>18}  {:>18}",
        "ID", "SCOPE", "OF", "EVERY", "KIND", "LIMIT", "SPENT", "LEASED"
    );
    for status in budgets {
        let Budget { id, scope, scope_id, period, limit, hard, .. } = status.budget;
        println!(
            "{id:<20}  {:<7}  {scope_id:<37}  {:<5}  {:<4}  {limit:>18}  {:>18}  {:>18}",
            scope.as_str(),
            period.as_str(),
            if hard { "hard" } else { "soft" },
            status.spent,
            status.leased
        );
    }
    Ok(())
}

async fn delete(config: ConfigArgs, id: &str, json: bool) -> anyhow::Result<()> {
    let (_, database) = config.database().await?;
    let deleted = Books::open(database).await?.delete_budget(id).await?;
    anyhow::ensure!(deleted, "there is no budget {id:?}; `sluice budgets list` shows them all");
    if json {
        return print_json(&serde_json::json!({ "id": id, "deleted": true }));
    }
    println!("{id} is no longer in force");
    Ok(())
}
