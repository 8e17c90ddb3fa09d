//! The books without a gateway: accounts, credit, prices and usage, straight in the database.
//!
//! The command line opens them beside a running server: they never touch the outbox, and readers do not block it.

use std::collections::BTreeSet;

use sqlx::{Sqlite, SqlitePool, Transaction};

use crate::{
    catalog::{self, Catalog},
    error::BillingError,
    event::AccountId,
    ledger::{self, AccountKind, Balance, CreditGrant},
    price::{PriceBook, PriceBookHash},
    usage::{self, UsageQuery, UsageRow},
};

/// `synchronous=FULL`: a commit that was answered survives a power cut.
const SYNCHRONOUS_FULL: i64 = 2;

#[derive(Clone, Debug)]
pub struct Books {
    pub(crate) database: SqlitePool,
}

impl Books {
    /// Brings billing's tables in `database` up to date. Every connection must have `synchronous=FULL` (or EXTRA) and
    /// `foreign_keys=ON`.
    pub async fn open(database: SqlitePool) -> Result<Books, BillingError> {
        let (synchronous,): (i64,) = sqlx::query_as("PRAGMA synchronous").fetch_one(&database).await?;
        if synchronous < SYNCHRONOUS_FULL {
            return Err(BillingError::NotDurable {
                pragma: "synchronous",
                found: synchronous,
                needed: "FULL",
            });
        }
        let (foreign_keys,): (i64,) = sqlx::query_as("PRAGMA foreign_keys").fetch_one(&database).await?;
        if foreign_keys != 1 {
            return Err(BillingError::NotDurable {
                pragma: "foreign_keys",
                found: foreign_keys,
                needed: "ON",
            });
        }
        let mut migrator = sqlx::migrate!("./migrations/ledger");
        migrator.dangerous_set_table_name("_billing_migrations");
        migrator.run(&database).await?;
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
        ledger::credit(&mut tx, grant).await?;
        Ok(tx.commit().await?)
    }

    pub async fn balance(&self, account: &AccountId) -> Result<Balance, BillingError> {
        ledger::balance(&mut *self.database.acquire().await?, account).await
    }

    /// Every account, by id.
    pub async fn accounts(&self) -> Result<Vec<Balance>, BillingError> {
        ledger::accounts(&mut *self.database.acquire().await?).await
    }

    /// Every price book.
    pub async fn catalog(&self) -> Result<Catalog, BillingError> {
        Catalog::load(&mut *self.database.acquire().await?).await
    }

    /// Stores a price book, whatever a [`Plan`](crate::Plan) says of it. Running servers take it up within a
    /// `price_poll`.
    pub async fn apply_price_book(&self, book: &PriceBook) -> Result<PriceBookHash, BillingError> {
        let mut tx = self.write().await?;
        catalog::apply(&mut tx, book).await?;
        tx.commit().await?;
        Ok(book.hash().clone())
    }

    /// Usage that has arrived in the ledger, which takes a moment after a request (`ship_linger`).
    pub async fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageRow>, BillingError> {
        let rows = usage::rollups(&mut *self.database.acquire().await?, query).await?;
        let groups: BTreeSet<_> = query.group_by.iter().copied().collect();
        Ok(usage::fold(rows, &groups.into_iter().collect::<Vec<_>>()))
    }

    async fn write(&self) -> Result<Transaction<'static, Sqlite>, BillingError> {
        Ok(self.database.begin_with("BEGIN IMMEDIATE").await?)
    }
}
