"""Stages of `make gpu`: every part names existing scripts, commands and tests."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

run_gpu = importlib.import_module("run_gpu")


@pytest.mark.parametrize("part", run_gpu.PARTS)
def test_stages_run_existing_files_within_the_budget(part, tmp_path) -> None:
    stages = run_gpu.stages(part, tmp_path)
    assert stages[0].command == run_gpu.BUILD.command
    for stage in stages:
        assert 0 < stage.limit_s <= run_gpu.BUDGET_S.get(part, run_gpu.LONG_S)
        scripts = [Path(word) for word in stage.command if word.endswith(".py")]
        assert all((run_gpu.ROOT / script).is_file() for script in scripts), stage.name


def test_a_machine_without_a_gpu_is_reported(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        run_gpu.sys, "argv", ["run_gpu.py", "--out", str(tmp_path), "--part", "base"]
    )
    assert run_gpu.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["facts", "kernels", "overlap"])
def test_the_first_checks_run_on_a_cpu(name) -> None:
    command = [sys.executable, "benchmarks/gpu_first.py", name, "--device", "cpu"]
    done = subprocess.run(command, cwd=run_gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISS" not in done.stdout


def test_a_stage_at_its_limit_says_where_it_was_and_stops_nothing(tmp_path, monkeypatch) -> None:
    hangs = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    stages = [
        run_gpu.Stage("hangs", [sys.executable, "-c", hangs], 2),
        run_gpu.Stage("misses", [sys.executable, "-c", "print('  MISS q_sample'); exit(1)"], 20),
        run_gpu.Stage("passes", [sys.executable, "-c", ""], 20),
    ]
    monkeypatch.setattr(run_gpu, "stages", lambda part, out: stages)
    for name, value in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_name": "a GPU",
    }.items():
        monkeypatch.setattr(run_gpu.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(run_gpu.sys, "argv", ["run_gpu.py", "--out", str(tmp_path)])
    assert run_gpu.main() == 1
    found = json.loads((tmp_path / "first.json").read_text())["stages"]
    assert [row["verdict"] for row in found] == [
        "FAILED: stopped at its limit",
        "FAILED with status 1",
        "ok",
    ]
    assert found[1]["findings"][-1] == "  MISS q_sample"
    log = (tmp_path / "first.log").read_text()
    assert "begun" in log
    assert "KeyboardInterrupt" in log
