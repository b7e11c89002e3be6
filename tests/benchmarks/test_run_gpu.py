"""Stages of `make gpu`: every part names existing scripts, commands and tests."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

run_gpu = importlib.import_module("run_gpu")


@pytest.mark.parametrize("part", run_gpu.PARTS)
def test_stages_run_existing_files_within_the_budget(part, tmp_path) -> None:
    stages = run_gpu.stages(part, tmp_path)
    assert stages[0] is run_gpu.BUILD
    for stage in stages:
        assert 0 < stage.limit_s <= run_gpu.BUDGET_S
        scripts = [Path(word) for word in stage.command if word.endswith(".py")]
        assert all((run_gpu.ROOT / script).is_file() for script in scripts), stage.name


def test_a_machine_without_a_gpu_is_reported(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        run_gpu.sys, "argv", ["run_gpu.py", "--out", str(tmp_path), "--part", "base"]
    )
    assert run_gpu.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
