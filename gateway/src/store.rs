//! The gateway's database: one SQLite file, opened once and shared with the billing crate.
//!
//! Each crate brings its own migrations and its own tables; neither names a table of the other.

use std::{path::Path, time::Duration};

use sqlx::{
    SqlitePool,
    migrate::Migrator,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

/// Connections: SQLite has one writer at a time, readers never wait for it (WAL).
const CONNECTIONS_MAX: u32 = 8;
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// A failure to open or migrate the database, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "cannot open the database {path}: check that the folder exists and is writable, and that the file is a Sluice database"
    )]
    Open {
        path: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("cannot bring the database {path} up to date; it may come from a newer version of Sluice")]
    Migrate {
        path: String,
        #[source]
        source: sqlx::migrate::MigrateError,
    },
}

/// Opens (and where `create` says so, creates) the database at `path` and applies the gateway's migrations.
pub async fn open(path: &Path, create: bool) -> Result<SqlitePool, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(create)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true);
    let name = path.display().to_string();
    if create {
        create_private(path)
            .map_err(|source| StoreError::Open { path: name.clone(), source: source.into() })?;
    }
    let pool = SqlitePoolOptions::new()
        .max_connections(CONNECTIONS_MAX)
        .connect_with(options)
        .await
        .map_err(|source| StoreError::Open { path: name.clone(), source })?;
    migrations().run(&pool).await.map_err(|source| StoreError::Migrate { path: name, source })?;
    Ok(pool)
}

/// Creates the file, its owner's alone, unless it exists. SQLite gives its journals the mode of the database.
pub fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().create(true).truncate(false).write(true).mode(0o600).open(path).map(drop)
}

/// Moves everything into the database file itself, so that a copy of it alone is whole.
pub async fn close(database: SqlitePool) -> Result<(), sqlx::Error> {
    let folded = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&database).await.map(drop);
    database.close().await;
    folded
}

fn migrations() -> Migrator {
    let mut migrator = sqlx::migrate!("./migrations");
    migrator.dangerous_set_table_name("_gateway_migrations");
    migrator
}
