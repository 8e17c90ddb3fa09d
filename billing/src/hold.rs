//! A hold: the money that one running request may spend.
//!
//! It is made by `Billing::admit`, grows by [`Hold::extend`], and ends exactly once: settled, voided, or, when dropped,
//! expired. It cannot be cloned and its ends consume it, so settling twice or voiding after settling does not compile.

use std::sync::{Arc, atomic::Ordering};

use tokio::sync::oneshot;

use crate::{
    Shared,
    error::SettleError,
    event::{AdmitRequest, Media, Outcome, Quantities, UsageEvent},
    fund::Fund,
    lease::{Ask, Place, Reserved, Slice},
    money::{Money, Total},
    outbox::{Append, Command},
    price::{PriceBook, Step, cost},
};

/// Why a request ended without a bill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VoidCause {
    /// No node took the request, or it failed before a token came.
    NodeFailed,
    /// The client went away before anything was computed.
    ClientGone,
    /// A later check refused it.
    Refused,
    /// The server is going down.
    Draining,
}

#[must_use = "a hold ends by settle or void; dropped, it counts as expired"]
#[derive(Debug)]
pub struct Hold {
    shared: Arc<Shared>,
    slices: Vec<Arc<Slice>>,
    book: Arc<PriceBook>,
    request: Box<AdmitRequest>,
    granted: u64,
    exhausted: bool,
    /// None once the hold has ended.
    money: Option<(Vec<Reserved>, Place)>,
}

/// The prices that a request was admitted at: what it will be billed by, whatever is in force when it ends.
#[derive(Clone, Debug)]
pub struct PinnedPrices {
    book: Arc<PriceBook>,
    request: Box<AdmitRequest>,
}

impl PinnedPrices {
    /// What the bill would come to if the request ended with these counts, under a hold that covers so many output
    /// tokens. None: more than one amount can hold, which no hold covers.
    pub fn cost_of(&self, counted: Quantities, covered_output_tokens: u64) -> Option<Money> {
        let request = &self.request;
        let quantities = billable(request, covered_output_tokens, &counted);
        cost(&self.book.price(&request.account, &request.model, request.service_tier, &quantities).ok()?)
    }
}

/// What of the counts is billed: as much as the hold covers.
fn billable(request: &AdmitRequest, granted: u64, counted: &Quantities) -> Quantities {
    let cached_input_tokens = counted.cached_input_tokens.min(request.input_tokens);
    let output_tokens = counted.output_tokens.min(granted);
    let held = &request.media_max;
    Quantities {
        cached_input_tokens,
        input_tokens: counted.input_tokens.min(request.input_tokens - cached_input_tokens),
        output_tokens,
        reasoning_tokens: counted.reasoning_tokens.min(granted - output_tokens),
        characters: counted.characters.min(held.characters),
        seconds: counted.seconds.min(held.seconds),
        images: counted.images.min(held.images),
    }
}

impl Hold {
    pub(crate) fn new(
        shared: Arc<Shared>,
        slices: Vec<Arc<Slice>>,
        book: Arc<PriceBook>,
        request: AdmitRequest,
        granted: Granted,
        place: Place,
    ) -> Hold {
        let Granted { units, reserved, exhausted } = granted;
        let money = Some((reserved, place));
        Hold { shared, slices, book, request: Box::new(request), granted: units, exhausted, money }
    }

    /// How many output tokens are covered now, in total.
    pub fn granted_output_tokens(&self) -> u64 {
        self.granted
    }

    /// The prices of the bill to come, for saying what it has come to so far.
    pub fn prices(&self) -> PinnedPrices {
        PinnedPrices { book: self.book.clone(), request: self.request.clone() }
    }

    /// No more will be covered: the account has no more, or the request wants no more.
    pub fn is_final(&self) -> bool {
        self.exhausted || self.granted >= self.request.output_tokens_max
    }

    /// Tries to cover up to `output_tokens` in total. Never lowers; read `granted_output_tokens` and `is_final` after.
    ///
    /// When the slice cannot cover a single token more and the ledger does not answer, the hold becomes final too: a
    /// stream ends at a token rather than hang.
    ///
    /// # Cancel safety
    /// Cancel safe: either the hold has grown or the money is back in the slice.
    pub async fn extend(&mut self, output_tokens: u64) {
        let target = output_tokens.min(self.request.output_tokens_max);
        if self.is_final() || target <= self.granted {
            return;
        }
        let (step, units_before, units_max) = (self.token_step(), self.granted, target - self.granted);
        let ask = Ask { fixed: Total::ZERO, step, units_before, units_min: 0, units_max };
        match self.shared.cover(&self.slices, ask).await {
            Ok(Covered::Granted(Granted { units, reserved, exhausted })) => {
                self.granted += units;
                self.exhausted = exhausted;
                let (money, _) = self.money.as_mut().expect("a hold that is not consumed has its money");
                money.iter_mut().zip(reserved).for_each(|(money, more)| money.absorb(more));
            }
            Ok(Covered::Short(_)) => self.exhausted = true,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, request_id = %self.request.request_id, "a stream ends early: its hold cannot grow");
                self.exhausted = true;
            }
        }
    }

    /// Bills what was counted. When this returns Ok, the bill survives a power cut.
    ///
    /// # Cancel safety
    /// Before the outbox takes the bill, a cancelled settle is a dropped hold (expired); after, the bill is made anyway.
    /// Run it in a task of its own.
    pub async fn settle(mut self, outcome: Outcome) -> Result<UsageEvent, SettleError> {
        let shared = self.shared.clone();
        let permit = shared.outbox.permit().await?;
        let mut event = self.bill(&outcome);
        let (reserved, place) = self.money.take().expect("a hold that is not consumed has its money");
        assert!(
            reserved.iter().all(|reserved| reserved.covers(event.cost)),
            "a bill is never above its hold"
        );
        let funds = reserved.iter().map(Reserved::fund);
        event.budgets = funds.filter(|fund| matches!(fund, Fund::Budget(_))).map(Fund::to_string).collect();
        let (reply, durable) = oneshot::channel();
        permit.send(Command::Append(Box::new(Append { event, reserved, place, reply })));
        shared.counters.open.fetch_sub(1, Ordering::Relaxed);
        durable.await.map_err(|_| SettleError::Closed)?
    }

    /// Ends the hold without a bill: nothing that was computed is charged.
    pub async fn void(mut self, cause: VoidCause) {
        tracing::debug!(request_id = %self.request.request_id, ?cause, "hold voided");
        self.money = None;
        self.shared.counters.voided.fetch_add(1, Ordering::Relaxed);
        self.shared.counters.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// What generated tokens cost at most.
    fn token_step(&self) -> Step {
        let AdmitRequest { account, model, service_tier, .. } = &*self.request;
        let prices = self.book.prices(account, model, *service_tier);
        let bound = prices.and_then(|prices| prices.bound(0, &Media::default(), true).ok());
        bound.expect("the pinned book has the prices that it was pinned for").generated
    }

    /// The bill of an outcome: what was counted, as far as the hold covers it.
    fn bill(&self, outcome: &Outcome) -> UsageEvent {
        let request = &self.request;
        let (media, held) = (&outcome.media, &request.media_max);
        let counted = Quantities {
            input_tokens: outcome.input_tokens,
            cached_input_tokens: outcome.cached_input_tokens,
            output_tokens: outcome.output_tokens,
            reasoning_tokens: outcome.reasoning_tokens,
            characters: media.characters,
            seconds: media.seconds,
            images: media.images,
        };
        let quantities = billable(request, self.granted, &counted);
        let overrun_tokens = tokens(outcome) - quantities.tokens();
        if overrun_tokens > 0 {
            tracing::error!(
                request_id = %request.request_id, node = outcome.node, overrun_tokens,
                "a node counted more tokens than were granted; they are not billed"
            );
        }
        if *media != quantities.media() {
            tracing::error!(
                request_id = %request.request_id, node = outcome.node, ?media, ?held,
                "more was counted than was held; it is not billed"
            );
        }
        let lines = self
            .book
            .price(&request.account, &request.model, request.service_tier, &quantities)
            .expect("quantities under a hold have a price");
        UsageEvent {
            request_id: request.request_id,
            account: request.account.clone(),
            org: request.org.clone(),
            project: request.project.clone(),
            api_key: request.api_key.clone(),
            // PostgreSQL stores every character but this one.
            user: request.user.replace('\0', ""),
            model: request.model.clone(),
            service_tier: request.service_tier,
            node: outcome.node.clone(),
            quantities,
            overrun_tokens,
            finish_reason: outcome.finish_reason,
            time_to_first_token_ms: outcome.time_to_first_token_ms,
            duration_ms: outcome.duration_ms,
            admitted_at_ms: (request.admitted_at.unix_timestamp_nanos() / 1_000_000) as i64,
            price_book: self.book.hash().clone(),
            cost: cost(&lines).expect("lines under a hold sum to at most the hold"),
            budgets: Vec::new(),
        }
    }
}

/// Every token that was counted.
fn tokens(outcome: &Outcome) -> u64 {
    outcome
        .input_tokens
        .saturating_add(outcome.cached_input_tokens)
        .saturating_add(outcome.output_tokens)
        .saturating_add(outcome.reasoning_tokens)
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(money) = self.money.take() {
            drop(money);
            self.shared.counters.expired.fetch_add(1, Ordering::Relaxed);
            self.shared.counters.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What became of an [`Ask`].
#[derive(Debug)]
pub(crate) enum Covered {
    Granted(Granted),
    /// This fund cannot pay the least of it.
    Short(Arc<Slice>),
}

#[derive(Debug)]
pub(crate) struct Granted {
    pub units: u64,
    /// Of each fund, in the order of the slices.
    pub reserved: Vec<Reserved>,
    /// One of the funds has no more than this.
    pub exhausted: bool,
}
