//! One database, SQLite or PostgreSQL, behind one way to say SQL.
//!
//! Statements are written once, in what both understand: `$1` placeholders, BIGINT, TEXT and BYTEA values. Where the two
//! must differ, [`Conn::dialect`] tells which one this is.
//!
//! ```text
//! sqlite:PATH          one file; one writer at a time (BEGIN IMMEDIATE), readers never wait (WAL), synchronous=FULL
//! postgres://HOST/DB   several gateways; writers meet in row locks, taken in one order: counters, accounts, leases
//! ```

use std::{
    fmt,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use sqlx::{
    Connection, FromRow, PgConnection, PgPool, Postgres, Sqlite, SqliteConnection, SqlitePool, Transaction,
    migrate::Migrator,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};

/// Opening a file takes a moment, however little patience there is with other writers.
const OPEN_WAIT: Duration = Duration::from_secs(1);

/// Which SQL is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Sqlite,
    Postgres,
}

/// Limits of a database's connections.
#[derive(Clone, Debug)]
pub struct DatabaseOptions {
    pub connections_max: u32,
    /// How long a statement waits for a connection, and in SQLite for another writer.
    pub wait_max: Duration,
    /// Create a SQLite file that does not exist, its owner's alone.
    pub create: bool,
}

impl Default for DatabaseOptions {
    fn default() -> DatabaseOptions {
        DatabaseOptions { connections_max: 8, wait_max: Duration::from_secs(10), create: false }
    }
}

/// A failure to open the database or bring it up to date, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("database_url: {url:?} is neither sqlite:PATH nor postgres://USER:PASSWORD@HOST/DATABASE")]
    Url { url: String },
    #[error(
        "cannot open the database {path}: check that the folder exists and is writable, and that the file is a Sluice database"
    )]
    OpenFile {
        path: String,
        #[source]
        source: sqlx::Error,
    },
    #[error(
        "cannot reach PostgreSQL at {server}: check that it runs, and the user and database in database_url"
    )]
    Connect {
        server: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("PostgreSQL at {server} runs with {setting} = {found}, which can lose money; set it to {needed}")]
    NotDurable { server: String, setting: &'static str, found: String, needed: &'static str },
    #[error("cannot bring the database {name} up to date; it may come from a newer version of Sluice")]
    Migrate {
        name: String,
        #[source]
        source: sqlx::migrate::MigrateError,
    },
}

/// A pool of connections. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Database {
    pool: Pool,
    /// Without the password.
    name: String,
}

#[derive(Clone)]
enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// A value of a statement.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    Int(i64),
    Text(&'a str),
    Blob(&'a [u8]),
    OptInt(Option<i64>),
    OptText(Option<&'a str>),
}

/// The values of a statement, in the order of their numbers: `args![id, amount]`.
#[macro_export]
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::Arg::from($value)),*] };
}

/// What a row is read into, from either database.
pub trait Row: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin {}
impl<T> Row for T where T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin {}

/// A connection, with or without a transaction on it.
pub struct Conn(Inner);

enum Inner {
    Sqlite(PoolConnection<Sqlite>),
    SqliteTx(Transaction<'static, Sqlite>),
    Postgres(PoolConnection<Postgres>),
    PostgresTx(Transaction<'static, Postgres>),
}

/// A transaction; dropped without [`Tx::commit`], nothing has happened.
#[must_use = "a transaction that is not committed changes nothing"]
pub struct Tx(Conn);

/// The two kinds of connection, borrowed.
pub enum Raw<'a> {
    Sqlite(&'a mut SqliteConnection),
    Postgres(&'a mut PgConnection),
}

/// The migrations of one crate for both databases, under a table of versions of their own.
#[derive(Debug)]
pub struct Migrations {
    pub sqlite: Migrator,
    pub postgres: Migrator,
    pub table: &'static str,
}

impl Database {
    /// Opens `sqlite:PATH` or `postgres://…`. Every connection of it is durable: a commit that was answered survives a
    /// power cut.
    pub async fn open(url: &str, options: &DatabaseOptions) -> Result<Database, DatabaseError> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            return Database::open_file(Path::new(path.strip_prefix("//").unwrap_or(path)), options).await;
        }
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(DatabaseError::Url { url: url.to_owned() });
        }
        let connect = PgConnectOptions::from_str(url).map_err(|_| DatabaseError::Url { url: hidden(url) })?;
        let server = format!("{}:{}", connect.get_host(), connect.get_port());
        let failed = |source| DatabaseError::Connect { server: server.clone(), source };
        let pool = PgPoolOptions::new()
            .max_connections(options.connections_max)
            .acquire_timeout(options.wait_max)
            .connect_with(connect.application_name("sluice"))
            .await
            .map_err(failed)?;
        for (setting, statement, lossy, needed) in [
            ("synchronous_commit", "SELECT current_setting('synchronous_commit')", &["off"][..], "on"),
            ("fsync", "SELECT current_setting('fsync')", &["off"], "on"),
        ] {
            let (found,): (String,) = sqlx::query_as(statement).fetch_one(&pool).await.map_err(failed)?;
            if lossy.contains(&found.as_str()) {
                return Err(DatabaseError::NotDurable { server, setting, found, needed });
            }
        }
        let name = format!("{server}/{}", pool.connect_options().get_database().unwrap_or_default());
        Ok(Database { pool: Pool::Postgres(pool), name })
    }

    async fn open_file(path: &Path, options: &DatabaseOptions) -> Result<Database, DatabaseError> {
        let name = path.display().to_string();
        let failed = |source| DatabaseError::OpenFile { path: name.clone(), source };
        if options.create {
            create_private(path).map_err(|source| failed(source.into()))?;
        }
        let connect = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(options.create)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(options.wait_max)
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(options.connections_max)
            .acquire_timeout(options.wait_max.max(OPEN_WAIT))
            .connect_with(connect)
            .await
            .map_err(failed)?;
        Ok(Database { pool: Pool::Sqlite(pool), name })
    }

    pub fn dialect(&self) -> Dialect {
        match self.pool {
            Pool::Sqlite(_) => Dialect::Sqlite,
            Pool::Postgres(_) => Dialect::Postgres,
        }
    }

    /// The file, or server and database; without the password.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file of a SQLite database.
    pub fn path(&self) -> Option<PathBuf> {
        matches!(self.pool, Pool::Sqlite(_)).then(|| PathBuf::from(&self.name))
    }

    /// Applies what is missing. Several gateways may do so at once.
    pub async fn migrate(&self, migrations: Migrations) -> Result<(), DatabaseError> {
        let Migrations { mut sqlite, mut postgres, table } = migrations;
        let migrated = match &self.pool {
            Pool::Sqlite(pool) => sqlite.dangerous_set_table_name(table).run(pool).await,
            Pool::Postgres(pool) => postgres.dangerous_set_table_name(table).run(pool).await,
        };
        migrated.map_err(|source| DatabaseError::Migrate { name: self.name.clone(), source })
    }

    /// A connection for single statements.
    pub async fn read(&self) -> Result<Conn, sqlx::Error> {
        Ok(Conn(match &self.pool {
            Pool::Sqlite(pool) => Inner::Sqlite(pool.acquire().await?),
            Pool::Postgres(pool) => Inner::Postgres(pool.acquire().await?),
        }))
    }

    /// A transaction that writes. In SQLite it is the only one from its first moment on.
    pub async fn write(&self) -> Result<Tx, sqlx::Error> {
        Ok(Tx(Conn(match &self.pool {
            Pool::Sqlite(pool) => Inner::SqliteTx(pool.begin_with("BEGIN IMMEDIATE").await?),
            Pool::Postgres(pool) => Inner::PostgresTx(pool.begin().await?),
        })))
    }

    /// A transaction that reads one state of everything, however long it takes.
    pub async fn snapshot(&self) -> Result<Tx, sqlx::Error> {
        let statement = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY";
        Ok(Tx(Conn(match &self.pool {
            Pool::Sqlite(pool) => Inner::SqliteTx(pool.begin().await?),
            Pool::Postgres(pool) => Inner::PostgresTx(pool.begin_with(statement).await?),
        })))
    }

    /// Closes every connection. SQLite's log is folded into its file first, so that a copy of it alone is whole.
    pub async fn close(self) -> Result<(), sqlx::Error> {
        match self.pool {
            Pool::Sqlite(pool) => {
                let folded = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&pool).await.map(drop);
                pool.close().await;
                folded
            }
            Pool::Postgres(pool) => {
                pool.close().await;
                Ok(())
            }
        }
    }
}

impl Conn {
    pub fn dialect(&self) -> Dialect {
        match self.0 {
            Inner::Sqlite(_) | Inner::SqliteTx(_) => Dialect::Sqlite,
            Inner::Postgres(_) | Inner::PostgresTx(_) => Dialect::Postgres,
        }
    }

    /// The connection itself, for what only one of the two can do.
    pub fn raw(&mut self) -> Raw<'_> {
        match &mut self.0 {
            Inner::Sqlite(conn) => Raw::Sqlite(conn),
            Inner::SqliteTx(conn) => Raw::Sqlite(conn),
            Inner::Postgres(conn) => Raw::Postgres(conn),
            Inner::PostgresTx(conn) => Raw::Postgres(conn),
        }
    }

    /// Runs a statement; returns how many rows it changed.
    pub async fn execute(&mut self, sql: &'static str, args: &[Arg<'_>]) -> Result<u64, sqlx::Error> {
        Ok(match self.raw() {
            Raw::Sqlite(conn) => bind!(sqlx::query(sql), args).execute(conn).await?.rows_affected(),
            Raw::Postgres(conn) => bind!(sqlx::query(sql), args).execute(conn).await?.rows_affected(),
        })
    }

    pub async fn fetch_all<T: Row>(
        &mut self,
        sql: &'static str,
        args: &[Arg<'_>],
    ) -> Result<Vec<T>, sqlx::Error> {
        match self.raw() {
            Raw::Sqlite(conn) => bind!(sqlx::query_as(sql), args).fetch_all(conn).await,
            Raw::Postgres(conn) => bind!(sqlx::query_as(sql), args).fetch_all(conn).await,
        }
    }

    pub async fn fetch_optional<T: Row>(
        &mut self,
        sql: &'static str,
        args: &[Arg<'_>],
    ) -> Result<Option<T>, sqlx::Error> {
        match self.raw() {
            Raw::Sqlite(conn) => bind!(sqlx::query_as(sql), args).fetch_optional(conn).await,
            Raw::Postgres(conn) => bind!(sqlx::query_as(sql), args).fetch_optional(conn).await,
        }
    }

    /// `RowNotFound` when there is none.
    pub async fn fetch_one<T: Row>(&mut self, sql: &'static str, args: &[Arg<'_>]) -> Result<T, sqlx::Error> {
        self.fetch_optional(sql, args).await?.ok_or(sqlx::Error::RowNotFound)
    }

    /// A transaction within this one: what it did is undone when it is rolled back, and the outer one goes on.
    pub async fn savepoint(&mut self) -> Result<(), sqlx::Error> {
        self.execute("SAVEPOINT inner_work", &[]).await.map(drop)
    }

    pub async fn rollback_to_savepoint(&mut self) -> Result<(), sqlx::Error> {
        self.execute("ROLLBACK TO SAVEPOINT inner_work", &[]).await.map(drop)
    }

    pub async fn release_savepoint(&mut self) -> Result<(), sqlx::Error> {
        self.execute("RELEASE SAVEPOINT inner_work", &[]).await.map(drop)
    }

    /// Whether the server answers.
    pub async fn ping(&mut self) -> Result<(), sqlx::Error> {
        match self.raw() {
            Raw::Sqlite(conn) => conn.ping().await,
            Raw::Postgres(conn) => conn.ping().await,
        }
    }
}

/// Binds each value as what it is.
macro_rules! bind {
    ($query:expr, $args:expr) => {{
        let mut query = $query;
        for arg in $args {
            query = match *arg {
                Arg::Int(value) => query.bind(value),
                Arg::Text(value) => query.bind(value),
                Arg::Blob(value) => query.bind(value),
                Arg::OptInt(value) => query.bind(value),
                Arg::OptText(value) => query.bind(value),
            };
        }
        query
    }};
}
use bind;

impl Tx {
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        match self.0.0 {
            Inner::SqliteTx(tx) => tx.commit().await,
            Inner::PostgresTx(tx) => tx.commit().await,
            Inner::Sqlite(_) | Inner::Postgres(_) => unreachable!("a Tx is made of a transaction"),
        }
    }

    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        match self.0.0 {
            Inner::SqliteTx(tx) => tx.rollback().await,
            Inner::PostgresTx(tx) => tx.rollback().await,
            Inner::Sqlite(_) | Inner::Postgres(_) => unreachable!("a Tx is made of a transaction"),
        }
    }
}

impl Deref for Tx {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.0
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Conn {
        &mut self.0
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({})", self.name)
    }
}

/// Creates the file, its owner's alone, unless it exists. SQLite gives its journals the mode of the database.
pub fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().create(true).truncate(false).write(true).mode(0o600).open(path).map(drop)
}

/// An address without what stands between `//` and `@`.
fn hidden(url: &str) -> String {
    match (url.find("//"), url.rfind('@')) {
        (Some(start), Some(end)) if start < end => format!("{}//***{}", &url[..start], &url[end..]),
        _ => url.to_owned(),
    }
}

impl From<i64> for Arg<'_> {
    fn from(value: i64) -> Self {
        Arg::Int(value)
    }
}

impl From<Option<i64>> for Arg<'_> {
    fn from(value: Option<i64>) -> Self {
        Arg::OptInt(value)
    }
}

impl<'a> From<&'a str> for Arg<'a> {
    fn from(value: &'a str) -> Self {
        Arg::Text(value)
    }
}

impl<'a> From<&'a String> for Arg<'a> {
    fn from(value: &'a String) -> Self {
        Arg::Text(value)
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(value: &'a [u8]) -> Self {
        Arg::Blob(value)
    }
}

impl<'a> From<Option<&'a str>> for Arg<'a> {
    fn from(value: Option<&'a str>) -> Self {
        Arg::OptText(value)
    }
}

impl<'a> From<&'a Option<String>> for Arg<'a> {
    fn from(value: &'a Option<String>) -> Self {
        Arg::OptText(value.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(hidden("postgres://me:secret@host/db"), "postgres://***@host/db");
        assert_eq!(hidden("postgres://host/db"), "postgres://host/db");
    }

    #[tokio::test]
    async fn an_address_of_neither_kind_is_refused_by_name() {
        let error = Database::open("mysql://x/y", &DatabaseOptions::default()).await.expect_err("refused");
        assert!(error.to_string().contains("database_url: \"mysql://x/y\""), "{error}");
    }
}
