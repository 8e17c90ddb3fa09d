//! Organisations, projects and keys as they are stored.

use sha2::{Digest, Sha256};
use sluice_billing::{BudgetScope, Conn, Database, args};
use sqlx::FromRow;
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
    database: Database,
}

impl Tenancy {
    pub fn new(database: Database) -> Tenancy {
        Tenancy { database }
    }

    /// Creates the organisation unless it exists.
    pub async fn ensure_org(&self, id: &str, name: &str, account_id: &str) -> Result<(), sqlx::Error> {
        self.conn()
            .await?
            .execute(
                "INSERT INTO orgs (id, name, account_id, created_s) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO NOTHING",
                args![id, name, account_id, now_s()],
            )
            .await
            .map(drop)
    }

    /// Creates the project unless it exists.
    pub async fn ensure_project(&self, id: &str, org_id: &str, name: &str) -> Result<(), sqlx::Error> {
        self.conn()
            .await?
            .execute(
                "INSERT INTO projects (id, org_id, name, created_s) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (id) DO NOTHING",
                args![id, org_id, name, now_s()],
            )
            .await
            .map(drop)
    }

    /// The account that pays for a project; `None` where there is no such project.
    pub async fn account_of_project(&self, project_id: &str) -> Result<Option<String>, sqlx::Error> {
        let account: Option<(String,)> = self
            .conn()
            .await?
            .fetch_optional(
                "SELECT o.account_id FROM projects p JOIN orgs o ON o.id = p.org_id WHERE p.id = $1",
                args![project_id],
            )
            .await?;
        Ok(account.map(|(account,)| account))
    }

    /// The organisation that a scope of spending belongs to; `None` where there is no such scope.
    pub async fn org_of(&self, scope: BudgetScope, id: &str) -> Result<Option<String>, sqlx::Error> {
        let statement = match scope {
            BudgetScope::Org => "SELECT id FROM orgs WHERE id = $1",
            BudgetScope::Project => "SELECT org_id FROM projects WHERE id = $1",
            BudgetScope::Key => {
                "SELECT p.org_id FROM api_keys k JOIN projects p ON p.id = k.project_id WHERE k.id = $1"
            }
        };
        let org: Option<(String,)> = self.conn().await?.fetch_optional(statement, args![id]).await?;
        Ok(org.map(|(org,)| org))
    }

    /// `RowNotFound` where the project does not exist.
    pub async fn create_key(&self, project_id: &str, name: &str, role: Role) -> Result<NewKey, sqlx::Error> {
        let secret = Key::generate(role);
        let id = format!("key-{}", uuid::Uuid::now_v7().simple());
        let row: KeyRow = self
            .conn()
            .await?
            .fetch_one(
                "INSERT INTO api_keys (id, project_id, name, role, hash, redacted, created_s) \
                 SELECT $1, id, $2, $3, $4, $5, $6 FROM projects WHERE id = $7 \
                 RETURNING id, name, role, project_id, (SELECT org_id FROM projects WHERE projects.id = project_id) \
                 AS org_id, redacted, created_s, revoked_s",
                args![
                    &id,
                    name,
                    role.as_str(),
                    secret.hash().as_slice(),
                    &secret.redacted(),
                    now_s(),
                    project_id
                ],
            )
            .await?;
        Ok(NewKey { key: row.into_key(), secret })
    }

    /// Newest first, revoked ones among them.
    pub async fn keys(&self) -> Result<Vec<ApiKey>, sqlx::Error> {
        let rows: Vec<KeyRow> = self
            .conn()
            .await?
            .fetch_all(
                "SELECT k.id, k.name, k.role, k.project_id, p.org_id, k.redacted, k.created_s, k.revoked_s \
                 FROM api_keys k JOIN projects p ON p.id = k.project_id ORDER BY k.id DESC",
                args![],
            )
            .await?;
        Ok(rows.into_iter().map(KeyRow::into_key).collect())
    }

    /// Revokes by id; a second time changes nothing. `None` where there is no such key.
    pub async fn revoke_key(&self, id: &str) -> Result<Option<ApiKey>, sqlx::Error> {
        let row: Option<KeyRow> = self
            .conn()
            .await?
            .fetch_optional(
                "UPDATE api_keys SET revoked_s = coalesce(revoked_s, $1) WHERE id = $2 \
                 RETURNING id, name, role, project_id, (SELECT org_id FROM projects WHERE projects.id = project_id) \
                 AS org_id, redacted, created_s, revoked_s",
                args![now_s(), id],
            )
            .await?;
        Ok(row.map(KeyRow::into_key))
    }

    async fn conn(&self) -> Result<Conn, sqlx::Error> {
        self.database.read().await
    }
}

#[derive(FromRow)]
struct KeyRow {
    id: String,
    name: String,
    role: String,
    project_id: String,
    org_id: String,
    redacted: String,
    created_s: i64,
    revoked_s: Option<i64>,
}

impl KeyRow {
    fn into_key(self) -> ApiKey {
        let role = Role::parse(&self.role).expect("the table's CHECK admits known roles only");
        ApiKey {
            id: self.id,
            name: self.name,
            role: role.as_str(),
            project_id: self.project_id,
            org_id: self.org_id,
            redacted: self.redacted,
            created_s: self.created_s,
            revoked_s: self.revoked_s,
        }
    }
}

fn now_s() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}
