//! Python clients: the unmodified SDKs, in the virtual environment that `tests/run` makes.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binaries::{output_of, profile_dir, repository};
use crate::cluster::Cluster;

/// What this platform supports, of what FOCUS rules may be conditional on.
const FOCUS_CRITERIA: &str = "ACCOUNT_NAMING_SUPPORTED,USAGE_MEASUREMENT_SUPPORTED,UNIT_PRICING_SUPPORTED,\
    PUBLIC_PRICE_LIST_SUPPORTED,NEGOTIATED_PRICING_SUPPORTED,SUB_ACCOUNT_SUPPORTED,TAGGING_SUPPORTED,\
    BILLING_BASED_ON_PROVISIONED_RESOURCES_SUPPORTED,RESOURCE_TYPE_ASSIGNMENT_SUPPORTED";

/// An InvoiceId is due once a charge is invoiced. The validator cannot see whether it is, and always wants one.
const FOCUS_NOT_DECIDABLE: [&str; 1] = ["InvoiceId-C-005-C"];

/// Runs one file of `tests/sdk` with pytest against a cluster. Every test in it must pass, and none may be skipped.
pub async fn pytest(cluster: &Cluster, file: &str) {
    let path = repository().join("tests/sdk").join(file);
    let mut command = Command::new(python());
    command
        .args(["-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"])
        .arg(&path)
        .env("SLUICE_BASE_URL", &cluster.base_url)
        .env("SLUICE_GRPC_URL", &cluster.grpc_url)
        .env("SLUICE_API_KEY", &cluster.api_key)
        .env("SLUICE_MODEL", &cluster.model)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("OPENAI_API_KEY")
        .env_remove("OPENAI_BASE_URL");
    for (name, value) in &cluster.python_env {
        command.env(name, value);
    }
    let output = output_of(&command).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{stdout}{stderr}");
    assert!(output.status.success(), "{file}: {}", output.status);
    let closing = stdout.lines().last().unwrap_or_default();
    assert!(closing.contains("passed") && !closing.contains("skipped"), "{file}: {closing}");
}

/// `SLUICE_TEST_PYTHON`, else the environment that `tests/run` keeps in the target directory.
pub(crate) fn python() -> PathBuf {
    let path = match std::env::var_os("SLUICE_TEST_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => {
            profile_dir().parent().expect("a profile lies in the target directory").join("venv/bin/python")
        }
    };
    assert!(path.exists(), "{} does not exist: run ./tests/run once, it makes it", path.display());
    path
}

/// Shows a FOCUS 1.2 file to the public validator, with the requirements model that it was published with. Where
/// `tests/run` could not install it, it has said so, and this says it again.
pub async fn focus_validator(file: &Path) {
    let program = match std::env::var_os("SLUICE_TEST_FOCUS_VALIDATOR") {
        Some(program) => PathBuf::from(program),
        None => profile_dir()
            .parent()
            .expect("a profile lies in the target directory")
            .join("venv-focus/bin/focus-validator"),
    };
    if !program.exists() {
        eprintln!("NOT CHECKED by the FOCUS validator, which is not installed: {}", file.display());
        return;
    }
    let mut command = Command::new(&program);
    command
        .args(["--block-download", "--validate-version", "1.2", "--focus-dataset", "CostAndUsage"])
        .args(["--applicability-criteria", FOCUS_CRITERIA])
        .arg("--data-file")
        .arg(file)
        // It looks for its list of currencies where it is run.
        .current_dir(program.with_file_name("../lib/python3.12/site-packages"));
    let output = output_of(&command).await;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("Total: "), "{}: {said}", file.display());
    // It exits with 0 whatever it found.
    let failed: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("\u{274c} ")).collect();
    let failed: Vec<_> = failed.iter().filter_map(|line| line.split(':').next()).collect();
    assert_eq!(failed, FOCUS_NOT_DECIDABLE, "{}: {said}", file.display());
}
