"""`ddpm-fast train` in processes of its own: its files, killed and resumed, and two at once."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("accelerate", reason="needs accelerate")

import ddpm_fast

pytestmark = pytest.mark.slow

SMALL = (
    *("--data", "triangles-array", "--num", "80", "--network", "tiny", "--batch", "16"),
    *("--epochs", "4", "--warmup", "2", "--device", "cpu", "--no-progress"),
)


def command(out: Path, *more: str, launch: tuple[str, ...] = ("-m", "ddpm_fast")) -> list[str]:
    quiet = () if "--sample-every" in more else ("--sample-every", "0")
    return [sys.executable, *launch, "train", *SMALL, "--out", str(out), *quiet, *more]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DDPM_FAST_CACHE": "off"} | more


def run(*args, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*args, **options), capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def losses(out: Path) -> list[list[str]]:
    """Losses of a history, as text with all digits."""
    with (out / "history.csv").open() as file:
        return [
            [row[n] for n in ("loss", "loss_min", "loss_max", "test_loss")]
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted training."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, "--sample-every", "2", "--sample-steps", "3")
    return out


def test_files_of_a_training(whole):
    found = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert found == [
        "checkpoint/model_index.json",
        "checkpoint/scheduler/scheduler_config.json",
        "checkpoint/unet/config.json",
        "checkpoint/unet/diffusion_pytorch_model.safetensors",
        "history.csv",
        "loss.png",
        "samples/00002.png",
        "samples/00004.png",
        "state.pt",
    ]
    assert len(losses(whole)) == 4
    assert ddpm_fast.load(whole / "checkpoint").sample_shape == (1, 32, 32)
    for name in ("loss.png", "samples/00004.png"):
        with Image.open(whole / name) as image:
            image.load()
            assert min(image.size) > 100


def test_a_killed_training_is_resumed_with_the_same_losses(whole, tmp_path):
    """Killed at arbitrary points by SIGKILL; saved within epochs of four steps."""
    out = tmp_path / "run"
    for attempt in range(6):
        resume = ("--resume",) if (out / "state.pt").exists() else ()
        process = subprocess.Popen(
            command(out, *resume, "--save-steps", "3"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        before = (out / "state.pt").stat().st_mtime_ns if resume else 0
        while process.poll() is None:
            written = (out / "state.pt").exists() and (out / "state.pt").stat().st_mtime_ns > before
            if written and attempt < 3:
                time.sleep(0.05 * attempt)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read().decode()
    assert process.returncode == 0
    assert losses(out) == losses(whole)
    weights = "checkpoint/unet/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    assert not list(out.glob(".*"))


def test_two_processes_have_the_losses_of_one(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    out = tmp_path / "run"
    run(out, launch=(*launch, "-m", "--", "ddpm_fast"))
    for ours, theirs in zip(losses(out), losses(whole), strict=True):
        assert [float(v) for v in ours] == pytest.approx([float(v) for v in theirs], rel=2e-4)
