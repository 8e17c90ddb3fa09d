//! `prices.toml` in the data folder: the prices that a platform begins with, and the simplest way to change them.
//!
//! The database says what is in force; the file is one way into it, `sluice prices apply` the other. At a start:
//!
//! | the file | then |
//! | --- | --- |
//! | is missing | it is written: what is in force, else default prices |
//! | is the book in force | nothing |
//! | is new, or edited | it is applied, if it comes into force by that; else the start is refused, with the way out |
//! | was applied, and a book from a later moment took over | a note: the later one was applied by command |
//! | was applied, and another book from the same moment took over | refused: somebody went back to an old file |
//!
//! A model that is served and has no price gets the default ones, in the file, where the file is what is in force.

use std::{fmt::Write, fs, path::Path, sync::Arc};

use anyhow::{Context, bail};
use sluice_billing::{Billing, Catalog, PriceBook, Standing};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{info, warn};

const HEADER: &str = "\
# What a token costs, in US dollars per million. Edit, then start Sluice again; or change a running one's prices with
# `sluice prices apply FILE` and a later effective_from. `sluice prices apply --help` says what a price file may hold.
# The book in force when a request is admitted prices it; bills already made do not change.
";
const BEGINNING: &str = "currency = \"USD\"\neffective_from = \"2026-01-01T00:00:00Z\"\n";
const DEFAULT_PRICES: [(&str, &str); 3] = [("input", "0.40"), ("cached_input", "0.04"), ("output", "2.20")];

/// Brings the file's prices into force, after giving every model in `models` that has none the default ones.
pub async fn ensure(billing: &Billing, path: &Path, models: &[String]) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let catalog = billing.catalog();
    let in_force = catalog.in_force(now).cloned();
    let found = match fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let is_new = found.is_none();
    let text = found.unwrap_or_else(|| {
        let prices = in_force.as_ref().map_or_else(|| BEGINNING.to_owned(), |book| book.canonical());
        format!("{HEADER}{prices}")
    });
    let file = if is_new && in_force.is_none() { None } else { Some(parse(&text, path)?) };
    if let Some(file) = &file
        && let Some(in_force) = later(file, &catalog, now, path)?
    {
        note(path, &in_force, models);
        return Ok(());
    }
    let unpriced = |model: &&String| file.as_ref().is_none_or(|book| !book.sells(model));
    let unpriced: Vec<_> = models.iter().filter(unpriced).collect();
    if !is_new {
        for model in &unpriced {
            warn!(model, file = %path.display(), "the model has no price: the default prices are written to the file");
        }
    }
    if file.is_none() && unpriced.is_empty() {
        // Nothing is served yet, and nothing has a price: the next start knows more.
        return Ok(());
    }
    let text = with_defaults(text, &unpriced)?;
    let book = parse(&text, path)?;
    let plan = catalog.plan(&book, now);
    match plan.standing {
        Standing::Known | Standing::Backdated => {}
        Standing::Future if plan.in_force_from <= now => {}
        Standing::Future | Standing::Superseded => return refuse(&book, in_force.as_deref(), now, path),
    }
    if is_new || !unpriced.is_empty() {
        write(path, &text)?;
    }
    billing.apply_price_book(&book).await.with_context(|| format!("cannot apply {}", path.display()))?;
    Ok(())
}

/// The book in force, if the file was applied and it is another one. An error if the file is an old one that was
/// edited since.
fn later(
    file: &PriceBook,
    catalog: &Catalog,
    now: OffsetDateTime,
    path: &Path,
) -> anyhow::Result<Option<Arc<PriceBook>>> {
    let known = catalog.get(file.hash()).is_ok();
    let Some(in_force) = catalog.in_force(now).filter(|book| known && book.hash() != file.hash()) else {
        return Ok(None);
    };
    if in_force.effective_from() == file.effective_from() {
        return refuse(file, Some(in_force), now, path);
    }
    Ok(Some(in_force.clone()))
}

fn refuse<T>(
    file: &PriceBook,
    in_force: Option<&PriceBook>,
    now: OffsetDateTime,
    path: &Path,
) -> anyhow::Result<T> {
    let path = path.display();
    let now_text = now.replace_nanosecond(0).expect("0 is a nanosecond").format(&Rfc3339)?;
    if file.effective_from() > now {
        bail!(
            "the prices of {path} are not in force: its effective_from is in the future. Set it to {now_text}; or leave \
             here what is in force today, and apply the new prices ahead of time with `sluice prices apply`"
        );
    }
    let other = in_force.map_or("another book", |book| book.hash().as_str());
    bail!(
        "the prices of {path} are not in force: the book {other} was applied after it. To go on with that one, put it \
         here: `sluice prices show --toml`; to replace it, set effective_from here to {now_text}"
    )
}

/// The file is history, which is as it should be; what it cannot do any more is price a model.
fn note(path: &Path, in_force: &PriceBook, models: &[String]) {
    info!(
        file = %path.display(), in_force = %in_force.hash(),
        "prices.toml is not what is in force: other prices were applied since; `sluice prices show` prints them"
    );
    for model in models.iter().filter(|model| !in_force.sells(model)) {
        warn!(
            model,
            "the model has no price, and its requests are refused; add one with `sluice prices apply`"
        );
    }
}

fn with_defaults(mut text: String, models: &[&String]) -> anyhow::Result<String> {
    for model in models {
        for (meter, usd_per_million) in DEFAULT_PRICES {
            // A JSON string without control characters is a TOML basic string.
            let model = serde_json::Value::from(model.as_str());
            write!(
                text,
                "\n[[price]]\nmodel = {model}\nmeter = \"{meter}\"\nusd_per_million = \"{usd_per_million}\"\n"
            )?;
        }
    }
    Ok(text)
}

/// The whole file or none of it.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, text)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn parse(text: &str, path: &Path) -> anyhow::Result<PriceBook> {
    PriceBook::from_toml(text).with_context(|| format!("{} is not a price book", path.display()))
}
