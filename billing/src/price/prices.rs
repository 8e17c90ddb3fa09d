//! What one account pays for one model: its contract's prices where it has one, else the list's.

use serde::Serialize;

use super::{Meter, Meters, Price, Step};
use crate::{
    event::{Media, Quantities, ServiceTier},
    money::{Money, Total},
};

/// The prices of a model in a service tier, as one account has them.
#[derive(Clone, Copy, Debug)]
pub struct Prices<'a> {
    model: &'a str,
    service_tier: ServiceTier,
    list: &'a Meters,
    contract: Option<&'a Meters>,
}

/// One priced quantity. `amount` = `unit_price` for each `unit_size` units that were begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub sku: String,
    pub meter: Meter,
    pub quantity: u64,
    /// What the account pays: by its contract, or by the list.
    pub unit_price: Money,
    /// 1, or the size of a package.
    pub unit_size: u64,
    /// What everybody pays; where the list has no price, what the account pays.
    pub list_unit_price: Money,
    pub list_unit_size: u64,
    pub amount: Money,
}

/// Why a quantity cannot be priced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    #[error("the price book has no {service_tier} prices for the model {model}")]
    NoModel { model: String, service_tier: ServiceTier },
    #[error("the price book has no {service_tier} price for {meter} of the model {model}")]
    NoMeter { model: String, service_tier: ServiceTier, meter: Meter },
    #[error("{quantity} x {unit_price} is more than one amount can hold")]
    Overflow { quantity: u64, unit_price: Money },
}

/// What a request costs at most: a fixed part, and a step for the tokens that it generates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub fixed: Total,
    pub generated: Step,
}

/// The sum of the lines.
pub fn cost(lines: &[Line]) -> Option<Money> {
    lines.iter().map(|line| line.amount).sum::<Total>().to_money()
}

impl Line {
    /// How many times the unit price is due: the quantity, or the packages that were begun.
    pub fn priced_quantity(&self) -> u64 {
        Step { size: self.unit_size, price: self.unit_price }.count(self.quantity)
    }

    /// What the line would cost by the list.
    pub fn list_amount(&self) -> Total {
        Step { size: self.list_unit_size, price: self.list_unit_price }.total(self.quantity)
    }
}

impl<'a> Prices<'a> {
    /// None if there is neither a list nor a contract.
    pub(super) fn of(
        model: &'a str,
        service_tier: ServiceTier,
        list: &'a Meters,
        contract: Option<&'a Meters>,
    ) -> Option<Prices<'a>> {
        (!list.is_empty() || contract.is_some()).then_some(Prices { model, service_tier, list, contract })
    }

    /// What the account pays.
    pub fn get(&self, meter: Meter) -> Option<&'a Price> {
        self.contract.and_then(|contract| contract.get(&meter)).or_else(|| self.list.get(&meter))
    }

    /// What everybody pays.
    pub fn list(&self, meter: Meter) -> Option<&'a Price> {
        self.list.get(&meter)
    }

    pub(super) fn lines(&self, quantities: &Quantities) -> Result<Vec<Line>, PriceError> {
        let counted = self.counted(quantities)?.into_iter().filter(|(_, quantity)| *quantity > 0);
        counted.map(|(meter, quantity)| self.line(meter, quantity)).collect()
    }

    /// What a request may cost at most: `prompt_tokens` of either input class, all of `media`, and the request itself;
    /// then a step for each token that is generated, reasoning or not.
    pub(crate) fn bound(
        &self,
        prompt_tokens: u64,
        media: &Media,
        generates: bool,
    ) -> Result<Bound, PriceError> {
        let mut fixed = Total::ZERO;
        if prompt_tokens > 0 {
            let input = self.need(Meter::Input)?.rate.step();
            let cached = self.get(Meter::CachedInput).map_or(input, |price| price.rate.step());
            fixed += prompt_max(input, cached, prompt_tokens);
        }
        for (meter, quantity) in self.others(media) {
            if quantity > 0 {
                fixed += self.need(meter)?.rate.step().total(quantity);
            }
        }
        let mut generated = Step::FREE;
        if generates {
            generated = self.need(Meter::Output)?.rate.step();
            let reasoning = self.get(Meter::Reasoning).map(|price| price.rate.step());
            match reasoning.filter(|reasoning| *reasoning != generated || generated.size > 1) {
                None => {}
                // Two packages may be begun where one would do.
                Some(reasoning) if reasoning == generated => fixed += generated.price.into(),
                Some(reasoning) => {
                    let (begun, step) = generated.either(reasoning);
                    fixed += begun;
                    generated = step;
                }
            }
        }
        Ok(Bound { fixed, generated })
    }

    /// Each meter with its quantity. A class without a price of its own counts as the one that it is a part of.
    fn counted(&self, quantities: &Quantities) -> Result<Vec<(Meter, u64)>, PriceError> {
        let &Quantities { input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, .. } =
            quantities;
        let mut counted = Vec::new();
        for (whole, tokens, part, part_tokens) in [
            (Meter::Input, input_tokens, Meter::CachedInput, cached_input_tokens),
            (Meter::Output, output_tokens, Meter::Reasoning, reasoning_tokens),
        ] {
            if self.get(part).is_some() {
                counted.extend([(whole, tokens), (part, part_tokens)]);
            } else {
                let overflow = || PriceError::Overflow { quantity: u64::MAX, unit_price: Money::ZERO };
                counted.push((whole, tokens.checked_add(part_tokens).ok_or_else(overflow)?));
            }
        }
        counted.extend(self.others(&quantities.media()));
        Ok(counted)
    }

    /// The meters that are not tokens, with what they count.
    fn others(&self, media: &Media) -> [(Meter, u64); 4] {
        [
            (Meter::Characters, media.characters),
            (Meter::Seconds, media.seconds),
            (Meter::Images, media.images),
            (Meter::Requests, u64::from(self.get(Meter::Requests).is_some())),
        ]
    }

    fn need(&self, meter: Meter) -> Result<&'a Price, PriceError> {
        self.get(meter).ok_or_else(|| PriceError::NoMeter {
            model: self.model.to_owned(),
            service_tier: self.service_tier,
            meter,
        })
    }

    fn line(&self, meter: Meter, quantity: u64) -> Result<Line, PriceError> {
        let price = self.need(meter)?;
        let Step { size, price: unit_price } = price.rate.step();
        let list = self.list(meter).unwrap_or(price).rate.step();
        let amount = price.rate.step().total(quantity).to_money();
        Ok(Line {
            sku: price.sku.clone(),
            meter,
            quantity,
            unit_price,
            unit_size: size,
            list_unit_price: list.price,
            list_unit_size: list.size,
            amount: amount.ok_or(PriceError::Overflow { quantity, unit_price })?,
        })
    }
}

/// What a prompt costs at most, however much of it comes from the cache.
fn prompt_max(input: Step, cached: Step, tokens: u64) -> Total {
    if input.size == 1 && cached.size == 1 {
        return input.total(tokens).max(cached.total(tokens));
    }
    let (fixed, step) = input.either(cached);
    (fixed + step.total(tokens)).min(input.total(tokens) + cached.total(tokens))
}

#[cfg(test)]
mod tests {
    use proptest::{option, prelude::*};

    use super::{super::rate::strategy::rate, *};

    fn meters() -> impl Strategy<Value = Meters> {
        let optional = || option::of(rate());
        ((rate(), rate(), rate(), optional()), (optional(), optional(), optional(), optional())).prop_map(
            |((input, cached, output, reasoning), (characters, seconds, images, requests))| {
                let all = [
                    (Meter::Input, Some(input)),
                    (Meter::CachedInput, Some(cached)),
                    (Meter::Output, Some(output)),
                    (Meter::Reasoning, reasoning),
                    (Meter::Characters, characters),
                    (Meter::Seconds, seconds),
                    (Meter::Images, images),
                    (Meter::Requests, requests),
                ];
                let priced = all.into_iter().filter_map(|(meter, rate)| Some((meter, rate?)));
                priced.map(|(meter, rate)| (meter, Price { sku: meter.to_string(), rate })).collect()
            },
        )
    }

    /// Any part of the list, under other rates.
    fn contract(list: &Meters) -> impl Strategy<Value = Option<Meters>> + use<> {
        let meters: Vec<_> = list.keys().copied().collect();
        option::of(proptest::collection::vec(option::of(rate()), meters.len()).prop_map(move |rates| {
            let own = meters.iter().zip(rates).filter_map(|(meter, rate)| Some((*meter, rate?)));
            own.map(|(meter, rate)| (meter, Price { sku: meter.to_string(), rate })).collect()
        }))
    }

    fn books() -> impl Strategy<Value = (Meters, Option<Meters>)> {
        meters().prop_flat_map(|list| (Just(list.clone()), contract(&list)))
    }

    proptest! {
        #[test]
        fn no_outcome_costs_more_than_its_bound(
            (list, contract) in books(),
            (input, cached) in (0..300u64, 0..300u64),
            (output, reasoning, spare) in (0..300u64, 0..300u64, 0..50u64),
            media in (0..300u64, 0..300u64, 0..300u64),
        ) {
            let prices = Prices::of("m", ServiceTier::Default, &list, contract.as_ref()).expect("there is a list");
            let sold = |meter, quantity| if prices.get(meter).is_some() { quantity } else { 0 };
            let media = Media {
                characters: sold(Meter::Characters, media.0),
                seconds: sold(Meter::Seconds, media.1),
                images: sold(Meter::Images, media.2),
            };
            let quantities = Quantities {
                input_tokens: input,
                cached_input_tokens: cached,
                output_tokens: output,
                reasoning_tokens: reasoning,
                characters: media.characters,
                seconds: media.seconds,
                images: media.images,
            };
            let bound = prices.bound(input + cached, &media, true).expect("every meter has a price");
            let held = bound.fixed + bound.generated.total(output + reasoning + spare);
            let lines = prices.lines(&quantities).expect("every meter has a price");
            prop_assert!(Total::from(cost(&lines).expect("it fits")) <= held);
            for line in &lines {
                let exact = line.unit_price.total_of(line.priced_quantity());
                prop_assert_eq!(exact, line.amount.into());
                prop_assert!(contract.is_some() || line.list_amount() == line.amount.into());
            }
            // What is not flat is rated, and held, a little above; what is flat exactly.
            let all_flat = list.values().chain(contract.iter().flat_map(|own| own.values())).all(|p| p.rate.step().size == 1);
            if all_flat && cached == 0 && spare == 0 && prices.get(Meter::Reasoning).is_none() {
                let input_step = prices.get(Meter::Input).expect("a price").rate.step();
                let cached_step = prices.get(Meter::CachedInput).expect("a price").rate.step();
                if input_step.price >= cached_step.price {
                    prop_assert_eq!(Total::from(cost(&lines).expect("it fits")), held);
                }
            }
        }
    }
}
