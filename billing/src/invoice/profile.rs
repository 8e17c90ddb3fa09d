//! To whom an account's invoices go. Owns the table `billing_profiles`.

use serde::Serialize;
use time::OffsetDateTime;

use super::{document::Party, store::parsed, tax::TaxPlace};
use crate::{Books, args, database::Conn, error::BillingError, event::AccountId, ledger};

/// To whom an account's invoices go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BillingProfile {
    pub party: Party,
    /// Why no tax is charged; None where it is.
    pub tax_exempt: Option<String>,
}

impl Books {
    pub async fn billing_profile(&self, account: &AccountId) -> Result<BillingProfile, BillingError> {
        profile(&mut self.database.read().await?, account).await
    }

    /// Sets to whom invoices go from now on. Those issued keep what they say.
    pub async fn set_billing_profile(
        &self,
        account: &AccountId,
        profile: &BillingProfile,
        now: OffsetDateTime,
    ) -> Result<(), BillingError> {
        let party = serde_json::to_string(&profile.party).expect("a party is plain data");
        let mut tx = self.database.write().await?;
        ledger::balance(&mut tx, account).await?;
        tx.execute(
            "INSERT INTO billing_profiles (account, party, tax_exempt, updated_at_s) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (account) DO UPDATE SET party = excluded.party, tax_exempt = excluded.tax_exempt, \
             updated_at_s = excluded.updated_at_s",
            args![account.as_str(), &party, &profile.tax_exempt, now.unix_timestamp()],
        )
        .await?;
        Ok(tx.commit().await?)
    }
}

impl BillingProfile {
    pub(crate) fn place(&self) -> TaxPlace {
        TaxPlace {
            country: self.party.country.clone(),
            region: self.party.region.clone(),
            exempt: self.tax_exempt.is_some(),
        }
    }
}

/// An account without a profile is billed under its id.
pub(crate) async fn profile(conn: &mut Conn, account: &AccountId) -> Result<BillingProfile, BillingError> {
    let row: Option<(String, Option<String>)> = conn
        .fetch_optional(
            "SELECT party, tax_exempt FROM billing_profiles WHERE account = $1",
            args![account.as_str()],
        )
        .await?;
    match row {
        Some((party, tax_exempt)) => {
            Ok(BillingProfile { party: parsed("billing_profiles", &party)?, tax_exempt })
        }
        None => {
            let party = Party { name: account.to_string(), ..Party::default() };
            Ok(BillingProfile { party, tax_exempt: None })
        }
    }
}
