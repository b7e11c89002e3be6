"""The command line as a whole: help, errors, options of all commands, and `info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ddpm_fast
from cli_runs import error_of, run, sample
from ddpm_fast import Sampler
from ddpm_fast.cli import app, main
from ddpm_fast.ops import BACKENDS, unavailable_reason
from ddpm_fast.ops.registry import NOT_LOADED

COMMANDS = [
    ("sample", "--num", "1", "--batch", "1", "--out", "new.npy"),
    ("encode", "--data", "x.npy", "--out", "new.npy"),
    ("decode", "z.npy", "--out", "new.npy"),
    ("interpolate", "x.npy", "x.npy", "--out", "new.npy"),
    ("bpd", "--data", "x.npy", "--out", "new.csv"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_takes_a_variant(tiny: Path, command: tuple[str, ...]) -> None:
    missing = run(*command, "--model", tiny, "--variant", "fp16", "--device", "cpu", status=2)
    assert "weights are missing, variant='fp16'; there are weights" in error_of(missing)


def test_the_stack_trace_of_an_error_of_torch_is_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(
            "CUDA error: an illegal memory access\nCompile with `TORCH_USE_CUDA_DSA`"
        )

    monkeypatch.setattr(Sampler, "sample", fail)
    assert error_of(sample(tiny, status=2)) == "error: CUDA error: an illegal memory access"


def test_debug_raises_the_error(tiny: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "sample", "--model", "nowhere"])
    assert isinstance(result.exception, FileNotFoundError)


def test_info_shows_available_backends_and_reasons() -> None:
    document = json.loads(run("info", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["ddpm_fast"] == ddpm_fast.__version__
    assert document["devices"][0]["device"] == "cpu"
    assert list(document["backends"]) == list(BACKENDS)
    text = run("info").stdout
    for name, state in document["backends"].items():
        for device in state["ready_on"]:
            assert unavailable_reason(name, torch.device(device)) is None
        for device, reason in state["cannot_run_on"].items():
            assert unavailable_reason(name, torch.device(device)) == reason
            assert f"cannot run on {device}: {reason}" in text
        assert state["ready_on"] or state["cannot_run_on"]
    assert "  reference ready on cpu" in text


def test_info_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOT_LOADED, "cpu", "ddpm_fast/_ops_cpu is not built")
    monkeypatch.setitem(sys.modules, "ddpm_fast._C", None)
    monkeypatch.delattr(ddpm_fast, "_C", raising=False)
    text = run("info").stdout
    assert "ddpm_fast/_C is not built; `pip install .`" in text
    assert "cpu       cannot run on cpu: ddpm_fast/_ops_cpu is not built; build it with" in text


SUMMARIES = {
    "sample": "Sample images from a checkpoint.",
    "train": "Train a network (Algorithm 1, Ho et al. 2020), and save it in the layout of"
    " diffusers.",
    "bpd": "Bound the negative log-likelihood of images, in bits per dimension.",
    "bench": "Benchmarks: p20, p50 and p80 of rounds in which all cases take turns.",
}


def test_help_shows_whole_summaries() -> None:
    text = " ".join(run("--help").stdout.split())
    for name, summary in SUMMARIES.items():
        assert f" {name} {summary}" in text
    for command in ("encode", "decode", "interpolate", "noise", "verify", "info"):
        assert f" {command} " in text
        assert command in run(command, "--help").stdout
    commands = run("bench", "--help").stdout.partition("Commands:")[2]
    assert "sampling" in commands
    assert "..." not in commands
    assert run("--version").stdout == f"ddpm_fast {ddpm_fast.__version__}\n"


def test_the_module_runs(tiny: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(ddpm_fast.__file__).parent.parent)}
    command = [sys.executable, "-m", "ddpm_fast", "sample", "--model", str(tiny)]
    done = subprocess.run(
        [*command, "--num", "2", "--batch", "2", "--device", "cpu"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "20/20" in done.stderr
    assert done.stdout.endswith("wrote    out/tiny.png\n")


def test_an_error_ends_the_process_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "sample", "--model", "./nowhere"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: nowhere: no such checkpoint folder\n")
