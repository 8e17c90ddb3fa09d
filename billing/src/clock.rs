//! The wall clock, passed in: leases expire by it.

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

    pub(crate) fn now_s(&self) -> i64 {
        (self.0)().unix_timestamp()
    }

    pub(crate) fn expiry_s(&self, ttl: Duration) -> i64 {
        self.now_s().saturating_add(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}
