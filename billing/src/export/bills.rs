//! The datasets `usage` (a row a bill) and `cost` (a row a bill and SKU), and the lines of a bill.

use super::{
    ExportError,
    source::EventFact,
    table::{Cell, Kind, Table, column},
};
use crate::{
    catalog::Catalog,
    money::Money,
    price::{Line, cost},
};

/// The only currency that prices are written in.
pub(crate) const CURRENCY: &str = "USD";

pub(crate) static USAGE: Table = Table {
    columns: &[
        column("sequence", Kind::Count),
        column("request_id", Kind::Text),
        column("admitted_at", Kind::Moment),
        column("account", Kind::Text),
        column("org", Kind::Text),
        column("project", Kind::Text),
        column("api_key", Kind::Text),
        column("end_user", Kind::Text).nullable(),
        column("model", Kind::Text),
        column("node", Kind::Text).nullable(),
        column("service_tier", Kind::Text),
        column("input_tokens", Kind::Count).control(),
        column("cached_input_tokens", Kind::Count).control(),
        column("output_tokens", Kind::Count).control(),
        column("reasoning_tokens", Kind::Count).control(),
        column("characters", Kind::Count).control(),
        column("seconds", Kind::Count).control(),
        column("images", Kind::Count).control(),
        column("overrun_tokens", Kind::Count).control(),
        column("finish_reason", Kind::Text),
        column("time_to_first_token_ms", Kind::Count).nullable(),
        column("duration_ms", Kind::Count),
        column("price_book", Kind::Text),
        column("currency", Kind::Text),
        column("cost", Kind::Decimal).control(),
    ],
    currency: "currency",
};

pub(crate) static COST: Table = Table {
    columns: &[
        column("sequence", Kind::Count),
        column("request_id", Kind::Text),
        column("admitted_at", Kind::Moment),
        column("account", Kind::Text),
        column("org", Kind::Text),
        column("project", Kind::Text),
        column("api_key", Kind::Text),
        column("end_user", Kind::Text).nullable(),
        column("model", Kind::Text),
        column("service_tier", Kind::Text),
        column("sku", Kind::Text),
        column("meter", Kind::Text),
        column("quantity", Kind::Count).control(),
        column("unit_price", Kind::Decimal),
        column("unit_size", Kind::Count),
        column("list_unit_price", Kind::Decimal),
        column("list_unit_size", Kind::Count),
        column("price_book", Kind::Text),
        column("currency", Kind::Text),
        column("cost", Kind::Decimal).control(),
    ],
    currency: "currency",
};

/// The lines of a bill, derived from its quantities and price book. What does not come to the amount that was billed is
/// refused: an export is a statement, and the audit has to look first.
pub(crate) fn lines(catalog: &Catalog, event: &EventFact) -> Result<Vec<Line>, ExportError> {
    let billed = Money::from_pico(event.cost_pico);
    let not_derived = |derived: String| ExportError::NotDerived {
        request_id: event.request_id.clone(),
        billed: billed.to_string(),
        derived,
    };
    let lines = event.lines(event.book(catalog)?).map_err(not_derived)?;
    match cost(&lines) {
        Some(derived) if derived == billed => Ok(lines),
        derived => Err(not_derived(derived.map_or("too much".to_owned(), |derived| derived.to_string()))),
    }
}

pub(crate) fn usage_cells(event: &EventFact) -> [Cell<'_>; 25] {
    [
        Cell::Count(event.ordinal),
        Cell::text(&event.request_id),
        Cell::Moment(event.admitted_at_ms),
        Cell::text(&event.account),
        Cell::text(&event.org),
        Cell::text(&event.project),
        Cell::text(&event.api_key),
        Cell::named(&event.end_user),
        Cell::text(&event.model),
        Cell::named(&event.node),
        Cell::text(&event.service_tier),
        Cell::Count(event.input_tokens),
        Cell::Count(event.cached_input_tokens),
        Cell::Count(event.output_tokens),
        Cell::Count(event.reasoning_tokens),
        Cell::Count(event.characters),
        Cell::Count(event.seconds),
        Cell::Count(event.images),
        Cell::Count(event.overrun_tokens),
        Cell::text(&event.finish_reason),
        event.time_to_first_token_ms.map_or(Cell::Null, Cell::Count),
        Cell::Count(event.duration_ms),
        Cell::text(&event.price_book),
        Cell::text(CURRENCY),
        Cell::Decimal(event.cost_pico.into()),
    ]
}

pub(crate) fn cost_cells<'a>(event: &'a EventFact, line: &'a Line) -> [Cell<'a>; 20] {
    [
        Cell::Count(event.ordinal),
        Cell::text(&event.request_id),
        Cell::Moment(event.admitted_at_ms),
        Cell::text(&event.account),
        Cell::text(&event.org),
        Cell::text(&event.project),
        Cell::text(&event.api_key),
        Cell::named(&event.end_user),
        Cell::text(&event.model),
        Cell::text(&event.service_tier),
        Cell::text(&line.sku),
        Cell::text(line.meter.to_string()),
        Cell::Count(i64::try_from(line.quantity).unwrap_or(i64::MAX)),
        Cell::Decimal(line.unit_price.pico().into()),
        Cell::Count(i64::try_from(line.unit_size).unwrap_or(i64::MAX)),
        Cell::Decimal(line.list_unit_price.pico().into()),
        Cell::Count(i64::try_from(line.list_unit_size).unwrap_or(i64::MAX)),
        Cell::text(&event.price_book),
        Cell::text(CURRENCY),
        Cell::Decimal(line.amount.pico().into()),
    ]
}
