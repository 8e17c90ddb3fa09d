//! `prices.toml` in the data folder: what each model costs. Edit it and start again; requests are priced by the book
//! in force when they were admitted, so earlier bills keep their prices.

use std::{fmt::Write, fs, path::Path};

use anyhow::Context;
use sluice_billing::{Billing, PriceBook};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::warn;

const HEADER: &str = "\
# What a token costs, in US dollars per million. Edit, then start Sluice again.
# The book in force when a request is admitted prices it; bills already made do not change.
currency = \"USD\"
effective_from = \"2026-01-01T00:00:00Z\"
";
const DEFAULT_PRICES: [(&str, &str); 3] = [("input", "0.40"), ("cached_input", "0.04"), ("output", "2.20")];

/// Applies the file's book, after giving every model in `models` that has no price the default ones.
pub async fn ensure(billing: &Billing, path: &Path, models: &[String]) -> anyhow::Result<()> {
    let found = match fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let is_new = found.is_none();
    let mut text = found.unwrap_or_else(|| HEADER.to_owned());
    let known = if is_new { None } else { Some(parse(&text, path)?) };
    let unpriced =
        models.iter().filter(|model| known.as_ref().is_none_or(|book| book.model(model).is_none()));
    let mut changed = false;
    for model in unpriced {
        if !is_new {
            warn!(model, file = %path.display(), "the model has no price: the default prices are written to the file");
        }
        for (meter, usd_per_million) in DEFAULT_PRICES {
            // A JSON string without control characters is a TOML basic string.
            let model = serde_json::Value::from(model.as_str());
            write!(
                text,
                "\n[[price]]\nmodel = {model}\nmeter = \"{meter}\"\nusd_per_million = \"{usd_per_million}\"\n"
            )?;
        }
        changed = true;
    }
    let book = parse(&text, path)?;
    if changed {
        let partial = path.with_extension("partial");
        fs::write(&partial, &text)
            .and_then(|()| fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let applied =
        billing.apply_price_book(&book).await.with_context(|| format!("cannot apply {}", path.display()))?;
    let now = OffsetDateTime::now_utc();
    anyhow::ensure!(
        billing.price_book_in_force(now).as_ref() == Some(&applied),
        "the prices of {} are not in force: its effective_from is in the future, or a book with other prices was \
         applied after it; set effective_from to {}",
        path.display(),
        now.replace_nanosecond(0).expect("0 is a nanosecond").format(&Rfc3339)?
    );
    Ok(())
}

fn parse(text: &str, path: &Path) -> anyhow::Result<PriceBook> {
    PriceBook::from_toml(text).with_context(|| format!("{} is not a price book", path.display()))
}
