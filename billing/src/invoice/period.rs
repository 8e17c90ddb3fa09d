//! A billing period: one calendar month, UTC.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::{Date, Month, OffsetDateTime};

use crate::clock::moment_s;

/// Years that a period may lie in. All their moments fit every clock and column.
const YEARS: std::ops::RangeInclusive<i32> = 1970..=9998;

/// A month, written `2026-10`. Ordered by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period {
    year: i32,
    month: u8,
}

/// The text is not a month.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a month: write it like \"2026-10\"")]
pub struct PeriodError(String);

impl Period {
    /// The month that a moment lies in. Moments before 1970 or after 9998 count as the first or the last month.
    pub fn containing(at: OffsetDateTime) -> Period {
        let at = at.to_offset(time::UtcOffset::UTC);
        match at.year() {
            year if year < *YEARS.start() => Period { year: *YEARS.start(), month: 1 },
            year if year > *YEARS.end() => Period { year: *YEARS.end(), month: 12 },
            year => Period { year, month: at.month().into() },
        }
    }

    pub(crate) fn of_second(at_s: i64) -> Period {
        Period::containing(moment_s(at_s))
    }

    pub(crate) fn of_ms(at_ms: i64) -> Period {
        Period::of_second(at_ms.div_euclid(1000))
    }

    /// The first moment of the month.
    pub fn start(self) -> OffsetDateTime {
        let month = Month::try_from(self.month).expect("a period has a month from 1 to 12");
        let day = Date::from_calendar_date(self.year, month, 1).expect("every month has a first day");
        day.midnight().assume_utc()
    }

    /// The first moment after the month.
    pub fn end(self) -> OffsetDateTime {
        self.next().start()
    }

    pub(crate) fn start_s(self) -> i64 {
        self.start().unix_timestamp()
    }

    pub(crate) fn end_s(self) -> i64 {
        self.end().unix_timestamp()
    }

    /// None before the first.
    pub fn previous(self) -> Option<Period> {
        match self {
            Period { year, month: 1 } if year == *YEARS.start() => None,
            Period { year, month: 1 } => Some(Period { year: year - 1, month: 12 }),
            Period { year, month } => Some(Period { year, month: month - 1 }),
        }
    }

    #[must_use]
    pub fn next(self) -> Period {
        match self.month {
            12 => Period { year: self.year + 1, month: 1 },
            month => Period { month: month + 1, ..self },
        }
    }
}

impl FromStr for Period {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Period, PeriodError> {
        let wrong = || PeriodError(text.to_owned());
        let (year, month) = text.split_once('-').ok_or_else(wrong)?;
        let digits = |part: &str, length| part.len() == length && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(year, 4) || !digits(month, 2) {
            return Err(wrong());
        }
        let year: i32 = year.parse().map_err(|_| wrong())?;
        let month: u8 = month.parse().map_err(|_| wrong())?;
        if !YEARS.contains(&year) || !(1..=12).contains(&month) {
            return Err(wrong());
        }
        Ok(Period { year, month })
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Period, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_month_is_read_written_and_bounded() {
        let october: Period = "2026-10".parse().expect("a month");
        assert_eq!(october.to_string(), "2026-10");
        assert_eq!(
            (october.start(), october.end()),
            (datetime!(2026-10-01 0:00 UTC), datetime!(2026-11-01 0:00 UTC))
        );
        let december: Period = "2026-12".parse().expect("a month");
        assert_eq!(december.next().to_string(), "2027-01");
        assert!(october < december);
        assert_eq!(december.next().previous(), Some(december));
        assert_eq!("1970-01".parse::<Period>().expect("a month").previous(), None);
        for text in [
            "",
            "2026",
            "2026-13",
            "2026-00",
            "2026-1",
            "26-10",
            "2026-10-01",
            "+026-10",
            "1969-12",
            "9999-01",
        ] {
            assert_eq!(text.parse::<Period>(), Err(PeriodError(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_moment_belongs_to_the_month_of_its_utc_time() {
        let check = |at, expect: &str| assert_eq!(Period::containing(at).to_string(), expect);
        check(datetime!(2026-10-31 23:59:59.999 UTC), "2026-10");
        check(datetime!(2026-11-01 0:00 UTC), "2026-11");
        check(datetime!(2026-11-01 1:30 +02:00), "2026-10");
    }
}
