//! The gateway's database, opened once and shared with the billing crate: SQLite in the data folder, or PostgreSQL.
//!
//! Each crate brings its own migrations and its own tables; neither names a table of the other.

use sluice_billing::{Database, DatabaseError, DatabaseOptions, Migrations};

use crate::config::Config;

/// Opens (and where `create` says so, creates) the database and applies the gateway's migrations.
pub async fn open(config: &Config, create: bool) -> Result<Database, DatabaseError> {
    let options = DatabaseOptions {
        connections_max: config.database.connections_max,
        wait_max: std::time::Duration::from_millis(config.database.wait_ms_max),
        create,
    };
    let database = Database::open(&config.database_url(), &options).await?;
    let migrations = Migrations {
        sqlite: sqlx::migrate!("./migrations/sqlite"),
        postgres: sqlx::migrate!("./migrations/postgres"),
        table: "_gateway_migrations",
    };
    database.migrate(migrations).await?;
    Ok(database)
}
