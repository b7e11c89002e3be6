"""The library that networks and checkpoints are compared with."""

import pytest


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers")
