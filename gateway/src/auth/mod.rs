//! Who is calling: `Authorization: Bearer KEY` -> [`Principal`].
//!
//! Keys are random, shown once, and stored as SHA-256 hashes; what is looked up and compared is the hash, so
//! neither the database nor the time an answer takes tells anything of a key. Answers, "no such key" among
//! them, are kept for [`CACHE_TTL`]: a revocation is in force within that time. While the database does not answer, what it
//! said last is trusted for [`STALE_MAX`]: requests that a lease covers go on.
//!
//! This module alone names the tables `orgs`, `projects` and `api_keys` in SQL.

mod keys;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, header};
use sluice_billing::{Database, args};
use sqlx::FromRow;

pub use keys::{ApiKey, Key, NewKey, Tenancy};

/// How long a look-up is trusted, and so the longest a revoked key still works.
pub const CACHE_TTL: Duration = Duration::from_millis(500);
/// How long the last look-up is trusted while the database does not answer.
pub const STALE_MAX: Duration = Duration::from_secs(300);
/// How long a caller that was seen before waits for a look-up.
const LOOK_UP_WAIT: Duration = Duration::from_secs(1);
/// Look-ups kept; the least recently used leave first.
const CACHE_ENTRIES_MAX: u64 = 100_000;

/// The caller of one request, and who pays for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub key_id: String,
    pub project_id: String,
    pub org_id: String,
    pub account_id: String,
    pub role: Role,
}

/// What a key may do: call models, or administer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    User,
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Admin => "admin",
        }
    }

    fn parse(text: &str) -> Option<Role> {
        match text {
            "user" => Some(Role::User),
            "admin" => Some(Role::Admin),
            _ => None,
        }
    }
}

/// Why a caller is not known.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("no `Authorization: Bearer KEY` header")]
    Missing,
    #[error("the Authorization header is not of the form `Bearer KEY`")]
    Malformed,
    #[error("no such API key: {redacted}")]
    Unknown { redacted: String },
    #[error("this API key was revoked: {redacted}")]
    Revoked { redacted: String },
    #[error("keys cannot be checked at the moment")]
    Unavailable(#[source] Arc<sqlx::Error>),
}

#[derive(Clone)]
enum Known {
    Caller(Arc<Principal>),
    Revoked,
    Nobody,
}

/// What the database said of a key, and when.
#[derive(Clone)]
struct Seen {
    known: Known,
    at: Instant,
}

/// Checks keys against the database, through a short cache.
#[derive(Clone)]
pub struct Auth(Arc<Shared>);

struct Shared {
    database: Database,
    cache: moka::sync::Cache<[u8; 32], Seen>,
    /// The last look-up failed: keys seen before are trusted meanwhile, and one look-up at a time tries again.
    is_down: AtomicBool,
    probing: tokio::sync::Mutex<()>,
}

impl Auth {
    pub fn new(database: Database) -> Auth {
        let cache =
            moka::sync::Cache::builder().max_capacity(CACHE_ENTRIES_MAX).time_to_live(STALE_MAX).build();
        let (is_down, probing) = (AtomicBool::new(false), tokio::sync::Mutex::default());
        Auth(Arc::new(Shared { database, cache, is_down, probing }))
    }

    /// Reads headers only. Cancel safe: a dropped call leaves nothing behind.
    pub async fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Principal>, AuthError> {
        let key = bearer(headers)?;
        match self.known(key.hash()).await.map_err(|error| AuthError::Unavailable(Arc::new(error)))? {
            Known::Caller(principal) => Ok(principal),
            Known::Revoked => Err(AuthError::Revoked { redacted: key.redacted() }),
            Known::Nobody => Err(AuthError::Unknown { redacted: key.redacted() }),
        }
    }

    async fn known(&self, hash: [u8; 32]) -> Result<Known, sqlx::Error> {
        let shared = &self.0;
        let seen = match shared.cache.get(&hash) {
            Some(seen) if seen.at.elapsed() < CACHE_TTL => return Ok(seen.known),
            Some(seen) => seen,
            None => return shared.look_up(hash).await,
        };
        if shared.is_down.load(Ordering::Relaxed) {
            let shared = shared.clone();
            tokio::spawn(async move {
                if let Ok(_probing) = shared.probing.try_lock() {
                    let _ = shared.look_up(hash).await;
                }
            });
            return Ok(seen.known);
        }
        match tokio::time::timeout(LOOK_UP_WAIT, shared.look_up(hash)).await {
            Ok(Ok(known)) => Ok(known),
            Ok(Err(error)) => {
                tracing::warn!(%error, "keys cannot be checked; those seen lately are trusted for now");
                shared.is_down.store(true, Ordering::Relaxed);
                Ok(seen.known)
            }
            Err(_) => {
                tracing::warn!("the database is slow to check keys; those seen lately are trusted for now");
                shared.is_down.store(true, Ordering::Relaxed);
                Ok(seen.known)
            }
        }
    }
}

impl Shared {
    async fn look_up(&self, hash: [u8; 32]) -> Result<Known, sqlx::Error> {
        let row: Option<PrincipalRow> = self
            .database
            .read()
            .await?
            .fetch_optional(
                "SELECT k.id, k.project_id, k.role, k.revoked_s, p.org_id, o.account_id \
                 FROM api_keys k JOIN projects p ON p.id = k.project_id JOIN orgs o ON o.id = p.org_id \
                 WHERE k.hash = $1",
                args![hash.as_slice()],
            )
            .await?;
        let known = row.map_or(Known::Nobody, PrincipalRow::into_known);
        self.cache.insert(hash, Seen { known: known.clone(), at: Instant::now() });
        self.is_down.store(false, Ordering::Relaxed);
        Ok(known)
    }
}

#[derive(FromRow)]
struct PrincipalRow {
    id: String,
    project_id: String,
    role: String,
    revoked_s: Option<i64>,
    org_id: String,
    account_id: String,
}

impl PrincipalRow {
    fn into_known(self) -> Known {
        if self.revoked_s.is_some() {
            return Known::Revoked;
        }
        Known::Caller(Arc::new(Principal {
            key_id: self.id,
            project_id: self.project_id,
            org_id: self.org_id,
            account_id: self.account_id,
            role: Role::parse(&self.role).expect("the table's CHECK admits known roles only"),
        }))
    }
}

fn bearer(headers: &HeaderMap) -> Result<Key, AuthError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(AuthError::Missing)?;
    if values.next().is_some() {
        return Err(AuthError::Malformed);
    }
    let text = value.to_str().map_err(|_| AuthError::Malformed)?;
    let (scheme, key) = text.split_once(' ').ok_or(AuthError::Malformed)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(AuthError::Malformed);
    }
    Key::parse(key.trim()).ok_or(AuthError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(authorization: &[&str], expect: &str) {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(header::AUTHORIZATION, value.parse().expect("a header value"));
        }
        let got = match bearer(&headers) {
            Ok(key) => key.redacted(),
            Err(error) => format!("{error:?}"),
        };
        assert_eq!(got, expect, "for {authorization:?}");
    }

    async fn database(folder: &std::path::Path) -> Database {
        let config = crate::config::Config { data_dir: folder.to_owned(), ..Default::default() };
        crate::store::open(&config, true).await.expect("a database")
    }

    #[test]
    fn reads_one_bearer_key_and_nothing_else() {
        check(&["Bearer sk-sluice-0123456789abcdef"], "sk-sluice-…cdef");
        check(&["bearer   sk-sluice-0123456789abcdef "], "sk-sluice-…cdef");
        check(&["Bearer short"], "…");
        check(&[], "Missing");
        check(&["sk-sluice-0123456789abcdef"], "Malformed");
        check(&["Basic dXNlcjpwYXNz"], "Malformed");
        check(&["Bearer "], "Malformed");
        check(&["Bearer a", "Bearer b"], "Malformed");
    }

    #[tokio::test]
    async fn a_revoked_key_is_refused_after_the_cache_forgets_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let database = database(folder.path()).await;
        let tenancy = Tenancy::new(database.clone());
        tenancy.ensure_org("org-1", "Org", "acct-1").await.expect("an org");
        tenancy.ensure_project("proj-1", "org-1", "Project").await.expect("a project");
        let made = tenancy.create_key("proj-1", "k", Role::User).await.expect("a key");

        let mut headers = HeaderMap::new();
        headers.insert(
            header::AUTHORIZATION,
            format!("Bearer {}", made.secret.reveal()).parse().expect("value"),
        );
        let auth = Auth::new(database);
        let principal = auth.authenticate(&headers).await.expect("the key is known");
        assert_eq!((principal.account_id.as_str(), principal.role), ("acct-1", Role::User));

        assert!(tenancy.revoke_key(&made.key.id).await.expect("revoked").is_some());
        auth.0.cache.invalidate_all();
        assert!(matches!(auth.authenticate(&headers).await, Err(AuthError::Revoked { .. })));

        headers.insert(header::AUTHORIZATION, "Bearer sk-sluice-guessed".parse().expect("value"));
        assert!(matches!(auth.authenticate(&headers).await, Err(AuthError::Unknown { .. })));
    }

    #[tokio::test]
    async fn no_key_is_found_in_the_database_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let database = database(folder.path()).await;
        let tenancy = Tenancy::new(database.clone());
        tenancy.ensure_org("org-1", "Org", "acct-1").await.expect("an org");
        tenancy.ensure_project("proj-1", "org-1", "Project").await.expect("a project");
        let made = tenancy.create_key("proj-1", "k", Role::Admin).await.expect("a key");
        database.close().await.expect("closed");

        let needle = made.secret.reveal().as_bytes();
        for entry in std::fs::read_dir(folder.path()).expect("the folder") {
            let bytes = std::fs::read(entry.expect("an entry").path()).expect("a file");
            assert!(!bytes.windows(needle.len()).any(|window| window == needle));
        }
    }
}
