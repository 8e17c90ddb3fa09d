//! The numbers in a schema, such that what is enforced is what was written.
//!
//! llguidance computes in f64 and i64: larger whole numbers would become others, some bounds a panic. An exclusive bound
//! towards zero that is a whole number lets itself through where the other bound is less than 1 away. So it becomes an
//! inclusive one, by a margin far below what anybody writes; and what f64 does not hold exactly is refused.
//!
//! ```text
//! {"exclusiveMinimum": 0, "maximum": 0.5}  -->  {"minimum": 1e-9, "maximum": 0.5}
//! ```

use serde_json::{Map, Value};

/// 2^53 - 1: f64 tells every smaller whole number from its neighbours.
const WHOLE_MAX: f64 = 9_007_199_254_740_991.0;
/// Digits that f64 always holds.
const DIGITS: usize = 15;
const MARGIN_DECIMALS_MAX: usize = 9;
/// As digits in an i64, which llguidance reads them into.
const BOUND_DECIMALS_MAX: usize = 18;

/// A keyword, and what is wrong with it.
pub(super) type Fault = (&'static str, String);

/// Rewrites the bounds of one schema.
pub(super) fn rewrite_bounds(schema: &mut Map<String, Value>) -> Result<(), Fault> {
    let number = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    for keyword in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
        let Some(bound) = number(keyword) else { continue };
        let decimals = format!("{bound}").split_once('.').map_or(0, |(_, decimals)| decimals.len());
        if decimals > BOUND_DECIMALS_MAX {
            return Err((keyword, format!("must have at most {BOUND_DECIMALS_MAX} decimals")));
        }
    }
    let least = lower("minimum", number("minimum"), number("exclusiveMinimum"), 1.0)?;
    let most = lower("maximum", number("maximum"), number("exclusiveMaximum"), -1.0)?;
    for (bound, inclusive, exclusive) in
        [(least, "minimum", "exclusiveMinimum"), (most, "maximum", "exclusiveMaximum")]
    {
        let Some(bound) = bound else { continue };
        // In the place of one of them: the order of keywords has a meaning.
        let (keyword, other) = if bound.exclusive { (exclusive, inclusive) } else { (inclusive, exclusive) };
        schema.insert(keyword.to_owned(), bound.value.into());
        schema.shift_remove(other);
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Bound {
    value: f64,
    exclusive: bool,
}

/// The tighter of two lower bounds, as one that llguidance enforces; with `sign` -1, of two upper bounds.
fn lower(
    keyword: &'static str,
    inclusive: Option<f64>,
    exclusive: Option<f64>,
    sign: f64,
) -> Result<Option<Bound>, Fault> {
    let closed = inclusive.map(|value| Bound { value: value * sign, exclusive: false });
    let open = exclusive.map(|value| Bound { value: value * sign, exclusive: true });
    let bound = match (closed, open) {
        (Some(closed), Some(open)) if open.value >= closed.value => open,
        (Some(closed), _) => closed,
        (None, Some(open)) => open,
        (None, None) => return Ok(None),
    };
    if bound.value > WHOLE_MAX {
        let keyword = match (bound.exclusive, keyword) {
            (false, _) => keyword,
            (true, "minimum") => "exclusiveMinimum",
            (true, _) => "exclusiveMaximum",
        };
        return Err((
            keyword,
            format!("must be within +-{WHOLE_MAX}, the whole numbers that a double tells apart"),
        ));
    }
    let bound = match bound {
        // Beyond the others lie only numbers that cannot be told apart.
        Bound { value, .. } if value < -WHOLE_MAX => Bound { value: -WHOLE_MAX, exclusive: false },
        // On the other side of zero, the sign is put before the range of the opposite bounds.
        Bound { value, exclusive: true } if value >= 0.0 && value.fract() == 0.0 => {
            Bound { value: beyond(value), exclusive: false }
        }
        bound => bound,
    };
    // Minus zero would be written with its sign.
    Ok(Some(Bound { value: bound.value * sign + 0.0, ..bound }))
}

/// Past a whole number by a margin far below the decimals that are in use, which a double still holds.
fn beyond(whole: f64) -> f64 {
    let digits = format!("{}", whole.abs()).len();
    let decimals = DIGITS.saturating_sub(digits).min(MARGIN_DECIMALS_MAX);
    let past = whole + 10f64.powi(-(decimals as i32));
    format!("{past:.decimals$}").parse().expect("a float reads what it wrote")
}

/// Whether all numbers in a literal are what was written.
pub(super) fn is_exact(literal: &Value) -> bool {
    match literal {
        Value::Number(number) => number.as_f64().is_some_and(|number| number.abs() <= WHOLE_MAX),
        Value::Array(items) => items.iter().all(is_exact),
        Value::Object(members) => members.values().all(is_exact),
        Value::Null | Value::Bool(_) | Value::String(_) => true,
    }
}

pub(super) fn inexact() -> String {
    format!("holds a number beyond +-{WHOLE_MAX}, which a double does not hold exactly: send it as a string")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(schema: Value, expect: Result<Value, &str>) {
        let mut bounds = schema.as_object().expect("an object").clone();
        match (rewrite_bounds(&mut bounds), expect) {
            (Ok(()), Ok(expect)) => assert_eq!(Value::Object(bounds), expect, "{schema}"),
            (Err((keyword, _)), Err(expect)) => assert_eq!(keyword, expect, "{schema}"),
            (outcome, _) => panic!("{schema}: {outcome:?}"),
        }
    }

    #[test]
    fn exclusive_whole_numbers_become_inclusive_bounds() {
        check(json!({"exclusiveMinimum": 0, "maximum": 0.5}), Ok(json!({"minimum": 1e-9, "maximum": 0.5})));
        check(
            json!({"minimum": -0.5, "exclusiveMaximum": 0}),
            Ok(json!({"minimum": -0.5, "maximum": -1e-9})),
        );
        check(json!({"exclusiveMinimum": 0.5}), Ok(json!({"exclusiveMinimum": 0.5})));
        check(json!({"minimum": 3, "exclusiveMinimum": 2}), Ok(json!({"minimum": 3.0})));
        check(json!({"minimum": 2, "exclusiveMinimum": 2}), Ok(json!({"minimum": 2.000_000_001})));
        check(
            json!({"exclusiveMaximum": 123_456_789_012u64}),
            Ok(json!({"exclusiveMaximum": 123_456_789_012.0})),
        );
        check(json!({"exclusiveMinimum": 123_456_789_012u64}), Ok(json!({"minimum": 123_456_789_012.001})));
        check(json!({"exclusiveMinimum": 9_007_199_254_740_990u64}), Ok(json!({"minimum": WHOLE_MAX})));
        check(
            json!({"minimum": -1e30, "maximum": 1.7e308}),
            Ok(json!({"minimum": -WHOLE_MAX, "maximum": WHOLE_MAX})),
        );
        check(json!({"minimum": 1e19}), Err("minimum"));
        check(json!({"maximum": -1e30}), Err("maximum"));
        check(json!({"exclusiveMinimum": 1e19}), Err("exclusiveMinimum"));
        check(json!({"minimum": 1e-30}), Err("minimum"));
    }
}
