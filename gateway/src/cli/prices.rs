//! `sluice prices apply | show | list`: price books, applied and read beside a running server.

use std::{collections::BTreeSet, fmt, fs, path::PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sluice_billing::{
    AccountId, Books, Catalog, Change, Meter, Money, Plan, PriceBook, PriceTerms, ServiceTier, Standing,
    Total,
};
use time::{Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use super::{ConfigArgs, Refused, money::books, print_json};

#[derive(Debug, Args)]
pub struct PricesArgs {
    #[command(subcommand)]
    command: PricesCommand,
}

#[derive(Debug, Subcommand)]
enum PricesCommand {
    /// Check a price file, show what it changes, and store it. Running servers take it up within a second.
    #[command(after_long_help = FILE_HELP)]
    Apply(ApplyArgs),
    /// The prices in force, now or at another time, for everybody or as one account has them.
    Show(ShowArgs),
    /// Every price book that was applied, and when it is in force.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long)]
        json: bool,
    },
}

const FILE_HELP: &str = "\
A price file:

  currency = \"USD\"
  effective_from = \"2026-08-01T00:00:00Z\"   requests admitted from then on are priced by it

  [[price]]
  model = \"lightning-1\"
  meter = \"output\"              input | cached_input | output | reasoning | characters | seconds | images | requests
  usd_per_million = \"0.80\"      or usd_per_unit = \"0.04\"; or usd = \"0.006\" with per = 60
  service_tier = \"batch\"        optional: default | batch | priority
  account = \"acme\"              optional: only this account has the price
  sku = \"lightning-1.out\"       optional: the name on statements
  scheme = \"flat\"               optional: flat | package (usd and per) | graduated | volume (tiers)
  tiers = [{ up_to = 1000000, usd_per_million = \"0.80\" }, { usd_per_million = \"0.60\" }]

A book is complete in itself: what it does not name has no price once it is in force. `sluice prices show --toml` prints
what is in force as a file to begin with.

Exit status: 0 the book is stored (or was; or would be, with --dry-run), 2 the file is refused, 1 anything else failed.";

#[derive(Debug, Args)]
struct ApplyArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The price file.
    file: PathBuf,
    /// Check and show, and store nothing.
    #[arg(long)]
    dry_run: bool,
    /// Take a book whose effective_from has passed: it comes into force at once. Bills that were made keep their prices.
    #[arg(long)]
    backdated: bool,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// When: YYYY-MM-DD, or like 2026-01-31T12:00:00Z (UTC) [default: now].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    at: Option<OffsetDateTime>,
    /// As this account has them: its contract where it has one, the list beside it.
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// Print the book as a price file.
    #[arg(long, conflicts_with_all = ["account", "json"])]
    toml: bool,
    #[arg(long)]
    json: bool,
}

impl PricesArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            PricesCommand::Apply(args) => args.run().await,
            PricesCommand::Show(args) => args.run().await,
            PricesCommand::List { config, json } => list(&books(&config).await?.catalog().await?, json),
        }
    }
}

impl ApplyArgs {
    async fn run(self) -> anyhow::Result<()> {
        let path = self.file.display();
        let text = fs::read_to_string(&self.file).map_err(|error| Refused(anyhow!("{path}: {error}")))?;
        let book = PriceBook::from_toml(&text)
            .map_err(|error| Refused(anyhow::Error::from(error).context(format!("{path}"))))?;
        let books = books(&self.config).await?;
        let plan = books.catalog().await?.plan(&book, OffsetDateTime::now_utc());
        self.refuse(&book, &plan)?;
        let warnings = strangers(&books, &book).await?;
        let stores = plan.standing != Standing::Known && !self.dry_run;
        if stores {
            books.apply_price_book(&book).await?;
        }
        if self.json {
            return print_json(&json!({
                "object": "price_book.plan",
                "hash": book.hash(),
                "effective_from": rfc3339(book.effective_from()),
                "status": if plan.standing == Standing::Known { "known" } else if stores { "applied" } else { "dry_run" },
                "in_force_from": rfc3339(plan.in_force_from),
                "in_force_until": plan.in_force_until.map(rfc3339),
                "replaces": plan.replaces.as_ref().map(|old| old.hash()),
                "changes": plan.changes.iter().map(change_json).collect::<Vec<_>>(),
                "warnings": warnings,
            }));
        }
        print_changes(&plan);
        for warning in warnings {
            eprintln!("warning: {warning}");
        }
        let verb = match plan.standing {
            Standing::Known => "was applied before: nothing to do",
            _ if stores => "applied",
            _ => "would be applied (--dry-run)",
        };
        println!("{} {verb}", book.hash());
        println!("in force from {}{}", rfc3339(plan.in_force_from), until(plan.in_force_until));
        Ok(())
    }

    fn refuse(&self, book: &PriceBook, plan: &Plan) -> Result<(), Refused> {
        let path = self.file.display();
        let from = rfc3339(book.effective_from());
        match plan.standing {
            Standing::Known | Standing::Future => Ok(()),
            Standing::Backdated if self.backdated => Ok(()),
            Standing::Backdated => Err(Refused(anyhow!(
                "{path}: effective_from: {from} has passed. Set a later one; or say --backdated to bring the book into \
                 force at once (bills that were made keep their prices)"
            ))),
            Standing::Superseded => {
                let other = plan.replaces.as_ref().expect("a superseded book has one that supersedes it");
                Err(Refused(anyhow!(
                    "{path}: effective_from: {from} is before {}, from when {} is in force: the book would never price a \
                     request. Set a later one",
                    rfc3339(other.effective_from()),
                    other.hash()
                )))
            }
        }
    }
}

/// A contract of an account that does not exist is probably a typing error.
async fn strangers(books: &Books, book: &PriceBook) -> anyhow::Result<Vec<String>> {
    let known: BTreeSet<_> = books.accounts().await?.into_iter().map(|balance| balance.account).collect();
    let named: BTreeSet<_> = book.rows().filter_map(|row| row.account).collect();
    let strange = named.into_iter().filter(|account| !known.contains(*account));
    Ok(strange.map(|account| format!("account: there is no account \"{account}\" yet")).collect())
}

fn print_changes(plan: &Plan) {
    match (&plan.replaces, plan.standing) {
        (_, Standing::Known) => return,
        (Some(old), _) => {
            println!("changes to {}, in force from {}:", old.hash(), rfc3339(old.effective_from()))
        }
        (None, _) => println!("the first book to be in force:"),
    }
    if plan.changes.is_empty() {
        println!("  none");
    }
    for change in &plan.changes {
        let what = Label { change };
        match (&change.old, &change.new) {
            (Some(old), Some(new)) => {
                let percent =
                    change.basis_points.map_or(String::new(), |points| format!("  ({})", percent(points)));
                let renamed = if old.sku == new.sku { "" } else { ", SKU renamed" };
                println!(
                    "  ~ {what}  {} -> {}{percent}{renamed}",
                    describe(change.meter, old),
                    describe(change.meter, new)
                );
            }
            (None, Some(new)) => println!("  + {what}  {}", describe(change.meter, new)),
            (Some(old), None) => println!("  - {what}  {}", describe(change.meter, old)),
            (None, None) => {}
        }
    }
}

/// What a change is about: `lightning-1 output (batch, account acme)`.
struct Label<'a> {
    change: &'a Change,
}

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { model, service_tier, account, meter, .. } = self.change;
        write!(f, "{model} {meter}")?;
        if *service_tier != ServiceTier::Default {
            write!(f, ", {service_tier}")?;
        }
        account.as_ref().map_or(Ok(()), |account| write!(f, ", account {account}"))
    }
}

fn change_json(change: &Change) -> Value {
    let kind = match (&change.old, &change.new) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    };
    let mut value = serde_json::to_value(change).expect("a change is plain data");
    value["change"] = kind.into();
    value["percent"] = change.basis_points.map(hundredths).into();
    value
}

impl ShowArgs {
    async fn run(self) -> anyhow::Result<()> {
        let at = self.at.unwrap_or_else(OffsetDateTime::now_utc);
        let catalog = books(&self.config).await?.catalog().await?;
        let book = catalog.in_force(at).with_context(|| {
            let first = catalog.books().first().map_or("none was applied yet".to_owned(), |first| {
                format!("the first begins at {}", rfc3339(first.effective_from()))
            });
            format!("no price book is in force at {}: {first}", rfc3339(at))
        })?;
        if self.toml {
            print!("{}", book.canonical());
            return Ok(());
        }
        let shown = shown(book, self.account.map(AccountId::new).as_ref());
        let ends = catalog.until(book.effective_from());
        if self.json {
            return print_json(&json!({
                "object": "price_book",
                "hash": book.hash(),
                "currency": "USD",
                "effective_from": rfc3339(book.effective_from()),
                "in_force_until": ends.map(rfc3339),
                "prices": shown,
            }));
        }
        println!("{}", book.hash());
        println!("in force from {}{}", rfc3339(book.effective_from()), until(ends));
        println!();
        let width = |of: fn(&Shown) -> usize, head: usize| shown.iter().map(of).max().unwrap_or(0).max(head);
        let (model, sku) = (width(|row| row.model.len(), 5), width(|row| row.terms.sku.len(), 3));
        let account = width(|row| row.account.as_deref().map_or(0, str::len), 7);
        println!(
            "{:<model$}  {:<12}  {:<8}  {:<account$}  {:<sku$}  PRICE",
            "MODEL", "METER", "TIER", "ACCOUNT", "SKU"
        );
        for row in &shown {
            let whose = row.account.as_deref().unwrap_or("-");
            let list = match &row.list {
                Some(list) if *list != row.terms => format!("  (list: {})", describe(row.meter, list)),
                _ => String::new(),
            };
            println!(
                "{:<model$}  {:<12}  {:<8}  {whose:<account$}  {:<sku$}  {}{list}",
                row.model,
                row.meter.as_str(),
                row.service_tier.as_str(),
                row.terms.sku,
                describe(row.meter, &row.terms)
            );
        }
        Ok(())
    }
}

/// A price as `show` prints it.
#[derive(serde::Serialize)]
struct Shown {
    model: String,
    service_tier: ServiceTier,
    meter: Meter,
    /// Whose contract it is; None: the list.
    account: Option<String>,
    #[serde(flatten)]
    terms: PriceTerms,
    /// What everybody pays, beside a contract.
    #[serde(skip_serializing_if = "Option::is_none")]
    list: Option<PriceTerms>,
}

/// Every price of a book; or, for an account, those that it has.
fn shown(book: &PriceBook, account: Option<&AccountId>) -> Vec<Shown> {
    let mut shown = Vec::new();
    for row in book.rows() {
        let nobody = AccountId::new("");
        let prices = book.prices(row.account.or(account).unwrap_or(&nobody), row.model, row.service_tier);
        let Some(prices) = prices else { continue };
        let replaced = prices.get(row.meter).is_some_and(|price| price != row.price);
        if account.is_some() && (row.account.is_some_and(|other| Some(other) != account) || replaced) {
            continue;
        }
        let list = prices.list(row.meter).filter(|_| row.account.is_some());
        shown.push(Shown {
            model: row.model.to_owned(),
            service_tier: row.service_tier,
            meter: row.meter,
            account: row.account.map(AccountId::to_string),
            terms: PriceTerms::of(&row),
            list: list.map(|price| PriceTerms::new(&price.sku, &price.rate)),
        });
    }
    shown
}

fn list(catalog: &Catalog, json: bool) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let in_force = catalog.in_force(now).map(|book| book.hash());
    let state = |book: &PriceBook| match catalog.in_force(book.effective_from()) {
        _ if Some(book.hash()) == in_force => "in force",
        Some(other) if other.hash() != book.hash() => "replaced",
        _ if book.effective_from() > now => "future",
        _ => "past",
    };
    let ends = |book: &PriceBook| match state(book) {
        "replaced" => None,
        _ => catalog.until(book.effective_from()),
    };
    if json {
        let row = |book: &std::sync::Arc<PriceBook>| {
            json!({
                "hash": book.hash(),
                "effective_from": rfc3339(book.effective_from()),
                "in_force_until": ends(book).map(rfc3339),
                "state": state(book),
                "prices": book.rows().count(),
            })
        };
        let rows: Vec<_> = catalog.books().iter().rev().map(row).collect();
        return print_json(&json!({ "object": "list", "data": rows }));
    }
    println!("{:<64}  {:<20}  {:<20}  {:<8}  PRICES", "HASH", "FROM (UTC)", "UNTIL (UTC)", "STATE");
    for book in catalog.books().iter().rev() {
        let until = ends(book).map_or("-".to_owned(), rfc3339);
        let (hash, from) = (book.hash().as_str(), rfc3339(book.effective_from()));
        println!("{hash:<64}  {from:<20}  {until:<20}  {:<8}  {}", state(book), book.rows().count());
    }
    Ok(())
}

/// A price in words: `0.80 USD per million tokens`, `0.015 USD per package of 1000 characters`.
fn describe(meter: Meter, terms: &PriceTerms) -> String {
    let unit = meter.unit();
    if terms.unit_size > 1 {
        return format!("{} per package of {} {unit}s", terms.unit_price, terms.unit_size);
    }
    let (factor, per) = match unit {
        "token" | "character" => (1_000_000, format!("per million {unit}s")),
        _ => (1, format!("per {unit}")),
    };
    let amount = |price: Money| Total::from_pico(i128::from(price.pico()) * factor);
    if terms.tiers.is_empty() {
        return format!("{} {per}", amount(terms.unit_price));
    }
    let tier = |tier: &sluice_billing::TierTerms| match tier.up_to {
        Some(up_to) => format!("{} up to {up_to}", amount(tier.unit_price)),
        None => format!("{} beyond", amount(tier.unit_price)),
    };
    let tiers: Vec<_> = terms.tiers.iter().map(tier).collect();
    format!("{}: {}; {per}", terms.scheme, tiers.join(", "))
}

/// `+12.50%`.
fn percent(basis_points: i64) -> String {
    let sign = if basis_points > 0 { "+" } else { "" };
    format!("{sign}{}%", hundredths(basis_points))
}

fn hundredths(number: i64) -> String {
    let (sign, size) = (if number < 0 { "-" } else { "" }, number.unsigned_abs());
    format!("{sign}{}.{:02}", size / 100, size % 100)
}

fn until(end: Option<OffsetDateTime>) -> String {
    end.map_or(" on".to_owned(), |end| format!(" until {}", rfc3339(end)))
}

fn rfc3339(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    at.format(&Rfc3339).unwrap_or_else(|_| at.unix_timestamp().to_string())
}

fn parse_time(text: &str) -> Result<OffsetDateTime, String> {
    let day =
        Date::parse(text, format_description!("[year]-[month]-[day]")).map(|day| day.midnight().assume_utc());
    day.or_else(|_| OffsetDateTime::parse(text, &Rfc3339))
        .map_err(|_| format!("{text:?} is not a time: write YYYY-MM-DD, or like 2026-01-31T12:00:00Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_told_in_the_unit_that_people_use() {
        let check = |meter: &str, price: &str, expect: &str| {
            let text = format!(
                "currency = \"USD\"\neffective_from = \"2026-01-01T00:00:00Z\"\n\
                 [[price]]\nmodel = \"m\"\nmeter = \"{meter}\"\n{price}\n"
            );
            let book = PriceBook::from_toml(&text).expect("a book");
            let row = book.rows().next().expect("a row");
            assert_eq!(describe(row.meter, &PriceTerms::of(&row)), expect);
        };
        check("input", "usd_per_million = \"0.8\"", "0.80 USD per million tokens");
        check("images", "usd_per_unit = \"0.04\"", "0.04 USD per image");
        check("seconds", "usd = \"0.006\"\nper = 60", "0.0001 USD per second");
        check(
            "characters",
            "scheme = \"package\"\nusd = \"0.015\"\nper = 1000",
            "0.015 USD per package of 1000 characters",
        );
        check(
            "input",
            "scheme = \"volume\"\ntiers = [{ up_to = 5, usd_per_million = \"2\" }, { usd_per_million = \"1\" }]",
            "volume: 2.00 USD up to 5, 1.00 USD beyond; per million tokens",
        );
        assert_eq!(
            (percent(1_250), percent(-5), percent(0)),
            ("+12.50%".into(), "-0.05%".into(), "0.00%".into())
        );
    }

    #[test]
    fn an_account_sees_its_own_prices_and_no_one_elses() {
        let text = "currency = \"USD\"\neffective_from = \"2026-01-01T00:00:00Z\"\nprice = [\
             { model = \"m\", meter = \"images\", usd_per_unit = \"3\" },\
             { model = \"m\", meter = \"images\", usd_per_unit = \"2\", account = \"acme\" },\
             { model = \"m\", meter = \"images\", usd_per_unit = \"1\", account = \"beta\" },\
             { model = \"p\", meter = \"images\", usd_per_unit = \"9\", account = \"beta\" }]";
        let book = PriceBook::from_toml(text).expect("a book");
        let seen = |account: Option<&str>| -> Vec<_> {
            let rows = shown(&book, account.map(AccountId::new).as_ref());
            let dollars = |terms: &PriceTerms| terms.unit_price.pico() / 1_000_000_000_000;
            rows.iter().map(|row| (dollars(&row.terms), row.list.as_ref().map(dollars))).collect()
        };
        assert_eq!(seen(None), [(3, None), (2, Some(3)), (1, Some(3)), (9, None)]);
        assert_eq!(seen(Some("acme")), [(2, Some(3))]);
        assert_eq!(seen(Some("beta")), [(1, Some(3)), (9, None)]);
        assert_eq!(seen(Some("other")), [(3, None)]);
    }
}
