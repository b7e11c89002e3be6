"""Fixture of diffusers, with which networks and checkpoints are compared."""

import pytest


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers")
