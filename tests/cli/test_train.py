"""`ddpm-fast train`: options, files and errors."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate", reason="needs accelerate")

import ddpm_fast
from cli_runs import error_of, run
from ddpm_fast.training.trainer import Trainer

QUICK = ("--network", "tiny", "--batch", "8", "--warmup", "1", "--device", "cpu", "--no-progress")


@pytest.fixture(autouse=True)
def _without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_FAST_CACHE", "off")


def photos(*sizes: tuple[int, int], folder: str = "photos") -> None:
    """Write colour images of these sizes, alternately to two sub-folders."""
    random = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        parent = Path(folder) / "ab"[i % 2]
        parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(parent / f"{i}.png")


def train(*more: object, status: int = 0):
    base = ("--epochs", 1, "--sample-every", 0, "--out", "run", *QUICK, *more)
    return run("train", *base, status=status)


def error_for(*more: object) -> str:
    return error_of(train(*more, status=2))


def test_a_folder_with_labels(tmp_path: Path) -> None:
    photos(*[(20, 16)] * 20)
    result = train(
        *("--data", "./photos", "--labels", "--label-dropout", 0.5, "--resize", 16, "--crop"),
        *("--flip", "--sample-every", 1, "--sample-steps", 2, "--tensorboard"),
    )
    assert "photos, 20 images of [3, 16, 16]" in result.output
    found = ddpm_fast.load("run/checkpoint")
    assert found.unet.config.num_classes == 3
    assert Path("run/samples/00001.png").is_file()
    assert list(Path("run/tensorboard").iterdir())
    message = error_for("--data", "./photos", "--labels", "--label-dropout", 0.5, "--resume")
    assert "network.sample_size: 16, now [16, 20]" in message
    assert "data.fingerprint" in message


def test_missing_sheets_and_metrics_are_written_when_resumed() -> None:
    """As if the process had been killed after it saved its state."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base = ("--data", "triangles-array", "--num", 20, "--tensorboard", "--sample-steps", 2)
    train(*base, "--epochs", 2, "--sample-every", 1, "--decay", "none")
    last = Path("run/samples/00002.png")
    before = last.read_bytes()
    last.unlink()
    for file in Path("run/tensorboard").iterdir():
        file.unlink()
    train(*base, "--epochs", 3, "--sample-every", 1, "--decay", "none", "--resume")
    assert last.read_bytes() == before
    assert Path("run/samples/00003.png").is_file()
    train(*base, "--epochs", 4, "--sample-every", 1, "--decay", "none", "--resume")
    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 6, 8]  # two steps an epoch
    shutil.rmtree("run/tensorboard")
    train(*base, "--epochs", 4, "--sample-every", 1, "--decay", "none", "--resume")
    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]


def test_a_sheet_has_the_weights_of_its_epoch() -> None:
    """It replaces a sheet of an earlier training, and is not drawn within the next epoch."""
    base = ("--data", "triangles-array", "--num", 20, "--decay", "none", "--sample-steps", 2)
    sheet = Path("run/samples/00001.png")
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(b"earlier training")
    train(*base, "--sample-every", 1)
    first = sheet.read_bytes()
    assert first.startswith(b"\x89PNG")
    # With two steps an epoch, the last saved step is the third.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_held_out", failing_after(1, Trainer._held_out))
        train(*base, "--epochs", 2, "--save-steps", 1, "--resume", status=2)
    sheet.unlink()
    train(*base, "--epochs", 2, "--sample-every", 1, "--resume")
    assert not sheet.exists()
    assert Path("run/samples/00002.png").is_file()


def failing_after(
    epoch: int, test_loss: Callable[..., float | None]
) -> Callable[..., float | None]:
    """A pass over the test images that fails after an epoch."""

    def found(trainer: Trainer) -> float | None:
        if trainer.epoch == epoch:
            raise RuntimeError("out of memory")
        return test_loss(trainer)

    return found


@pytest.mark.parametrize(
    ("package", "more"),
    [
        ("torch.utils.tensorboard", ("--tensorboard",)),
        ("accelerate", ()),
        ("sklearn.datasets", ("--data", "digits")),
        ("torchvision.transforms", ("--data", "./photos")),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, more: tuple[str, ...]
) -> None:
    photos(*[(8, 8)] * 4)
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    base = ("--data", "triangles-array", "--num", 20)
    assert "pip install" in error_for(*base, *more)
    assert not Path("run").exists()


def test_without_matplotlib_one_note_replaces_the_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    base = ("--data", "triangles-array", "--num", 20, "--epochs", 3, "--sample-every", 1)
    result = train(*base, "--sample-steps", 2)
    assert result.stderr.count("note: no loss.png") == 1
    assert Path("run/samples/00003.png").is_file()
    assert not Path("run/loss.png").exists()


def test_options_of_the_command_are_those_of_the_trainer() -> None:
    base = ("--data", "triangles-array", "--num", 20)
    train(*base, "--betas", 0.8, 0.95, "--epochs", 2, "--save-steps", 1)
    message = error_for(*base, "--epochs", 2, "--resume")
    assert "betas: [0.8, 0.95], now [0.9, 0.999]" in message


def test_another_network_or_data_set_is_rejected() -> None:
    base = ("--data", "triangles-array", "--num", 20)
    train(*base)
    before = Path("run/state.pt").read_bytes()
    for more, text in (
        (("--network", "small"), "network.block_out_channels"),
        (("--data", "triangles"), "data.name: 'triangles-array', now 'triangles'"),
        (("--seed", 3), "seed: 0, now 3"),
        (("--schedule", "cosine"), "schedule.name: 'linear', now 'cosine'"),
    ):
        assert text in error_for(*base, *more, "--resume")
    assert "holds a training (state.pt); resume it" in error_for(*base)
    assert Path("run/state.pt").read_bytes() == before


def test_a_checkpoint_is_trained_further() -> None:
    photos(*[(8, 8)] * 20)
    train("--data", "./photos")
    train("--data", "./photos", "--network", "run/checkpoint", "--out", "more")
    first, second = (ddpm_fast.load(f"{name}/checkpoint").unet for name in ("run", "more"))
    assert first.config == second.config
    near = (first.conv_in.weight - second.conv_in.weight).detach().abs().max()
    assert 0 < float(near) < 0.01


def test_unusable_data_is_named() -> None:
    Path("empty").mkdir()
    assert "empty must contain images" in error_for("--data", "./empty")
    assert "must be a folder or one of" in error_for("--data", "nosuch")
    photos(*[(16, 16)] * 11, (20, 16))
    assert "--resize" in error_for("--data", "./photos")
    Path("photos/a/broken.png").write_bytes(b"no image")
    assert "broken.png" in error_for("--data", "./photos", "--resize", 16)
    assert not Path("run").exists()
    train("--data", "./photos", "--resize", 16, "--skip-broken")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--precision", "fp8"), "precision must be one of"),
        (("--lr", "-1"), "lr must be"),
        (("--schedule", "steep"), "--schedule"),
        (("--network", "nosuch"), "nosuch"),
        (("--objective", "hybrid"), "objective 'hybrid' needs variance"),
        (("--labels", "--data", "triangles-array"), "labels must not be set for triangles-array"),
        (("--network", "thesis", "--variance", "learned"), "thesis"),
        (("--out", "/proc/nowhere/run"), "/proc/nowhere/run"),
        (("--device", "cuda:7"), "device must be cpu"),
        (("--resume",), "no training state to resume from"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_invalid_options_are_named(more: tuple[str, ...], text: str) -> None:
    base = ("--data", "triangles-array", "--num", 16)
    assert text in error_for(*base, *more)
    assert not Path("run").exists()
