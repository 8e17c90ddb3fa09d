//! Waiting for another process, with a limit.

use std::time::Duration;

/// How long a test hopes before it calls something stuck. Generous: a loaded two-core machine is no failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Asks `probe` again and again until it answers `Ok`. Panics with its last refusal when patience ends.
pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let mut refusal = String::from("it was never asked");
    let asking = async {
        loop {
            match probe().await {
                Ok(value) => return value,
                Err(reason) => refusal = reason,
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    };
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {} s; the last answer was: {refusal}", PATIENCE.as_secs()),
    }
}
