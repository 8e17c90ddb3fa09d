//! The price books that exist, and which one is in force when. Owns the table `price_books`.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::{
    args,
    database::Conn,
    error::BillingError,
    price::{PriceBook, PriceBookHash},
};

/// All price books, oldest first by the moment they come into force. Immutable; a new book makes a new catalog.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalog {
    books: Vec<Arc<PriceBook>>,
}

impl Catalog {
    pub async fn load(conn: &mut Conn) -> Result<Catalog, BillingError> {
        let mut books = Vec::new();
        for (hash, canonical) in stored(conn).await? {
            let corrupt = |source| BillingError::Corrupt { table: "price_books", source };
            let book = PriceBook::from_toml(&canonical).map_err(|error| corrupt(error.into()))?;
            if book.hash().as_str() != hash {
                return Err(corrupt(format!("the book at {hash} has the hash {}", book.hash()).into()));
            }
            books.push(Arc::new(book));
        }
        // Rows come by the second; the sort is stable.
        books.sort_by_key(|book| book.effective_from());
        Ok(Catalog { books })
    }

    /// The book in force at a moment. Of two from the same moment, the one applied later.
    pub fn in_force(&self, at: OffsetDateTime) -> Option<&Arc<PriceBook>> {
        self.books.iter().rfind(|book| book.effective_from() <= at)
    }

    pub fn get(&self, hash: &PriceBookHash) -> Result<&Arc<PriceBook>, BillingError> {
        let found = self.books.iter().rfind(|book| book.hash() == hash);
        found.ok_or_else(|| BillingError::UnknownPriceBook(hash.clone()))
    }

    pub fn len(&self) -> usize {
        self.books.len()
    }
}

/// Stores a book; a known one changes nothing.
pub(crate) async fn apply(conn: &mut Conn, book: &PriceBook) -> Result<(), BillingError> {
    conn.execute(
        "INSERT INTO price_books (hash, effective_from_s, canonical) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        args![book.hash().as_str(), book.effective_from().unix_timestamp(), &book.canonical()],
    )
    .await?;
    Ok(())
}

/// Whether another process has applied a book since this catalog was read.
pub(crate) async fn has_grown(conn: &mut Conn, catalog: &Catalog) -> Result<bool, BillingError> {
    let (count,): (i64,) = conn.fetch_one("SELECT count(*) FROM price_books", args![]).await?;
    Ok(count != catalog.len() as i64)
}

/// (hash, canonical form), in the order of coming into force.
pub(crate) async fn stored(conn: &mut Conn) -> Result<Vec<(String, String)>, BillingError> {
    Ok(conn
        .fetch_all("SELECT hash, canonical FROM price_books ORDER BY effective_from_s, ordinal", args![])
        .await?)
}
