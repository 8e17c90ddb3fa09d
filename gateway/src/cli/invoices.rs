//! `sluice invoices list | show | close | pay | credit-note | pdf | csv | profile`.

use std::{io::Write, path::PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use sluice_billing::{
    AccountId, BillingProfile, CloseReport, Closing, InvoiceQuery, InvoiceStatus, IssueCreditNote, LineKind,
    Money, Party, Period, RecordPayment, is_country, render_pdf,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{ConfigArgs, money::parse_money, print_json, utc};
use crate::{organization::invoice_json, up::DEFAULT_ACCOUNT};

#[derive(Debug, Args)]
pub struct InvoicesArgs {
    #[command(subcommand)]
    command: InvoicesCommand,
}

#[derive(Debug, Subcommand)]
enum InvoicesCommand {
    /// Invoices, newest first.
    List(ListArgs),
    /// One invoice with its lines, payments and credit notes.
    Show(OneArgs),
    /// Draw up a month's invoices. A closed month never changes; usage that arrives later is on the next invoice.
    Close(CloseArgs),
    /// Record a payment; it frees the credit limit.
    Pay(PayArgs),
    /// Take back some of an invoice, or all of it.
    CreditNote(CreditNoteArgs),
    /// An invoice as PDF.
    Pdf(FileArgs),
    /// An invoice as CSV: one row a line, amounts that sum to what is due.
    Csv(FileArgs),
    /// Show or set to whom an account's invoices go, and where it is taxed. Issued invoices keep what they say.
    Profile(Box<ProfileArgs>),
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long)]
    account: Option<String>,
    /// Only this month, such as 2026-10.
    #[arg(long, value_name = "YYYY-MM")]
    period: Option<Period>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct OneArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Such as INV-000001.
    number: String,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CloseArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The month, such as 2026-10 (UTC). It must be over.
    #[arg(long, value_name = "YYYY-MM")]
    period: Period,
    /// Only this account [default: all, with their earlier months that are still open].
    #[arg(long)]
    account: Option<String>,
    /// Do not wait for this gateway, which will not come back; may be given again. What it ships later is late usage.
    #[arg(long, value_name = "NAME")]
    without_gateway: Vec<String>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct PayArgs {
    #[command(flatten)]
    config: ConfigArgs,
    number: String,
    /// US dollars and cents [default: all that is due].
    #[arg(long, value_name = "USD", value_parser = parse_money)]
    amount: Option<Money>,
    #[arg(long, default_value = "payment recorded on the command line")]
    memo: String,
    /// Recording the same id again is a no-op: give one to make the command safe to repeat.
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CreditNoteArgs {
    #[command(flatten)]
    config: ConfigArgs,
    number: String,
    /// The line that it is about (its position) [default: the invoice as a whole].
    #[arg(long, value_name = "N")]
    line: Option<u32>,
    /// US dollars and cents, with tax [default: all that was not taken back yet].
    #[arg(long, value_name = "USD", value_parser = parse_money)]
    amount: Option<Money>,
    /// Why; kept with the note.
    #[arg(long)]
    reason: String,
    /// Issuing the same id again is a no-op: give one to make the command safe to repeat.
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct FileArgs {
    #[command(flatten)]
    config: ConfigArgs,
    number: String,
    /// Write here [default: stdout].
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ProfileArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long, default_value = DEFAULT_ACCOUNT)]
    account: String,
    /// The customer's name. Without it, the profile is only shown.
    #[arg(long)]
    name: Option<String>,
    /// A line of the address; may be given again.
    #[arg(long, requires = "name", value_name = "LINE")]
    address: Vec<String>,
    /// Two capital letters, such as DE.
    #[arg(long, requires = "name", value_parser = parse_country)]
    country: Option<String>,
    #[arg(long, requires = "name")]
    region: Option<String>,
    #[arg(long, requires = "name")]
    tax_id: Option<String>,
    #[arg(long, requires = "name")]
    email: Option<String>,
    /// Charge no tax; the reason is printed on the invoice.
    #[arg(long, requires = "name", value_name = "REASON")]
    tax_exempt: Option<String>,
    #[arg(long)]
    json: bool,
}

impl InvoicesArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            InvoicesCommand::List(args) => list(args).await,
            InvoicesCommand::Show(args) => show(args).await,
            InvoicesCommand::Close(args) => close(args).await,
            InvoicesCommand::Pay(args) => pay(args).await,
            InvoicesCommand::CreditNote(args) => credit_note(args).await,
            InvoicesCommand::Pdf(args) => pdf(args).await,
            InvoicesCommand::Csv(args) => csv(args).await,
            InvoicesCommand::Profile(args) => profile(*args).await,
        }
    }
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let query = InvoiceQuery {
        account: args.account.map(AccountId::new),
        period: args.period,
        ..InvoiceQuery::default()
    };
    let found = args.config.books().await?.invoices(&query, OffsetDateTime::now_utc()).await?;
    if args.json {
        let data: Vec<_> = found.iter().map(invoice_json).collect();
        return print_json(&serde_json::json!({ "object": "list", "data": data }));
    }
    println!(
        "{:<14}  {:<10}  {:<20}  {:<7}  {:<7}  {:<10}  {:>14}  {:>14}",
        "NUMBER", "KIND", "ACCOUNT", "MONTH", "STATE", "DUE ON", "DUE USD", "OPEN USD"
    );
    for status in &found {
        let invoice = &status.invoice;
        println!(
            "{:<14}  {:<10}  {:<20}  {:<7}  {:<7}  {:<10}  {:>14}  {:>14}",
            invoice.number,
            invoice.kind.as_str(),
            invoice.account.as_str(),
            invoice.period.to_string(),
            status.state.as_str(),
            invoice.due_at.date().to_string(),
            invoice.totals().due.to_usd_string(),
            status.open.to_usd_string()
        );
    }
    Ok(())
}

async fn show(args: OneArgs) -> anyhow::Result<()> {
    let status = args.config.books().await?.invoice(&args.number, OffsetDateTime::now_utc()).await?;
    if args.json {
        return print_json(&invoice_json(&status));
    }
    print_invoice(&status);
    Ok(())
}

fn print_invoice(status: &InvoiceStatus) {
    let invoice = &status.invoice;
    let kind = invoice.kind.as_str();
    println!(
        "{kind} {} of {} for {}, {}",
        invoice.number,
        invoice.account,
        invoice.period,
        status.state.as_str()
    );
    println!("to {}, issued {}\n", invoice.customer.name, utc(invoice.issued_at.unix_timestamp()));
    for line in &invoice.lines {
        let quantity = match line.quantity {
            0 => String::new(),
            quantity => format!("{quantity} {}", line.unit),
        };
        let project = if line.kind == LineKind::Tax { "" } else { &line.project };
        println!(
            "{:>3}  {:<44}  {:<20}  {:>20}  {:>14}",
            line.position,
            line.description,
            project,
            quantity,
            line.amount.to_usd_string()
        );
    }
    println!("\ndue {} USD, open {}", invoice.totals().due.to_usd_string(), status.open);
    for payment in &status.payments {
        println!("paid {} on {}: {}", payment.amount, utc(payment.paid_at), payment.memo);
    }
    for note in &status.credit_notes {
        println!(
            "credit note {} over {} on {}: {}",
            note.number,
            note.amount,
            utc(note.issued_at),
            note.reason
        );
    }
}

async fn close(args: CloseArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let books = args.config.books().await?;
    let closing = Closing {
        rules: &config.invoices,
        tax: &config.tax,
        now: OffsetDateTime::now_utc(),
        without_gateways: &args.without_gateway,
    };
    let CloseReport { closed, failed } = match args.account {
        Some(account) => {
            let closed = books.close_period(&AccountId::new(account), args.period, &closing).await?;
            CloseReport { closed: vec![closed], failed: Vec::new() }
        }
        None => books.close_through(args.period, &closing).await?,
    };
    if args.json {
        print_json(&serde_json::json!({ "object": "list", "data": closed }))?;
    } else {
        for month in &closed {
            let invoice = month.invoice.as_deref().unwrap_or("nothing was used");
            println!("{} of {}: {invoice}", month.period, month.account);
        }
        if closed.is_empty() && failed.is_empty() {
            println!("{} is closed", args.period);
        }
    }
    let failed: Vec<String> = failed.iter().map(|(account, error)| format!("{account}: {error}")).collect();
    anyhow::ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

async fn pay(args: PayArgs) -> anyhow::Result<()> {
    let payment = RecordPayment {
        id: args.id.unwrap_or_else(Uuid::now_v7),
        invoice: args.number,
        amount: args.amount,
        memo: args.memo,
    };
    let status = args.config.books().await?.record_payment(&payment, OffsetDateTime::now_utc()).await?;
    if args.json {
        return print_json(&invoice_json(&status));
    }
    println!("{}: {} paid, {} open", status.invoice.number, status.paid, status.open);
    Ok(())
}

async fn credit_note(args: CreditNoteArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let request = IssueCreditNote {
        id: args.id.unwrap_or_else(Uuid::now_v7),
        invoice: args.number,
        line: args.line,
        amount: args.amount,
        reason: args.reason,
    };
    let books = args.config.books().await?;
    let note = books.issue_credit_note(&request, &config.invoices, OffsetDateTime::now_utc()).await?;
    if args.json {
        return print_json(&note);
    }
    println!("credit note {} on {}: {}, tax in it {}", note.number, note.invoice, note.amount, note.tax);
    Ok(())
}

async fn pdf(args: FileArgs) -> anyhow::Result<()> {
    let font = args.config.load()?.invoice_font()?;
    let status = args.config.books().await?.invoice(&args.number, OffsetDateTime::now_utc()).await?;
    let drawn = render_pdf(&status.invoice, font.as_deref()).context("invoices.font")?;
    write(args.output, &drawn)
}

async fn csv(args: FileArgs) -> anyhow::Result<()> {
    let status = args.config.books().await?.invoice(&args.number, OffsetDateTime::now_utc()).await?;
    write(args.output, status.invoice.to_csv().as_bytes())
}

fn write(output: Option<PathBuf>, bytes: &[u8]) -> anyhow::Result<()> {
    match output {
        Some(path) => {
            std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
        }
        None => Ok(std::io::stdout().write_all(bytes)?),
    }
}

async fn profile(args: ProfileArgs) -> anyhow::Result<()> {
    let books = args.config.books().await?;
    let account = AccountId::new(args.account);
    if let Some(name) = args.name {
        let party = Party {
            name,
            address: args.address,
            country: args.country,
            region: args.region,
            tax_id: args.tax_id,
            email: args.email,
        };
        let profile = BillingProfile { party, tax_exempt: args.tax_exempt };
        books.set_billing_profile(&account, &profile, OffsetDateTime::now_utc()).await?;
    }
    let profile = books.billing_profile(&account).await?;
    if args.json {
        return print_json(&profile);
    }
    println!("{}", profile.party.name);
    profile.party.address.iter().for_each(|line| println!("{line}"));
    for (title, value) in [
        ("country", profile.party.country),
        ("region", profile.party.region),
        ("tax id", profile.party.tax_id),
        ("email", profile.party.email),
        ("no tax", profile.tax_exempt),
    ] {
        if let Some(value) = value {
            println!("{title:<8} {value}");
        }
    }
    Ok(())
}

fn parse_country(text: &str) -> Result<String, String> {
    match is_country(text) {
        true => Ok(text.to_owned()),
        false => Err(format!("{text:?} is not a country: write two capital letters, such as DE")),
    }
}
