//! Has every gateway shipped a month? Owns the table `outbox_horizons`.
//!
//! A gateway reports a moment: everything that its outbox admitted before it is in the ledger. It may do so when no open
//! hold was admitted earlier, and the outbox has been emptied after that was so. A gateway that closed cleanly reports the
//! end of time; when it opens again, it takes that back.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use crate::{args, database::Conn, error::BillingError, invoice::Period};

/// What a gateway reports that holds nothing and admits nothing.
pub(crate) const FOREVER_S: i64 = i64::MAX;

/// Open holds by the month that they were admitted in.
#[derive(Debug, Default)]
pub(crate) struct OpenMonths(Mutex<BTreeMap<Period, u64>>);

impl OpenMonths {
    pub fn enter(&self, period: Period) {
        *self.lock().entry(period).or_default() += 1;
    }

    /// The hold has ended, and its bill, if there is one, is durable.
    pub fn leave(&self, period: Period) {
        let mut months = self.lock();
        if let Some(open) = months.get_mut(&period) {
            *open -= 1;
            if *open == 0 {
                months.remove(&period);
            }
        }
    }

    /// Whether a hold of an earlier month is open.
    pub fn any_before(&self, period: Period) -> bool {
        self.lock().first_key_value().is_some_and(|(first, _)| *first < period)
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Period, u64>> {
        self.0.lock().expect("no code panics while it holds the months")
    }
}

/// Everything that this outbox admitted before `through_s` is in the ledger.
pub(crate) async fn report(
    conn: &mut Conn,
    epoch: &str,
    through_s: i64,
    now_s: i64,
) -> Result<(), BillingError> {
    conn.execute(
        "INSERT INTO outbox_horizons (epoch, through_s, reported_at_s) VALUES ($1, $2, $3) \
         ON CONFLICT (epoch) DO UPDATE SET through_s = excluded.through_s, reported_at_s = excluded.reported_at_s",
        args![epoch, through_s, now_s],
    )
    .await?;
    Ok(())
}

/// (epoch, moment) of every report.
pub(crate) async fn reported(conn: &mut Conn) -> Result<BTreeMap<String, i64>, BillingError> {
    let rows: Vec<(String, i64)> =
        conn.fetch_all("SELECT epoch, through_s FROM outbox_horizons", args![]).await?;
    Ok(rows.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_hold_keeps_its_month_open() {
        let (october, november): (Period, Period) =
            ("2026-10".parse().expect("a month"), "2026-11".parse().expect("a month"));
        let months = OpenMonths::default();
        months.enter(october);
        months.enter(october);
        months.enter(november);
        assert!(months.any_before(november) && !months.any_before(october));
        months.leave(october);
        assert!(months.any_before(november));
        months.leave(october);
        assert!(!months.any_before(november) && months.any_before(november.next()));
    }
}
