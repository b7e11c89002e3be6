"""``ddpm-fast sample`` with the network as a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ddpm_fast
from cli_runs import run
from ddpm_fast import NoiseSchedule
from engine_cases import small


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    unet = small(in_channels=1, out_channels=1, sample_size=8)
    return ddpm_fast.save(tmp_path / "model", unet, NoiseSchedule.linear(1200, 1e-4, 0.01))


def drawn(folder: Path, *options: str) -> tuple[np.ndarray, dict[str, str]]:
    args = ("--num", 3, "--batch", 2, "--steps", 4, "--device", "cpu", "--no-progress")
    result = run("sample", "--model", folder, *args, "--out", "a.npy", *options)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    return np.load("a.npy"), lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_draws_the_same_images_and_says_what_ran(folder: Path, dtype: str) -> None:
    """A chain of more than 1000 steps, too: its timesteps are those of the engine."""
    images, lines = drawn(folder, "--dtype", dtype)
    names = ["module", "engine float32"] + (["engine bfloat16"] if dtype == "bfloat16" else [])
    shape, chosen = lines["engine"].split(": ")
    assert shape == "2x1x8x8"
    assert chosen.startswith(tuple(names))
    assert all(f"{name} " in chosen for name in names)
    plain, others = drawn(folder, "--no-engine")
    assert "engine" not in others
    assert np.abs(images - plain).max() < (1e-3 if dtype == "float32" else 1)
