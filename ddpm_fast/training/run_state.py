"""The folder of a training: state.pt, what must agree to resume from it, and clean-up."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.utils.files import atomic_write

STATE, HISTORY, CHECKPOINT, LOSS_CURVE = "state.pt", "history.csv", "checkpoint", "loss.png"
FORMAT = 1
KEYS = {"options", "identity", "epoch", "step", "history", "losses", "seconds"}
KEYS |= {"network", "average", "optimizer", "scaler"}
_MAY_CHANGE = ("epochs", "compile")  # options that a resumed training may change


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors, numbers, text, lists and dictionaries of them; atomic.

    Raises:
        OSError: The file cannot be written; it is then unchanged.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, to the CPU. No code in the file is executed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or not a training state.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no training state to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path}: is no whole training state ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise ValueError(f"{path}: is no training state of this release")
    return state


def identity(network: Any, data: Any, schedule: NoiseSchedule) -> dict[str, Any]:
    """Describe network, schedule and data set; a resumed training must have the same."""
    digest = hashlib.sha256(schedule.betas.numpy().tobytes()).hexdigest()[:16]
    return {
        "network": {"class": type(network).__name__, **network.config.to_dict()},
        "schedule": {"name": schedule.name, "T": schedule.T, "digest": digest},
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint[:16]},
    }


def check_resumable(
    out: Path, state: Mapping[str, Any], own_identity: dict[str, Any], options: TrainOptions
) -> None:
    """Check that a state is of the same network, schedule, data set and options.

    Raises:
        ValueError: They differ; the message names up to four differences.
    """
    before = {k: v for k, v in state["options"].items() if k not in _MAY_CHANGE}
    now = {k: v for k, v in options.to_dict().items() if k not in _MAY_CHANGE}
    changed = _differences(state["identity"] | before, own_identity | now)
    if changed:
        raise ValueError(
            f"resume: {out} was started with other options: {'; '.join(changed[:4])}"
            + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the differences of two descriptions, such as `batch: 64, now 128`."""
    found: list[str] = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {_text(old)}, now {_text(new)}")
    return found


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def split_data(data: Any, options: TrainOptions) -> tuple[Any, Any]:
    """Return the training images and the held-out images, which are None for a test_share of 0.

    Raises:
        ValueError: `test_share` leaves no image for one of them.
    """
    if options.test_share == 0:
        return data, None
    held_out = round(options.test_share * len(data))
    if not 0 < held_out < len(data):
        raise ValueError(
            f"test_share must leave an image to either part, or be 0; {options.test_share:g} of"
            f" {len(data)} images is {held_out}"
        )
    train, test = data.split(options.test_share, options.seed)
    return train, test


def check_compatible(network: Any, data: Any, options: TrainOptions) -> None:
    """Check that the images and their labels match the network.

    Raises:
        TypeError: `network` is not a UNet or ThesisUNet.
        ValueError: Shapes, dtype, output channels or labels do not match.
    """
    if not hasattr(network, "config"):
        raise TypeError(f"network must be a UNet or ThesisUNet; got {type(network).__name__}")
    if (dtype := next(network.parameters()).dtype) != torch.float32:
        raise ValueError(f"network must have weights of float32, see precision; got {dtype}")
    config, (channels, *_) = network.config, data.sample_shape
    if tuple(data.sample_shape) != config.sample_shape:
        raise ValueError(
            f"data: images are {list(data.sample_shape)}, those of the network"
            f" {list(config.sample_shape or ())}"
        )
    expected = 2 * channels if options.learned else channels
    out = getattr(config, "out_channels", channels)
    if out != expected:
        raise ValueError(
            f"network must have {expected} output channels for variance {options.variance!r};"
            f" it has {out}"
        )
    classes, labels = network.config.num_classes, data.num_classes
    if (classes is None) != (labels is None):
        takes = "takes none" if classes is None else f"takes {classes} labels"
        has = "have none" if labels is None else f"have {labels} labels"
        raise ValueError(f"network {takes}, and the images {has}")
    if labels is None and options.label_dropout:
        raise ValueError(f"label_dropout needs labels, and {data.name} has none")
    if classes is not None and classes != labels + bool(options.label_dropout):
        raise ValueError(
            f"network must take {labels + bool(options.label_dropout)} labels: the images have"
            f" {labels} classes"
            + (", and one is for none" if options.label_dropout else "")
            + f"; it takes {classes}"
        )


def remove_unfinished(out: Path) -> None:
    """Remove files that a process left when it was killed while writing."""
    if not (out / CHECKPOINT).exists():
        # Killed between two renames, on a file system that cannot swap two names.
        for path in sorted(out.glob(f".{CHECKPOINT}.*.old"))[:1]:
            path.rename(out / CHECKPOINT)
    unfinished = (".ddpm_fast.*.tmp", "samples/.ddpm_fast.*.tmp", f".{CHECKPOINT}.*")
    for path in (path for names in unfinished for path in out.glob(names)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
