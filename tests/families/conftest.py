"""Fixtures of tests of families."""

import pytest


@pytest.fixture(scope="session")
def torch():
    """Return the module torch, on one thread; tests are skipped without it."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module
