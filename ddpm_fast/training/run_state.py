"""A training run on disk, to be gone on with: one file, replaced as a whole."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.utils.files import atomic_write

FORMAT = 1
KEYS = {"options", "identity", "epoch", "step", "history", "losses", "seconds"}
KEYS |= {"network", "average", "optimizer", "scaler"}


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors, numbers, text, lists and dictionaries of them.

    A process that is killed at any point leaves the file before or the file after. Raises OSError
    with the path and the reason; the file is then as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU. Nothing in it is executed.

    Raises FileNotFoundError, and ValueError for a file that is none of ours or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no training state to go on from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise ValueError(f"{path}: is no whole training state ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise ValueError(f"{path}: is no training state of this release")
    return state


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two descriptions of a run differ in, in words: ``batch: 64, now 128``."""
    found: list[str] = []
    for name in dict.fromkeys((*theirs, *ours)):
        before, now = theirs.get(name), ours.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name}: {_text(before)}, now {_text(now)}")
    return found


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
