//! Organisations, projects and keys as they are stored.

use sha2::{Digest, Sha256};
use sqlx::{Row, SqlitePool, sqlite::SqliteRow};
use time::OffsetDateTime;

use super::Role;

const KEY_BYTES_MAX: usize = 256;
const SECRET_BYTES: usize = 24;

/// A key as a client presents it. Its `Debug` shows the redacted form only.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(String);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.redacted())
    }
}

impl Key {
    /// A new random key: 192 bits from the operating system.
    fn generate(role: Role) -> Key {
        let mut secret = [0u8; SECRET_BYTES];
        getrandom::fill(&mut secret).expect("the operating system gives random bytes");
        let kind = match role {
            Role::User => "sluice",
            Role::Admin => "sluice-admin",
        };
        Key(format!("sk-{kind}-{}", hex::encode(secret)))
    }

    /// Any non-empty text of printable ASCII; whether it is a key, the database knows.
    pub(super) fn parse(text: &str) -> Option<Key> {
        let plausible =
            (1..=KEY_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        plausible.then(|| Key(text.to_owned()))
    }

    /// The whole secret, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_bytes()).into()
    }

    /// Enough to tell keys apart, too little to use one: the known prefix and the last four characters.
    pub fn redacted(&self) -> String {
        let prefix =
            ["sk-sluice-admin-", "sk-sluice-"].into_iter().find(|p| self.0.starts_with(p)).unwrap_or("");
        let secret = &self.0[prefix.len()..];
        let shown = if secret.len() >= 12 { &secret[secret.len() - 4..] } else { "" };
        format!("{prefix}…{shown}")
    }
}

/// A stored key: everything but the secret.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ApiKey {
    pub id: String,
    pub name: String,
    pub role: &'static str,
    pub project_id: String,
    pub org_id: String,
    pub redacted: String,
    pub created_s: i64,
    pub revoked_s: Option<i64>,
}

/// A key just made; `secret` is not to be had again.
#[derive(Debug)]
pub struct NewKey {
    pub key: ApiKey,
    pub secret: Key,
}

/// Creates, lists and revokes.
#[derive(Clone)]
pub struct Tenancy {
    database: SqlitePool,
}

impl Tenancy {
    pub fn new(database: SqlitePool) -> Tenancy {
        Tenancy { database }
    }

    /// Creates the organisation unless it exists.
    pub async fn ensure_org(&self, id: &str, name: &str, account_id: &str) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO orgs (id, name, account_id, created_s) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        )
        .bind(id)
        .bind(name)
        .bind(account_id)
        .bind(now_s())
        .execute(&self.database)
        .await
        .map(drop)
    }

    /// Creates the project unless it exists.
    pub async fn ensure_project(&self, id: &str, org_id: &str, name: &str) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO projects (id, org_id, name, created_s) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        )
        .bind(id)
        .bind(org_id)
        .bind(name)
        .bind(now_s())
        .execute(&self.database)
        .await
        .map(drop)
    }

    /// The account that pays for a project; `None` where there is no such project.
    pub async fn account_of_project(&self, project_id: &str) -> Result<Option<String>, sqlx::Error> {
        sqlx::query_scalar(
            "SELECT o.account_id FROM projects p JOIN orgs o ON o.id = p.org_id WHERE p.id = ?",
        )
        .bind(project_id)
        .fetch_optional(&self.database)
        .await
    }

    /// `RowNotFound` where the project does not exist.
    pub async fn create_key(&self, project_id: &str, name: &str, role: Role) -> Result<NewKey, sqlx::Error> {
        let secret = Key::generate(role);
        let id = format!("key-{}", uuid::Uuid::now_v7().simple());
        let row = sqlx::query(
            "INSERT INTO api_keys (id, project_id, name, role, hash, redacted, created_s)
             SELECT ?, id, ?, ?, ?, ?, ? FROM projects WHERE id = ?
             RETURNING *, (SELECT org_id FROM projects WHERE id = project_id) AS org_id",
        )
        .bind(&id)
        .bind(name)
        .bind(role.as_str())
        .bind(secret.hash().as_slice())
        .bind(secret.redacted())
        .bind(now_s())
        .bind(project_id)
        .fetch_one(&self.database)
        .await?;
        Ok(NewKey { key: api_key(&row)?, secret })
    }

    /// Newest first, revoked ones among them.
    pub async fn keys(&self) -> Result<Vec<ApiKey>, sqlx::Error> {
        sqlx::query(
            "SELECT k.*, p.org_id FROM api_keys k JOIN projects p ON p.id = k.project_id ORDER BY k.id DESC",
        )
        .fetch_all(&self.database)
        .await?
        .iter()
        .map(api_key)
        .collect()
    }

    /// Revokes by id; a second time changes nothing. `None` where there is no such key.
    pub async fn revoke_key(&self, id: &str) -> Result<Option<ApiKey>, sqlx::Error> {
        let row = sqlx::query(
            "UPDATE api_keys SET revoked_s = coalesce(revoked_s, ?) WHERE id = ?
             RETURNING *, (SELECT org_id FROM projects WHERE id = project_id) AS org_id",
        )
        .bind(now_s())
        .bind(id)
        .fetch_optional(&self.database)
        .await?;
        row.as_ref().map(api_key).transpose()
    }
}

fn api_key(row: &SqliteRow) -> Result<ApiKey, sqlx::Error> {
    let role = Role::parse(row.try_get("role")?).expect("the table's CHECK admits known roles only");
    Ok(ApiKey {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        role: role.as_str(),
        project_id: row.try_get("project_id")?,
        org_id: row.try_get("org_id")?,
        redacted: row.try_get("redacted")?,
        created_s: row.try_get("created_s")?,
        revoked_s: row.try_get("revoked_s")?,
    })
}

fn now_s() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}
