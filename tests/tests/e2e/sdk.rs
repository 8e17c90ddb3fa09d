//! The clients people have: unmodified SDKs in Python, each a suite of its own under `tests/sdk`.

use sluice_tests::{Cluster, pytest};

async fn run_suite(file: &str) {
    let mut cluster = Cluster::start().await;
    let broke = cluster.customer("broke", None).await;
    cluster.python_env.push(("SLUICE_BROKE_KEY", broke.key));
    pytest(&cluster, file).await;
    cluster.finish().await;
}

#[tokio::test]
async fn openai() {
    run_suite("openai_test.py").await;
}

#[tokio::test]
async fn grpc_through_reflection() {
    run_suite("grpc_test.py").await;
}
