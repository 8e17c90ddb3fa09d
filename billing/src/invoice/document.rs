//! An invoice as it was issued: immutable, complete in itself, the source of its JSON, CSV and PDF.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::{
    line::{InvoiceLine, LineKind},
    period::Period,
};
use crate::{event::AccountId, money::Total};

/// What the paper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvoiceKind {
    /// Asks a postpaid account for money.
    Invoice,
    /// Tells a prepaid account what its credit paid for; nothing is due.
    Statement,
}

/// Who issues an invoice, or is billed by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Party {
    pub name: String,
    /// Lines of the postal address, without the country.
    pub address: Vec<String>,
    /// ISO 3166-1, two capital letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub country: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tax_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

/// One invoice. What came after it (payments, credit notes) is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Invoice {
    pub number: String,
    pub kind: InvoiceKind,
    pub account: AccountId,
    pub period: Period,
    pub currency: &'static str,
    #[serde(with = "time::serde::timestamp")]
    pub issued_at: OffsetDateTime,
    #[serde(with = "time::serde::timestamp")]
    pub due_at: OffsetDateTime,
    pub issuer: Party,
    pub customer: Party,
    /// Why no tax is charged, where that has a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tax_note: Option<String>,
    pub lines: Vec<InvoiceLine>,
}

/// The sums of an invoice, in whole cents. charged + credit + tax = due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct InvoiceTotals {
    /// Usage, late usage and adjustments.
    pub charged: Total,
    /// What grants paid; negative.
    pub credit: Total,
    pub tax: Total,
    pub due: Total,
}

impl Invoice {
    pub fn totals(&self) -> InvoiceTotals {
        let sum = |of: fn(LineKind) -> bool| -> Total {
            self.lines.iter().filter(|line| of(line.kind)).map(|line| line.amount).sum()
        };
        InvoiceTotals {
            charged: sum(|kind| !matches!(kind, LineKind::Credit | LineKind::Tax)),
            credit: sum(|kind| kind == LineKind::Credit),
            tax: sum(|kind| kind == LineKind::Tax),
            due: sum(|_| true),
        }
    }

    /// SHA-256 over everything that the invoice says. Stored when its month is closed; the audit compares it.
    pub fn digest(&self) -> String {
        let json = serde_json::to_vec(self).expect("an invoice is plain data");
        hex::encode(Sha256::digest(json))
    }

    /// The rows of the CSV: one a line of the invoice, amounts that sum to what is due.
    pub fn to_csv(&self) -> String {
        let mut text = String::from(
            "invoice,position,kind,period,project,model,sku,description,quantity,unit,exact_amount,\
             tax_category,tax_rate,amount,currency\r\n",
        );
        for line in &self.lines {
            let fields = [
                self.number.clone(),
                line.position.to_string(),
                line.kind.to_string(),
                line.period.to_string(),
                line.project.clone(),
                line.model.clone(),
                line.sku.clone(),
                line.description.clone(),
                line.quantity.to_string(),
                line.unit.clone(),
                line.exact.to_usd_string(),
                line.tax_category.clone(),
                line.tax_rate.map_or(String::new(), |rate| rate.to_string()),
                line.amount.to_usd_string(),
                self.currency.to_owned(),
            ];
            text += &fields.map(|field| csv_field(&field)).join(",");
            text += "\r\n";
        }
        text
    }
}

/// RFC 4180: quoted where it must be.
fn csv_field(text: &str) -> String {
    match text.contains(['"', ',', '\r', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

impl InvoiceKind {
    pub fn as_str(self) -> &'static str {
        match self {
            InvoiceKind::Invoice => "invoice",
            InvoiceKind::Statement => "statement",
        }
    }
}

/// An invoice of every kind of line, for tests.
#[cfg(test)]
pub(crate) fn example() -> Invoice {
    use time::macros::datetime;

    use super::{
        line::{Charge, draw},
        tax::TaxPlace,
    };
    use crate::money::Money;

    let charge = |kind, period: &str, project: &str, sku: &str, quantity, exact| Charge {
        kind,
        period: period.parse().expect("a month"),
        project: project.into(),
        model: "m".into(),
        sku: sku.into(),
        unit: "token".into(),
        quantity,
        exact: Money::from_pico(exact),
    };
    let charges = vec![
        charge(LineKind::Usage, "2026-10", "Köln, \"Büro\"", "m.input", 1_000_000, 33_333_333_333_333),
        charge(LineKind::Usage, "2026-10", "Ψυχή", "m.output", 2_000, 33_333_333_333_333),
        charge(LineKind::LateUsage, "2026-09", "Ψυχή", "m.output", 7, 1_000_000_000),
        charge(LineKind::Adjustment, "2026-10", "", "m.input", 1_000_000, -5_000_000_000_000),
    ];
    let rules =
        toml::from_str("rate = [{ name = \"VAT\", country = \"DE\", rate = \"0.19\" }]").expect("rules");
    let place = TaxPlace { country: Some("DE".into()), ..TaxPlace::default() };
    let period: Period = "2026-10".parse().expect("a month");
    let due = Money::from_pico(40_000_000_000_000);
    Invoice {
        number: "INV-000007".into(),
        kind: InvoiceKind::Invoice,
        account: AccountId::new("acme"),
        period,
        currency: "USD",
        issued_at: datetime!(2026-11-01 6:00 UTC),
        due_at: datetime!(2026-12-01 6:00 UTC),
        issuer: Party {
            name: "Sluice Łódź sp. z o.o.".into(),
            address: vec!["ul. Piotrkowska 1".into(), "90-001 Łódź".into()],
            country: Some("PL".into()),
            tax_id: Some("PL1234567890".into()),
            ..Party::default()
        },
        customer: Party {
            name: "ООО «Ромашка»".into(),
            address: vec!["Tràn Hưng Đạo 5".into()],
            country: Some("DE".into()),
            ..Party::default()
        },
        tax_note: None,
        lines: draw(period, charges, due, &place, &rules).expect("lines"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::Money;

    #[test]
    fn csv_amounts_sum_to_what_is_due() {
        let invoice = example();
        let csv = invoice.to_csv();
        let rows: Vec<&str> = csv.split("\r\n").filter(|row| !row.is_empty()).collect();
        assert_eq!(rows.len(), invoice.lines.len() + 1);
        assert!(
            csv.contains(
                "INV-000007,1,usage,2026-10,\"Köln, \"\"Büro\"\"\",m,m.input,m.input,1000000,token,"
            )
        );
        let sum: Total = rows[1..]
            .iter()
            .map(|row| row.rsplit(',').nth(1).expect("an amount").parse::<Money>().expect("dollars"))
            .sum();
        assert_eq!(sum, invoice.totals().due);
        assert_eq!(sum.pico(), 47_600_000_000_000);
    }

    #[test]
    fn the_digest_covers_everything_that_is_said() {
        let changes: [fn(&mut Invoice); 6] = [
            |invoice| invoice.number.push('0'),
            |invoice| invoice.customer.address.clear(),
            |invoice| invoice.due_at += time::Duration::DAY,
            |invoice| invoice.lines[0].project.clear(),
            |invoice| invoice.lines[0].amount = Money::ZERO,
            |invoice| drop(invoice.lines.pop()),
        ];
        for change in changes {
            let mut changed = example();
            change(&mut changed);
            assert_ne!(changed.digest(), example().digest());
        }
        assert_eq!(example().digest(), example().digest());
    }
}
