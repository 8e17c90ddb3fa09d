//! The books without a gateway: accounts, credit, prices and usage, straight in the database.
//!
//! The command line opens them beside a running server: they never touch the outbox, and readers do not block it.

use std::collections::BTreeSet;

use time::OffsetDateTime;

use crate::{
    alert,
    budget::{self, Budget, BudgetScope, BudgetStatus},
    catalog::{self, Catalog},
    credit::{self, CreditTerms},
    database::{Database, Migrations, Tx},
    error::BillingError,
    event::{AccountId, RequestId},
    ledger::{self, AccountKind, Balance, CreditGrant},
    money::Money,
    price::{PriceBook, PriceBookHash},
    receipt::Receipt,
    usage::{self, UsageQuery, UsageRow},
};

#[derive(Clone, Debug)]
pub struct Books {
    pub(crate) database: Database,
}

impl Books {
    /// Brings billing's tables in `database` up to date.
    pub async fn open(database: Database) -> Result<Books, BillingError> {
        database
            .migrate(Migrations {
                sqlite: sqlx::migrate!("./migrations/sqlite"),
                postgres: sqlx::migrate!("./migrations/postgres"),
                table: "_billing_migrations",
            })
            .await?;
        Ok(Books { database })
    }

    /// Creates an account; again with the same terms, changes nothing.
    pub async fn create_account(&self, account: &AccountId, kind: AccountKind) -> Result<(), BillingError> {
        let mut tx = self.write().await?;
        ledger::create_account(&mut tx, account, kind).await?;
        Ok(tx.commit().await?)
    }

    /// Adds credit; again with the same id, changes nothing.
    pub async fn credit(&self, grant: &CreditGrant) -> Result<(), BillingError> {
        let mut tx = self.write().await?;
        credit::post_grant(&mut tx, grant, &CreditTerms::default()).await?;
        Ok(tx.commit().await?)
    }

    pub async fn balance(&self, account: &AccountId) -> Result<Balance, BillingError> {
        ledger::balance(&mut self.database.read().await?, account).await
    }

    /// What an account must have left for its owner not to be told that it is low; None: he is never told.
    pub async fn low_balance_alert(&self, account: &AccountId) -> Result<Option<Money>, BillingError> {
        alert::low_balance(&mut self.database.read().await?, account).await
    }

    /// Sets or removes that threshold. If there is less left already, `balance.low` is raised at once.
    pub async fn set_low_balance_alert(
        &self,
        account: &AccountId,
        low_balance: Option<Money>,
        at: OffsetDateTime,
    ) -> Result<(), BillingError> {
        let mut tx = self.write().await?;
        alert::set_low_balance(&mut tx, account, low_balance, at).await?;
        Ok(tx.commit().await?)
    }

    /// Every account, by id.
    pub async fn accounts(&self) -> Result<Vec<Balance>, BillingError> {
        ledger::accounts(&mut self.database.read().await?).await
    }

    /// Every price book.
    pub async fn catalog(&self) -> Result<Catalog, BillingError> {
        Catalog::load(&mut self.database.read().await?).await
    }

    /// Stores a price book, whatever a [`Plan`](crate::Plan) says of it. Running servers take it up within a
    /// `refresh`.
    pub async fn apply_price_book(&self, book: &PriceBook) -> Result<PriceBookHash, BillingError> {
        let mut tx = self.write().await?;
        catalog::apply(&mut tx, book).await?;
        tx.commit().await?;
        Ok(book.hash().clone())
    }

    /// The price book with this hash, whenever it was in force.
    pub async fn price_book(&self, hash: &PriceBookHash) -> Result<PriceBook, BillingError> {
        let catalog = Catalog::load(&mut self.database.read().await?).await?;
        catalog.get(hash).map(|book| PriceBook::clone(book))
    }

    /// What the receipt of a request must state, by the bill that has arrived in the ledger. None: it has not, or not yet.
    pub async fn billed(&self, request_id: RequestId) -> Result<Option<Receipt>, BillingError> {
        let bill = usage::bill(&mut self.database.read().await?, request_id).await?;
        bill.map(|bill| Receipt::of_stored(request_id, &bill)).transpose()
    }

    /// Usage that has arrived in the ledger, which takes a moment after a request (`ship_linger`).
    pub async fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageRow>, BillingError> {
        let rows = usage::rollups(&mut self.database.read().await?, query).await?;
        let groups: BTreeSet<_> = query.group_by.iter().copied().collect();
        Ok(usage::fold(rows, &groups.into_iter().collect::<Vec<_>>()))
    }

    /// Creates a budget, or changes limit, hardness and thresholds of the one with this id. Running servers keep to it
    /// within a second; requests that they admitted before are not cut.
    pub async fn put_budget(&self, budget: &Budget) -> Result<(), BillingError> {
        let mut tx = self.write().await?;
        budget::put(&mut tx, budget, OffsetDateTime::now_utc().unix_timestamp()).await?;
        Ok(tx.commit().await?)
    }

    /// Ends a budget; false where there is none.
    pub async fn delete_budget(&self, id: &str) -> Result<bool, BillingError> {
        let mut tx = self.write().await?;
        let deleted = budget::delete(&mut tx, id, OffsetDateTime::now_utc().unix_timestamp()).await?;
        tx.commit().await?;
        Ok(deleted)
    }

    /// Whose spending the budget of an id limits or limited; None where there never was one.
    pub async fn budget_scope(&self, id: &str) -> Result<Option<(BudgetScope, String)>, BillingError> {
        budget::scope_of(&mut self.database.read().await?, id).await
    }

    /// Every budget with the window that `at` falls in.
    pub async fn budgets(&self, at: OffsetDateTime) -> Result<Vec<BudgetStatus>, BillingError> {
        let mut snapshot = self.database.snapshot().await?;
        let mut statuses = Vec::new();
        for budget in budget::all(&mut snapshot).await? {
            statuses.push(budget::status(&mut snapshot, budget, at).await?);
        }
        Ok(statuses)
    }

    /// The budget in force with this id, with the window that `at` falls in.
    pub async fn budget(&self, id: &str, at: OffsetDateTime) -> Result<Option<BudgetStatus>, BillingError> {
        let mut snapshot = self.database.snapshot().await?;
        match budget::get(&mut snapshot, id).await? {
            Some(budget) => budget::status(&mut snapshot, budget, at).await.map(Some),
            None => Ok(None),
        }
    }

    async fn write(&self) -> Result<Tx, BillingError> {
        Ok(self.database.write().await?)
    }
}
