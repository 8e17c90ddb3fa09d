//! Which grant paid for what: a pure fold over an account's ledger, in the order in which it was posted.
//!
//! The account's balance is one number; this tells whose money it is.
//!
//! ```text
//! balance = what is left of the grants + what was given back - what is owed
//! ```
//!
//! - Usage is paid by what was given back, then by the grants: lower priority first, of equal ones the earliest to expire,
//!   of those the oldest. What nothing pays is owed (postpaid accounts; the ledger lets no other owe).
//! - Money that comes in for what is owed (a payment, a credit note, a discount) pays that first; the rest is given back.
//!   Refunds and write-offs are given back whole. A grant pays nothing that was owed before it.
//! - A grant that expires loses what its expiry posted, no more. Until then it pays, whatever the time.

use serde::{Deserialize, Serialize};

use crate::money::Money;

/// In which order grants pay: priority, expiry, and the ledger transaction that posted them.
type Rank = (i64, i64, i64);

/// A grant, as far as the order of paying goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub id: String,
    pub priority: i64,
    pub expires_at_s: Option<i64>,
    /// The ledger transaction that posted it.
    pub transaction_id: i64,
}

/// One ledger transaction, as this account sees it. Amounts are positive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Movement {
    Granted(Terms, Money),
    /// Usage, or any other charge.
    Charged(Money),
    /// A payment, a credit note, a discount.
    Received(Money),
    /// A refund, or a write-off: it pays nothing that is owed, only what is charged from now on.
    GivenBack(Money),
    Expired(String, Money),
}

/// What is left after a number of movements. Kept with each closed month, so that no fold starts at the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BurnDown {
    /// In the order in which they pay.
    grants: Vec<Left>,
    given_back: Money,
    owed: Money,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Left {
    id: String,
    rank: Rank,
    amount: Money,
}

/// Who paid for one movement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paid {
    pub by_grant: Vec<(String, Money)>,
    pub by_given_back: Money,
    /// Nobody yet.
    pub owed: Money,
}

/// The ledger says what cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BurnDownError {
    #[error("{expired} of the grant {id} expired, and {left} were left")]
    Expired { id: String, expired: Money, left: Money },
    #[error("more than one amount can hold")]
    TooLarge,
}

impl BurnDown {
    pub fn apply(&mut self, movement: &Movement) -> Result<Paid, BurnDownError> {
        match movement {
            Movement::Granted(terms, amount) => self.grant(terms, *amount),
            Movement::Charged(amount) => return self.charge(*amount),
            Movement::Received(amount) => self.receive(*amount)?,
            Movement::GivenBack(amount) => self.give_back(*amount)?,
            Movement::Expired(id, amount) => self.expire(id, *amount)?,
        }
        Ok(Paid::default())
    }

    fn grant(&mut self, terms: &Terms, amount: Money) {
        let rank = (terms.priority, terms.expires_at_s.unwrap_or(i64::MAX), terms.transaction_id);
        let index = self.grants.partition_point(|left| left.rank < rank);
        self.grants.insert(index, Left { id: terms.id.clone(), rank, amount });
    }

    fn charge(&mut self, amount: Money) -> Result<Paid, BurnDownError> {
        let mut paid = Paid { by_given_back: amount.min(self.given_back), ..Paid::default() };
        self.given_back = less(self.given_back, paid.by_given_back);
        let mut open = less(amount, paid.by_given_back);
        for grant in &mut self.grants {
            if open == Money::ZERO {
                break;
            }
            let part = open.min(grant.amount);
            grant.amount = less(grant.amount, part);
            open = less(open, part);
            paid.by_grant.push((grant.id.clone(), part));
        }
        self.grants.retain(|grant| grant.amount > Money::ZERO);
        self.owed = self.owed.checked_add(open).ok_or(BurnDownError::TooLarge)?;
        paid.owed = open;
        Ok(paid)
    }

    fn receive(&mut self, amount: Money) -> Result<(), BurnDownError> {
        let pays = amount.min(self.owed);
        self.owed = less(self.owed, pays);
        self.give_back(less(amount, pays))
    }

    fn give_back(&mut self, amount: Money) -> Result<(), BurnDownError> {
        self.given_back = self.given_back.checked_add(amount).ok_or(BurnDownError::TooLarge)?;
        Ok(())
    }

    fn expire(&mut self, id: &str, amount: Money) -> Result<(), BurnDownError> {
        let left = self.left_of(id);
        if amount > left {
            return Err(BurnDownError::Expired { id: id.to_owned(), expired: amount, left });
        }
        for grant in self.grants.iter_mut().filter(|grant| grant.id == id) {
            grant.amount = less(grant.amount, amount);
        }
        self.grants.retain(|grant| grant.amount > Money::ZERO);
        Ok(())
    }

    pub fn left_of(&self, id: &str) -> Money {
        self.grants.iter().find(|grant| grant.id == id).map_or(Money::ZERO, |grant| grant.amount)
    }
}

/// `from` - `amount`, where `amount` was made of `from`.
fn less(from: Money, amount: Money) -> Money {
    from.checked_sub(amount).expect("no more is taken than there is")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::money::Total;

    impl BurnDown {
        /// What is left of each grant that has something left.
        pub fn left(&self) -> BTreeMap<&str, Money> {
            self.grants.iter().map(|grant| (grant.id.as_str(), grant.amount)).collect()
        }

        pub fn given_back(&self) -> Money {
            self.given_back
        }

        pub fn owed(&self) -> Money {
            self.owed
        }

        /// What the account's balance must be.
        pub fn balance(&self) -> Total {
            let grants: Total = self.grants.iter().map(|grant| grant.amount).sum();
            grants + self.given_back.into() - self.owed.into()
        }
    }

    fn terms(id: &str, priority: i64, expires_at_s: Option<i64>, transaction_id: i64) -> Terms {
        Terms { id: id.into(), priority, expires_at_s, transaction_id }
    }

    fn pico(amount: i64) -> Money {
        Money::from_pico(amount)
    }

    #[test]
    fn priority_then_expiry_then_age_decide_who_pays() {
        let mut state = BurnDown::default();
        for (terms, amount) in [
            (terms("old", 0, None, 1), 5),
            (terms("last", 9, Some(1), 2), 5),
            (terms("late", 0, Some(200), 3), 5),
            (terms("soon", 0, Some(100), 4), 5),
            (terms("young", 0, None, 5), 5),
            (terms("first", -1, None, 6), 5),
        ] {
            state.apply(&Movement::Granted(terms, pico(amount))).unwrap();
        }
        let paid = state.apply(&Movement::Charged(pico(28))).unwrap();
        let order: Vec<_> = paid.by_grant.iter().map(|(id, amount)| (id.as_str(), amount.pico())).collect();
        let expect = [("first", 5), ("soon", 5), ("late", 5), ("old", 5), ("young", 5), ("last", 3)];
        assert_eq!((order.as_slice(), paid.owed), (expect.as_slice(), Money::ZERO));
    }

    #[test]
    fn what_is_owed_is_paid_by_payments_and_not_by_later_grants() {
        let mut state = BurnDown::default();
        assert_eq!(state.apply(&Movement::Charged(pico(10))).unwrap().owed, pico(10));
        state.apply(&Movement::Granted(terms("g", 0, None, 2), pico(4))).unwrap();
        assert_eq!((state.owed(), state.left_of("g")), (pico(10), pico(4)));
        state.apply(&Movement::Received(pico(12))).unwrap();
        assert_eq!(
            (state.owed(), state.given_back(), state.balance()),
            (pico(0), pico(2), Total::from_pico(6))
        );
        let paid = state.apply(&Movement::Charged(pico(3))).unwrap();
        assert_eq!((paid.by_given_back, paid.by_grant), (pico(2), vec![("g".to_owned(), pico(1))]));
    }

    #[test]
    fn more_than_is_left_cannot_expire() {
        let mut state = BurnDown::default();
        state.apply(&Movement::Granted(terms("g", 0, Some(1), 1), pico(4))).unwrap();
        state.apply(&Movement::Charged(pico(1))).unwrap();
        let wrong = state.clone().apply(&Movement::Expired("g".into(), pico(4)));
        assert_eq!(wrong, Err(BurnDownError::Expired { id: "g".into(), expired: pico(4), left: pico(3) }));
        state.apply(&Movement::Expired("g".into(), pico(3))).unwrap();
        assert_eq!(state.balance(), Total::ZERO);
    }

    /// Every coin by itself, and who may spend it.
    #[derive(Default)]
    struct Coins {
        purse: Vec<(Rank, String)>,
        given_back: usize,
        owed: usize,
    }

    impl Coins {
        fn apply(&mut self, movement: &Movement) {
            match movement {
                Movement::Granted(terms, amount) => {
                    let rank = (terms.priority, terms.expires_at_s.unwrap_or(i64::MAX), terms.transaction_id);
                    self.purse.extend((0..amount.pico()).map(|_| (rank, terms.id.clone())));
                }
                Movement::Charged(amount) => (0..amount.pico()).for_each(|_| self.spend_one()),
                Movement::Received(amount) => (0..amount.pico()).for_each(|_| match self.owed {
                    0 => self.given_back += 1,
                    _ => self.owed -= 1,
                }),
                Movement::GivenBack(amount) => (0..amount.pico()).for_each(|_| self.given_back += 1),
                Movement::Expired(id, amount) => (0..amount.pico()).for_each(|_| {
                    let coin = self.purse.iter().position(|(_, owner)| owner == id);
                    self.purse.remove(coin.expect("a coin expires that is there"));
                }),
            }
        }

        fn spend_one(&mut self) {
            if self.given_back > 0 {
                self.given_back -= 1;
            } else if let Some(coin) = self.purse.iter().min().cloned() {
                let index = self.purse.iter().position(|other| *other == coin).expect("it is there");
                self.purse.remove(index);
            } else {
                self.owed += 1;
            }
        }
    }

    fn step() -> impl Strategy<Value = (u8, i64, i64, Option<i64>, usize)> {
        (0_u8..5, 1_i64..12, -1_i64..3, prop::option::of(1_i64..4), 0_usize..4)
    }

    proptest! {
        #[test]
        fn agrees_with_coins_counted_one_by_one(steps in prop::collection::vec(step(), 0..60)) {
            let (mut state, mut coins) = (BurnDown::default(), Coins::default());
            for (number, (what, amount, priority, expires_at_s, pick)) in steps.into_iter().enumerate() {
                let ids: Vec<String> = state.left().keys().map(|id| (*id).to_owned()).collect();
                let movement = match what {
                    0 => {
                        let id = format!("g{number}");
                        Movement::Granted(terms(&id, priority, expires_at_s, number as i64), pico(amount))
                    }
                    1 => Movement::Charged(pico(amount)),
                    2 => Movement::Received(pico(amount)),
                    3 => Movement::GivenBack(pico(amount)),
                    _ if ids.is_empty() => continue,
                    _ => {
                        let id = ids[pick % ids.len()].clone();
                        Movement::Expired(id.clone(), pico(amount.min(state.left_of(&id).pico())))
                    }
                };
                let before = state.balance();
                let paid = state.apply(&movement).unwrap();
                coins.apply(&movement);
                if let Movement::Charged(amount) = movement {
                    let parts: Total = paid.by_grant.iter().map(|(_, part)| *part).sum();
                    prop_assert_eq!(parts + paid.by_given_back.into() + paid.owed.into(), amount.into());
                    prop_assert_eq!(before - amount.into(), state.balance());
                }
                let mut counted: BTreeMap<&str, i64> = BTreeMap::new();
                for (_, id) in &coins.purse {
                    *counted.entry(id).or_default() += 1;
                }
                let left: BTreeMap<&str, i64> = state.left().into_iter().map(|(id, m)| (id, m.pico())).collect();
                prop_assert_eq!(left, counted);
                prop_assert_eq!(state.given_back().pico(), coins.given_back as i64);
                prop_assert_eq!(state.owed().pico(), coins.owed as i64);
                let stored = serde_json::to_string(&state).unwrap();
                prop_assert_eq!(&serde_json::from_str::<BurnDown>(&stored).unwrap(), &state);
            }
        }
    }
}
