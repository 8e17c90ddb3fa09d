//! What can stop an export, by what one would do about it.

use std::path::PathBuf;

use crate::error::BillingError;

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Billing(#[from] BillingError),
    #[error(
        "the database does not answer; run the same command again, and the export goes on where it stopped"
    )]
    Database(#[from] sqlx::Error),
    #[error(
        "{path}: cannot be {action}; check the folder and the space on its disk, then run the same command again"
    )]
    File {
        path: PathBuf,
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: Parquet")]
    Parquet {
        path: PathBuf,
        #[source]
        source: parquet::errors::ParquetError,
    },
    #[error("{path} is not a manifest of this version of Sluice ({problem})")]
    Manifest { path: PathBuf, problem: String },
    #[error("{dir}: another export is writing to this folder; wait for it, or name another with --out")]
    Busy { dir: PathBuf },
    #[error(
        "{field}: the folder holds an export with {existing}, this one has {asked}; name another folder with --out"
    )]
    OtherExport { field: &'static str, existing: String, asked: String },
    #[error("{field}: {problem}")]
    Option { field: &'static str, problem: String },
    #[error(
        "request {request_id} is billed {billed} and derives {derived}: the books do not hold, so they are not exported; \
         run `sluice audit`"
    )]
    NotDerived { request_id: String, billed: String, derived: String },
    #[error("the export stopped: {0}")]
    Stopped(&'static str),
}

impl ExportError {
    pub(crate) fn file(
        path: &std::path::Path,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> ExportError + use<> {
        let path = path.to_owned();
        move |source| ExportError::File { path, action, source }
    }
}
