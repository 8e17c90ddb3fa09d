//! The first tenant: an organisation, a project, a funded account and two keys, made once.
//!
//! Every step is "make it unless it is there", so a start that was cut short is finished by the next one.

use std::{fs, io::Write, path::Path};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sluice_billing::{AccountId, AccountKind, Billing, CreditGrant, Database, Money};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::auth::{Role, Tenancy};

pub const DEFAULT_ORG: &str = "org-default";
pub const DEFAULT_PROJECT: &str = "proj-default";
pub const DEFAULT_ACCOUNT: &str = "acct-default";

/// Prepaid credit of the first account.
const FIRST_CREDIT_USD: &str = "10.00";
/// The grant's id is fixed, so that it is posted once however often the platform starts.
const FIRST_CREDIT_ID: Uuid = Uuid::from_u128(1);

/// The first keys. The database has only their hashes; this file is how the next start prints them again.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    pub api_key: String,
    pub admin_key: String,
}

/// Makes what is missing, and returns the keys to print.
pub async fn ensure(
    database: &Database,
    billing: &Billing,
    credentials_path: &Path,
) -> anyhow::Result<Credentials> {
    let account = AccountId::new(DEFAULT_ACCOUNT);
    billing.create_account(&account, AccountKind::Prepaid).await?;
    let first_credit = CreditGrant {
        id: FIRST_CREDIT_ID,
        account,
        amount: Money::from_usd_str(FIRST_CREDIT_USD)?,
        memo: "credit of a new account".to_owned(),
        granted_at: OffsetDateTime::now_utc(),
    };
    billing.credit(&first_credit).await?;

    let tenancy = Tenancy::new(database.clone());
    tenancy.ensure_org(DEFAULT_ORG, "Default", DEFAULT_ACCOUNT).await?;
    tenancy.ensure_project(DEFAULT_PROJECT, DEFAULT_ORG, "Default").await?;

    match fs::read(credentials_path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is damaged: delete it, and the next start makes new keys", credentials_path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let api_key = tenancy.create_key(DEFAULT_PROJECT, "first key", Role::User).await?;
            let admin_key = tenancy.create_key(DEFAULT_PROJECT, "first admin key", Role::Admin).await?;
            let credentials = Credentials {
                api_key: api_key.secret.reveal().to_owned(),
                admin_key: admin_key.secret.reveal().to_owned(),
            };
            write_private(credentials_path, &serde_json::to_vec_pretty(&credentials)?)?;
            Ok(credentials)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", credentials_path.display())),
    }
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let partial = path.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let mut file = fs::File::options().create_new(true).write(true).mode(0o600).open(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(fs::rename(&partial, path)?)
}
