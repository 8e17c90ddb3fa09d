//! The wall clock, passed in: leases expire by it. And stored numbers as moments.

use std::{fmt, sync::Arc, time::Duration};

use time::OffsetDateTime;

/// A source of the present moment.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> OffsetDateTime + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Clock {
        Clock::new(OffsetDateTime::now_utc)
    }

    pub fn new(now: impl Fn() -> OffsetDateTime + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    pub(crate) fn now(&self) -> OffsetDateTime {
        (self.0)()
    }

    pub(crate) fn now_s(&self) -> i64 {
        self.now().unix_timestamp()
    }

    pub(crate) fn expiry_s(&self, ttl: Duration) -> i64 {
        self.now_s().saturating_add(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX))
    }
}

/// A moment in seconds since 1970; 1970 itself where the calendar has none.
pub(crate) fn moment_s(at_s: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(at_s).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// A moment in milliseconds since 1970; 1970 itself where the calendar has none.
pub(crate) fn moment_ms(at_ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}
