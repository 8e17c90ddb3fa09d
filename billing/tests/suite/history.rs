//! Random histories against a reference that keeps one number: what the account could still spend.
//!
//! Whatever slices, batches and crashes lie between, the grants must be those of the reference to the token, and the
//! books must agree at every rest.

use proptest::{collection::vec, prelude::*};
use sluice_billing::{AdmitError, BillingLimits, Hold, VoidCause};

use crate::support::*;

#[derive(Clone, Debug)]
enum Op {
    Admit {
        input: u64,
        output_max: u64,
    },
    Extend {
        hold: usize,
        by: u64,
    },
    Settle {
        hold: usize,
        cached: u64,
        output: u64,
    },
    Void {
        hold: usize,
    },
    Drop {
        hold: usize,
    },
    Credit {
        amount: i64,
    },
    Flush,
    /// A power cut: open holds are gone.
    Crash,
    /// A power cut after the ledger took a batch and before the outbox forgot it.
    CrashBeforePrune,
    /// An orderly end and a new start.
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..40u64, 0..30u64).prop_map(|(input, output_max)| Op::Admit { input, output_max }),
        6 => (any::<usize>(), 0..20u64).prop_map(|(hold, by)| Op::Extend { hold, by }),
        4 => (any::<usize>(), 0..40u64, 0..30u64).prop_map(|(hold, cached, output)| Op::Settle { hold, cached, output }),
        1 => any::<usize>().prop_map(|hold| Op::Void { hold }),
        1 => any::<usize>().prop_map(|hold| Op::Drop { hold }),
        2 => (1..400i64).prop_map(|amount| Op::Credit { amount }),
        2 => Just(Op::Flush),
        1 => Just(Op::Crash),
        1 => Just(Op::CrashBeforePrune),
        1 => Just(Op::Restart),
    ]
}

/// An open hold and what the reference says of it.
struct Open {
    hold: Hold,
    input: u64,
    output_max: u64,
    granted: u64,
    amount: i64,
    exhausted: bool,
}

struct History {
    world: World,
    open: Vec<Open>,
    /// Credit less settled cost.
    balance: i64,
    bills: u64,
}

impl History {
    fn available(&self) -> i64 {
        self.balance - self.open.iter().map(|open| open.amount).sum::<i64>()
    }

    fn pick(&self, index: usize) -> Option<usize> {
        (!self.open.is_empty()).then(|| index % self.open.len())
    }

    async fn apply(mut self, op: &Op) -> History {
        match *op {
            Op::Admit { input, output_max } => self.admit(input, output_max).await,
            Op::Extend { hold, by } => {
                if let Some(index) = self.pick(hold) {
                    self.extend(index, by).await;
                }
            }
            Op::Settle { hold, cached, output } => {
                if let Some(index) = self.pick(hold) {
                    self.settle(index, cached, output).await;
                }
            }
            Op::Void { hold } => {
                if let Some(index) = self.pick(hold) {
                    self.open.swap_remove(index).hold.void(VoidCause::ClientGone).await;
                }
            }
            Op::Drop { hold } => {
                if let Some(index) = self.pick(hold) {
                    drop(self.open.swap_remove(index));
                }
            }
            Op::Credit { amount } => {
                self.world.credit(amount).await;
                self.balance += amount;
            }
            Op::Flush => assert_eq!(self.world.posted().await, self.balance),
            Op::Crash => {
                let world = self.world.crash().await;
                return History { world, open: Vec::new(), ..self };
            }
            Op::CrashBeforePrune => {
                let before = self.world.image();
                self.world.posted().await;
                let image = self.world.image();
                copy(before.path(), image.path(), "outbox.db");
                let world = self.world.reopen(image).await;
                return History { world, open: Vec::new(), ..self };
            }
            Op::Restart => {
                self.open.clear();
                self.world.billing.close().await.expect("billing closes");
                let closed = self.world.billing.balance(&account()).await.expect("the account exists");
                assert_eq!((closed.posted, closed.available), (pico(self.balance), pico(self.balance)));
                let world = self.world.restart().await;
                return History { world, open: Vec::new(), ..self };
            }
        }
        self
    }

    async fn admit(&mut self, input: u64, output_max: u64) {
        let available = self.available();
        let rest = available - input as i64 * INPUT;
        let admitted = self.world.billing.admit(request(input, output_max)).await;
        if rest < OUTPUT * output_max.min(1) as i64 {
            match admitted {
                Err(AdmitError::InsufficientCredit { available: told, .. }) => {
                    assert_eq!(told, pico(available))
                }
                other => panic!("{other:?} with {available} available"),
            }
            return;
        }
        let hold = admitted.expect("the account affords it");
        let wanted = output_max.min(self.world.limits.hold_output_tokens);
        let granted = wanted.min((rest / OUTPUT) as u64);
        let amount = input as i64 * INPUT + granted as i64 * OUTPUT;
        self.open.push(Open { hold, input, output_max, granted, amount, exhausted: granted < wanted });
        self.open.last().expect("just pushed").check();
    }

    async fn extend(&mut self, index: usize, by: u64) {
        let available = self.available();
        let open = &mut self.open[index];
        let target = (open.granted + by).min(open.output_max);
        open.hold.extend(open.granted + by).await;
        if !open.exhausted {
            let more = (target - open.granted).min((available / OUTPUT) as u64);
            open.exhausted = open.granted + more < target;
            open.granted += more;
            open.amount += more as i64 * OUTPUT;
        }
        open.check();
    }

    async fn settle(&mut self, index: usize, cached: u64, output: u64) {
        let Open { hold, input, granted, amount, .. } = self.open.swap_remove(index);
        let (cached, output) = (cached.min(input), output.min(granted));
        let event = hold.settle(outcome(input - cached, cached, output)).await.expect("the outbox takes it");
        let cost = (input - cached) as i64 * INPUT + cached as i64 * CACHED + output as i64 * OUTPUT;
        assert_eq!((event.cost, event.overrun_tokens), (pico(cost), 0));
        assert!(cost <= amount);
        self.balance -= cost;
        self.bills += 1;
    }

    async fn check(&self) {
        self.world.assert_clean().await;
        assert!(self.available() >= 0);
        assert_eq!(self.world.billing.stats().holds_open, self.open.len() as u64);
    }
}

impl Open {
    fn check(&self) {
        assert_eq!(self.hold.granted_output_tokens(), self.granted);
        assert_eq!(self.hold.is_final(), self.exhausted || self.granted >= self.output_max);
    }
}

/// A few seconds' worth, unless PROPTEST_CASES asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(24)
}

async fn agrees_with_one_number(ops: Vec<Op>, credit: i64, slice: i64) {
    let limits = BillingLimits { lease_slice: pico(slice), ship_events_max: 3, ..limits() };
    let world = World::with(credit, limits).await;
    let mut history = History { world, open: Vec::new(), balance: credit, bills: 0 };
    for op in &ops {
        history = history.apply(op).await;
        history.check().await;
    }
    assert_eq!(history.world.posted().await, history.balance);
    let rows = history.world.billing.usage(&Default::default()).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.requests).sum::<u64>(), history.bills);
    history.open.clear();
    history.check().await;
}

fn run(kind: Kind, history: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(KIND.scope(kind, history));
}

fn slice() -> impl Strategy<Value = i64> {
    prop_oneof![Just(0), 1..50i64, Just(100_000)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn billing_agrees_with_one_number(ops in vec(op(), 1..50), credit in 0..1_000i64, slice in slice()) {
        run(Kind::Sqlite, agrees_with_one_number(ops, credit, slice));
    }

    #[test]
    fn billing_agrees_with_one_number_on_postgres(ops in vec(op(), 1..50), credit in 0..1_000i64, slice in slice()) {
        run(Kind::Postgres, agrees_with_one_number(ops, credit, slice));
    }
}
