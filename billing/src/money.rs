//! Amounts of money: integers of 10^-12 US dollars, never floats.
//!
//! One dollar per million tokens is 1,000,000 pico-USD a token, so a cached, discounted, batched price is still exact.
//! A single amount is [`Money`] (i64, about nine million dollars); sums over many are [`Total`] (i128). Arithmetic is
//! checked: what does not fit is `None`, never wrapped. JSON carries decimal strings of dollars.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// 10^-12 dollars in a dollar.
pub const PICO_PER_USD: i64 = 1_000_000_000_000;
pub(crate) const DECIMALS: usize = 12;

/// An amount in pico-USD. May be negative: ledger entries are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(i64);

/// A sum of amounts in pico-USD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Total(i128);

/// Why a decimal string is not an amount of money.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    #[error("\"{0}\" is not an amount of dollars: write digits with at most one point, like \"10.00\"")]
    Malformed(String),
    #[error("\"{text}\" is finer than can be stored: at most {decimals} digits after the point")]
    TooFine { text: String, decimals: usize },
    #[error("\"{0}\" is more than can be stored: one amount is at most {max}", max = Money::MAX)]
    TooLarge(String),
}

impl Money {
    pub const ZERO: Money = Money(0);
    pub const MAX: Money = Money(i64::MAX);

    pub const fn from_pico(pico_usd: i64) -> Money {
        Money(pico_usd)
    }

    pub const fn pico(self) -> i64 {
        self.0
    }

    /// Parses dollars, like `"10.00"`, exactly.
    pub fn from_usd_str(text: &str) -> Result<Money, MoneyError> {
        let pico = parse_decimal(text, DECIMALS)?;
        i64::try_from(pico).map(Money).map_err(|_| MoneyError::TooLarge(text.to_owned()))
    }

    #[must_use]
    pub fn checked_add(self, other: Money) -> Option<Money> {
        self.0.checked_add(other.0).map(Money)
    }

    #[must_use]
    pub fn checked_sub(self, other: Money) -> Option<Money> {
        self.0.checked_sub(other.0).map(Money)
    }

    #[must_use]
    pub fn checked_neg(self) -> Option<Money> {
        self.0.checked_neg().map(Money)
    }

    /// The price of `quantity` units at this unit price.
    #[must_use]
    pub fn checked_mul(self, quantity: u64) -> Option<Money> {
        i64::try_from(quantity).ok().and_then(|quantity| self.0.checked_mul(quantity)).map(Money)
    }

    /// The price of `quantity` units, in a width that no quantity overflows.
    pub fn total_of(self, quantity: u64) -> Total {
        Total(i128::from(self.0) * i128::from(quantity))
    }
}

impl Total {
    pub const ZERO: Total = Total(0);

    pub const fn from_pico(pico_usd: i128) -> Total {
        Total(pico_usd)
    }

    pub const fn pico(self) -> i128 {
        self.0
    }

    /// Dollars as a decimal string without the currency, as JSON carries them.
    pub fn to_usd_string(self) -> String {
        Decimal(self.0).to_string()
    }

    /// The same amount as a single [`Money`], if it fits one.
    pub fn to_money(self) -> Option<Money> {
        i64::try_from(self.0).ok().map(Money)
    }
}

impl From<Money> for Total {
    fn from(amount: Money) -> Total {
        Total(i128::from(amount.0))
    }
}

// An i128 holds 2^64 amounts of an i64 each, so these sums cannot overflow before memory does.
impl std::ops::Add for Total {
    type Output = Total;
    fn add(self, other: Total) -> Total {
        Total(self.0 + other.0)
    }
}

impl std::ops::Sub for Total {
    type Output = Total;
    fn sub(self, other: Total) -> Total {
        Total(self.0 - other.0)
    }
}

impl std::ops::AddAssign for Total {
    fn add_assign(&mut self, other: Total) {
        self.0 += other.0;
    }
}

impl std::iter::Sum<Money> for Total {
    fn sum<I: Iterator<Item = Money>>(amounts: I) -> Total {
        amounts.fold(Total::ZERO, |total, amount| total + amount.into())
    }
}

/// The integer `text` * 10^`decimals`, exactly or not at all.
pub(crate) fn parse_decimal(text: &str, decimals: usize) -> Result<i128, MoneyError> {
    let malformed = || MoneyError::Malformed(text.to_owned());
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let all_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) {
        return Err(malformed());
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > decimals {
        return Err(MoneyError::TooFine { text: text.to_owned(), decimals });
    }
    let too_large = |_| MoneyError::TooLarge(text.to_owned());
    let scaled: i128 = format!("{whole}{fraction:0<decimals$}").parse().map_err(too_large)?;
    Ok(if negative { -scaled } else { scaled })
}

/// Writes pico-USD as dollars: all digits that count, at least two after the point.
fn write_decimal(pico: i128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let unit = PICO_PER_USD.unsigned_abs() as u128;
    let (whole, fraction) = (pico.unsigned_abs() / unit, pico.unsigned_abs() % unit);
    let fraction = format!("{fraction:0DECIMALS$}");
    let significant = fraction.trim_end_matches('0').len().max(2);
    let sign = if pico < 0 { "-" } else { "" };
    write!(f, "{sign}{whole}.{}", &fraction[..significant])
}

/// Appends an amount in dollars, as [`Money::to_usd_string`] writes it.
pub(crate) fn push_decimal(out: &mut Vec<u8>, pico_usd: i128) {
    use std::io::Write;
    write!(out, "{}", Decimal(pico_usd)).expect("a vector takes every byte");
}

struct Decimal(i128);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_decimal(self.0, f)
    }
}

impl Money {
    /// Dollars as a decimal string without the currency, as JSON carries them.
    pub fn to_usd_string(self) -> String {
        Decimal(self.0.into()).to_string()
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} USD", Decimal(self.0.into()))
    }
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} USD", Decimal(self.0))
    }
}

impl FromStr for Money {
    type Err = MoneyError;
    fn from_str(text: &str) -> Result<Money, MoneyError> {
        Money::from_usd_str(text)
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Decimal(self.0.into()))
    }
}

impl Serialize for Total {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Decimal(self.0))
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Money, D::Error> {
        let text = String::deserialize(deserializer)?;
        Money::from_usd_str(&text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_and_prints_dollars() {
        let check = |text: &str, pico: i64, printed: &str| {
            let money = Money::from_usd_str(text).expect(text);
            assert_eq!((money.pico(), money.to_string().as_str()), (pico, printed), "{text}");
        };
        check("10.00", 10 * PICO_PER_USD, "10.00 USD");
        check("0.000123", 123_000_000, "0.000123 USD");
        check("0", 0, "0.00 USD");
        check("-0.5", -PICO_PER_USD / 2, "-0.50 USD");
        check("0.000000000001", 1, "0.000000000001 USD");
        check("1.5000000000000000", 1_500_000_000_000, "1.50 USD");
        check("9223372.036854775807", i64::MAX, "9223372.036854775807 USD");
        check("-9223372.036854775808", i64::MIN, "-9223372.036854775808 USD");
    }

    #[test]
    fn refuses_what_is_not_an_exact_amount() {
        for text in ["", ".", "1.", ".5", "+1", "1e3", "1,000", " 1", "1.2.3", "--1", "$1", "\u{661}", "NaN"]
        {
            assert_eq!(Money::from_usd_str(text), Err(MoneyError::Malformed(text.into())), "{text:?}");
        }
        assert!(matches!(
            Money::from_usd_str("0.0000000000001"),
            Err(MoneyError::TooFine { decimals: 12, .. })
        ));
        for text in ["9223372.036854775808", "99999999999999999999999999999999999999999999"] {
            assert_eq!(Money::from_usd_str(text), Err(MoneyError::TooLarge(text.into())));
        }
    }

    #[test]
    fn arithmetic_refuses_to_wrap() {
        assert_eq!(Money::MAX.checked_add(Money(1)), None);
        assert_eq!(Money(i64::MIN).checked_neg(), None);
        assert_eq!(Money(i64::MIN).checked_sub(Money(1)), None);
        assert_eq!(Money(2).checked_mul(u64::MAX), None);
        assert_eq!(Money(i64::MAX / 2 + 1).checked_mul(2), None);
        assert_eq!(Money::MAX.total_of(u64::MAX).pico(), i128::from(i64::MAX) * i128::from(u64::MAX));
    }

    proptest! {
        #[test]
        fn json_round_trips(pico: i64) {
            let json = serde_json::to_string(&Money(pico)).unwrap();
            prop_assert_eq!(serde_json::from_str::<Money>(&json).unwrap(), Money(pico));
        }
    }
}
