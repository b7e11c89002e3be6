"""Fixtures of the command-line tests."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddpm_fast
from cli_runs import tiny_schedule, tiny_unet


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model."""
    return ddpm_fast.save(tmp_path_factory.mktemp("models") / "tiny", tiny_unet(), tiny_schedule())


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
