//! The price books that exist, and which one is in force when. Owns the table `price_books`.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::{
    args,
    database::Conn,
    error::BillingError,
    price::{Change, PriceBook, PriceBookHash},
};

/// All price books, oldest first by the moment they come into force. Immutable; a new book makes a new catalog.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    books: Vec<Arc<PriceBook>>,
}

/// What applying a book would do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub standing: Standing,
    /// Requests admitted from here on are priced by it, if they ever are.
    pub in_force_from: OffsetDateTime,
    /// When a later book takes over; None: until one is applied.
    pub in_force_until: Option<OffsetDateTime>,
    /// The book that it takes over from.
    pub replaces: Option<Arc<PriceBook>>,
    /// What it changes of that book.
    pub changes: Vec<Change>,
}

/// How a book stands to those that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was applied before.
    Known,
    /// It comes into force at its `effective_from`.
    Future,
    /// Its `effective_from` has passed: it would come into force at once, and change nothing that was billed.
    Backdated,
    /// It would never be in force: a later one is already.
    Superseded,
}

impl Catalog {
    pub(crate) async fn load(conn: &mut Conn) -> Result<Catalog, BillingError> {
        let mut books = Vec::new();
        for (hash, canonical) in stored(conn).await? {
            let corrupt = |source| BillingError::Corrupt { table: "price_books", source };
            let book = PriceBook::from_toml(&canonical).map_err(|error| corrupt(error.into()))?;
            if book.hash().as_str() != hash {
                return Err(corrupt(format!("the book at {hash} has the hash {}", book.hash()).into()));
            }
            books.push(book);
        }
        Ok(Catalog::of(books))
    }

    /// Books in the order in which they were applied.
    pub fn of(books: Vec<PriceBook>) -> Catalog {
        let mut books: Vec<_> = books.into_iter().map(Arc::new).collect();
        // The sort is stable.
        books.sort_by_key(|book| book.effective_from());
        Catalog { books }
    }

    /// In the order of coming into force; of two from the same moment, the one applied later comes later.
    pub fn books(&self) -> &[Arc<PriceBook>] {
        &self.books
    }

    /// The book in force at a moment. Of two from the same moment, the one applied later.
    pub fn in_force(&self, at: OffsetDateTime) -> Option<&Arc<PriceBook>> {
        self.books.iter().rfind(|book| book.effective_from() <= at)
    }

    pub fn get(&self, hash: &PriceBookHash) -> Result<&Arc<PriceBook>, BillingError> {
        let found = self.books.iter().rfind(|book| book.hash() == hash);
        found.ok_or_else(|| BillingError::UnknownPriceBook(hash.clone()))
    }

    /// When the book at this place stops being in force: when the first from a later moment begins.
    pub fn until(&self, from: OffsetDateTime) -> Option<OffsetDateTime> {
        self.books.iter().map(|book| book.effective_from()).find(|later| *later > from)
    }

    /// What applying `book` at `now` would do.
    pub fn plan(&self, book: &PriceBook, now: OffsetDateTime) -> Plan {
        let effective_from = book.effective_from();
        if self.get(book.hash()).is_ok() {
            let in_force_until = self.until(effective_from);
            let (standing, in_force_from) = (Standing::Known, effective_from);
            return Plan { standing, in_force_from, in_force_until, replaces: None, changes: Vec::new() };
        }
        let in_force_from = effective_from.max(now);
        let replaces = self.in_force(in_force_from).cloned();
        let superseded = replaces.as_ref().is_some_and(|other| other.effective_from() > effective_from);
        let standing = match effective_from < now {
            _ if superseded => Standing::Superseded,
            true => Standing::Backdated,
            false => Standing::Future,
        };
        let changes = book.changes_from(replaces.as_deref());
        Plan { standing, in_force_from, in_force_until: self.until(in_force_from), replaces, changes }
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
    Ok(count != catalog.books.len() as i64)
}

/// (hash, canonical form), in the order in which they were applied.
pub(crate) async fn stored(conn: &mut Conn) -> Result<Vec<(String, String)>, BillingError> {
    Ok(conn.fetch_all("SELECT hash, canonical FROM price_books ORDER BY ordinal", args![]).await?)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    /// A book from a minute of an hour on, which prices an image at `usd`.
    fn book(minute: u8, usd: &str) -> PriceBook {
        let text = format!(
            "currency = \"USD\"\neffective_from = \"2026-01-01T12:{minute:02}:00Z\"\n\
             [[price]]\nmodel = \"m\"\nmeter = \"images\"\nusd_per_unit = \"{usd}\"\n"
        );
        PriceBook::from_toml(&text).expect("a book")
    }

    #[test]
    fn a_plan_says_when_a_book_comes_into_force_and_what_it_changes() {
        let (first, later) = (book(10, "1"), book(30, "3"));
        let catalog = Catalog::of(vec![later.clone(), first.clone()]);
        let at = |minute: u8| datetime!(2026-01-01 12:00 UTC) + time::Duration::minutes(minute.into());
        // now, the book, its standing, from, until, replaced
        let check =
            |now, planned: &PriceBook, standing, from, until: Option<u8>, replaces: Option<&PriceBook>| {
                let plan = catalog.plan(planned, at(now));
                assert_eq!((plan.standing, plan.in_force_from), (standing, at(from)));
                assert_eq!(plan.in_force_until, until.map(at));
                assert_eq!(plan.replaces.as_deref(), replaces);
                assert_eq!(
                    plan.changes,
                    if standing == Standing::Known { vec![] } else { planned.changes_from(replaces) }
                );
            };
        check(5, &first, Standing::Known, 10, Some(30), None);
        check(50, &later, Standing::Known, 30, None, None);
        check(5, &book(7, "2"), Standing::Future, 7, Some(10), None);
        check(5, &book(20, "2"), Standing::Future, 20, Some(30), Some(&first));
        check(20, &book(20, "2"), Standing::Future, 20, Some(30), Some(&first));
        check(5, &book(30, "2"), Standing::Future, 30, None, Some(&later));
        check(25, &book(20, "2"), Standing::Backdated, 25, Some(30), Some(&first));
        check(40, &book(30, "2"), Standing::Backdated, 40, None, Some(&later));
        check(40, &book(20, "2"), Standing::Superseded, 40, None, Some(&later));
        check(5, &book(3, "2"), Standing::Backdated, 5, Some(10), None);
    }
}
