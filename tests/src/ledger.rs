//! What an auditor reads: the database itself, whichever it is.

use std::collections::BTreeMap;

use sluice_billing::{Database, DatabaseOptions, args};

use crate::cluster::Cluster;

/// One bill, as the ledger has it. The classes do not overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bill {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub cost_pico: i64,
}

impl Bill {
    pub fn prompt_tokens(&self) -> u64 {
        self.input_tokens + self.cached_input_tokens
    }
}

impl Cluster {
    /// The database, opened beside the server.
    pub async fn database(&self) -> Database {
        let url = self.database_url();
        Database::open(&url, &DatabaseOptions::default())
            .await
            .unwrap_or_else(|error| panic!("{url}: {error}: {:?}", std::error::Error::source(&error)))
    }

    /// Every bill in the ledger, by request id. That none has two bills is for `sluice audit` to say.
    pub async fn bills(&self) -> BTreeMap<String, Bill> {
        let database = self.database().await;
        let rows: Vec<(String, i64, i64, i64, i64)> = database
            .read()
            .await
            .expect("the database answers")
            .fetch_all(
                "SELECT request_id, input_tokens, cached_input_tokens, output_tokens, cost_pico FROM usage_events",
                args![],
            )
            .await
            .expect("the ledger has usage_events");
        let bill = |(id, input, cached, output, cost_pico): (String, i64, i64, i64, i64)| {
            let bill = Bill {
                input_tokens: input.unsigned_abs(),
                cached_input_tokens: cached.unsigned_abs(),
                output_tokens: output.unsigned_abs(),
                cost_pico,
            };
            (id, bill)
        };
        rows.into_iter().map(bill).collect()
    }

    /// There is no command for a second organisation yet, so the harness writes the three rows that make one.
    pub(crate) async fn insert_organisation(&self, org: &str, project: &str, account: &str) {
        let database = self.database().await;
        let mut tx = database.write().await.expect("the database answers");
        let written = async {
            tx.execute(
                "INSERT INTO billing_accounts (id, kind, credit_limit_pico) VALUES ($1, 'prepaid', 0)",
                args![account],
            )
            .await?;
            tx.execute(
                "INSERT INTO orgs (id, name, account_id, created_s) VALUES ($1, 'Test', $2, 0)",
                args![org, account],
            )
            .await?;
            tx.execute(
                "INSERT INTO projects (id, org_id, name, created_s) VALUES ($1, $2, 'Test', 0)",
                args![project, org],
            )
            .await?;
            tx.commit().await
        };
        written.await.unwrap_or_else(|error| panic!("the organisation {org}: {error}"));
    }
}
