"""What the cluster under test told the harness, as fixtures. Run by `cargo test`, see tests/src/python.rs."""

import os

import pytest


def setting(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is not set: these suites are run by `./tests/run sdk`", returncode=3)
    return value


@pytest.fixture(scope="session")
def base_url() -> str:
    return setting("SLUICE_BASE_URL")


@pytest.fixture(scope="session")
def grpc_target() -> str:
    return setting("SLUICE_GRPC_URL").split("://")[-1].rstrip("/")


@pytest.fixture(scope="session")
def api_key() -> str:
    return setting("SLUICE_API_KEY")


@pytest.fixture(scope="session")
def broke_key() -> str:
    """A key of an account that has no credit."""
    return setting("SLUICE_BROKE_KEY")


@pytest.fixture(scope="session")
def model() -> str:
    return setting("SLUICE_MODEL")
