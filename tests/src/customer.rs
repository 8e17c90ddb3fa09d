//! Money as an operator sees it: customers with accounts of their own, balances, usage, prices.

use serde_json::Value;

use crate::cluster::Cluster;
use crate::patience::eventually;

/// 10^-12 US dollars in a dollar.
const PICO_PER_USD: i64 = 1_000_000_000_000;

/// An organisation with one project, one key and an account of its own.
#[derive(Debug, Clone)]
pub struct Customer {
    pub key: String,
    pub key_id: String,
    pub account: String,
}

/// What a token of the served model costs, in pico-USD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    pub input_pico: i64,
    pub cached_input_pico: i64,
    pub output_pico: i64,
}

/// The sum of some rows of `sluice usage`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub requests: u64,
    /// Prompt tokens that were computed, and that came from a cache: the classes do not overlap.
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub cost_pico: i64,
}

impl Usage {
    pub fn prompt_tokens(&self) -> u64 {
        self.input_tokens + self.cached_input_tokens
    }
}

impl Price {
    /// The cost of a request, of which no prompt token came from a cache.
    pub fn of(self, prompt_tokens: u64, completion_tokens: u64) -> i64 {
        self.of_classes(prompt_tokens, 0, completion_tokens)
    }

    pub fn of_classes(self, input_tokens: u64, cached_input_tokens: u64, completion_tokens: u64) -> i64 {
        input_tokens as i64 * self.input_pico
            + cached_input_tokens as i64 * self.cached_input_pico
            + completion_tokens as i64 * self.output_pico
    }
}

impl Cluster {
    /// A new customer; `None`: with an account that never had credit.
    pub async fn customer(&self, name: &str, credit_pico: Option<i64>) -> Customer {
        let (org, project, account) = (format!("org-{name}"), format!("proj-{name}"), format!("acct-{name}"));
        self.insert_organisation(&org, &project, &account).await;
        let made = self.cli(&["keys", "create", "--name", name, "--project", &project]).await;
        let field =
            |name: &str| made[name].as_str().unwrap_or_else(|| panic!("no {name}: {made}")).to_owned();
        let customer = Customer { key: field("key"), key_id: field("id"), account };
        if let Some(credit_pico) = credit_pico {
            self.credit(&customer, credit_pico).await;
        }
        customer
    }

    pub async fn credit(&self, customer: &Customer, amount_pico: i64) {
        let amount = usd_of(amount_pico);
        self.cli(&["credit", "--account", &customer.account, "--amount", &amount]).await;
    }

    /// A hard budget of the customer's key over all time, made or changed.
    pub async fn limit_key(&self, customer: &Customer, limit_pico: i64) {
        let (id, limit) = (format!("of-{}", customer.key_id), usd_of(limit_pico));
        self.cli(&["budgets", "set", &id, "--key", &customer.key_id, "--period", "total", "--limit", &limit])
            .await;
    }

    /// What the budgets of this key have spent, by the ledger.
    pub async fn budget_spent_pico(&self, customer: &Customer) -> i64 {
        let listed = self.cli(&["budgets", "list"]).await;
        let rows = listed["data"].as_array().unwrap_or_else(|| panic!("no rows: {listed}"));
        let row = rows.iter().find(|row| row["scope_id"] == customer.key_id.as_str());
        pico_of(&row.unwrap_or_else(|| panic!("no budget of {customer:?}: {listed}"))["spent"])
    }

    /// What the default account has: credits less usage, in pico-USD.
    pub async fn balance_pico(&self) -> i64 {
        pico_of(&self.cli(&["balance"]).await["posted"])
    }

    pub async fn balance_of(&self, customer: &Customer) -> i64 {
        pico_of(&self.cli(&["balance", "--account", &customer.account]).await["posted"])
    }

    /// The sum of what `sluice usage ARGS` lists.
    pub async fn usage(&self, args: &[&str]) -> Usage {
        let listed = self.cli(&[&["usage"], args].concat()).await;
        let rows = listed["data"].as_array().unwrap_or_else(|| panic!("no rows: {listed}"));
        rows.iter().fold(Usage::default(), |sum, row| {
            let count = |field: &str| row[field].as_u64().unwrap_or_else(|| panic!("no {field}: {row}"));
            Usage {
                requests: sum.requests + count("requests"),
                input_tokens: sum.input_tokens + count("input_tokens"),
                cached_input_tokens: sum.cached_input_tokens + count("cached_input_tokens"),
                output_tokens: sum.output_tokens + count("output_tokens"),
                cost_pico: sum.cost_pico + pico_of(&row["cost"]),
            }
        })
    }

    /// The usage, once at least this many requests have reached the ledger.
    pub async fn usage_of_requests(&self, requests_min: u64) -> Usage {
        eventually("usage reaches the ledger", async || match self.usage(&[]).await {
            usage if usage.requests >= requests_min => Ok(usage),
            usage => Err(format!("{requests_min} requests expected: {usage:?}")),
        })
        .await
    }

    /// The price of the served model, from the operator's price file.
    pub async fn price(&self) -> Price {
        let path = self.data_dir().join("prices.toml");
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let of = |meter: &str| {
            let wanted = [format!("model = \"{}\"", self.model), format!("meter = \"{meter}\"")];
            let row = text.split("[[price]]").find(|row| wanted.iter().all(|line| row.contains(line)));
            let row = row.unwrap_or_else(|| panic!("no price of {meter} in {text}"));
            let quoted = row.split("usd_per_million = \"").nth(1).and_then(|rest| rest.split('"').next());
            let per_million = pico_of_text(quoted.unwrap_or_else(|| panic!("no usd_per_million in {row}")));
            assert_eq!(per_million % 1_000_000, 0, "prices are exact: {row}");
            per_million / 1_000_000
        };
        Price { input_pico: of("input"), cached_input_pico: of("cached_input"), output_pico: of("output") }
    }
}

/// A decimal string of dollars, as all JSON of Sluice writes money.
#[track_caller]
pub fn pico_of(value: &Value) -> i64 {
    pico_of_text(value.as_str().unwrap_or_else(|| panic!("money is a decimal string, not {value}")))
}

/// Exact, and independent of the product's own arithmetic.
#[track_caller]
fn pico_of_text(text: &str) -> i64 {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let number = |digits: &str| -> i64 { digits.parse().unwrap_or_else(|_| panic!("no money: {text:?}")) };
    assert!(part.len() <= 12, "finer than a pico-dollar: {text:?}");
    sign * (number(whole) * PICO_PER_USD + number(&format!("{part:0<12}")))
}

fn usd_of(pico: i64) -> String {
    format!("{}.{:012}", pico / PICO_PER_USD, pico % PICO_PER_USD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_read_and_written_exactly() {
        for (text, pico) in [
            ("10.00", 10 * PICO_PER_USD),
            ("0.000000000001", 1),
            ("-0.5", -PICO_PER_USD / 2),
            ("3", 3 * PICO_PER_USD),
        ] {
            assert_eq!(pico_of_text(text), pico, "{text}");
        }
        assert_eq!(usd_of(1), "0.000000000001");
        assert_eq!(pico_of_text(&usd_of(12_345_678_901_234)), 12_345_678_901_234);
    }
}
