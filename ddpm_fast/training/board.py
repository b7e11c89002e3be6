"""The history of a run in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_fast.utils.optional import require

SHOWN = ("loss", "test_loss", "lr", "images_per_s")


def require_tensorboard() -> Any:
    """Return the class SummaryWriter of torch.

    Raises:
        ImportError: tensorboard is not installed.
    """
    return require("tensorboard", "--tensorboard", "torch.utils.tensorboard").SummaryWriter


class Board:
    """A row of the history for each epoch, over the steps.

    history: what a run that goes on has behind it. Its last row is written again, or all of it in
    a folder that is new, and later ones are taken back, which a run may have shown after its last
    saving.
    """

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]] = ()) -> None:
        again = history[-1:] if folder.exists() else history
        begin = again[0]["steps"] if again else 0
        self._writer = require_tensorboard()(str(folder), purge_step=begin)
        for row in again:
            self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        """Write a row, to be seen at once."""
        for name in SHOWN:
            if row[name] is not None:
                self._writer.add_scalar(name, row[name], row["steps"])
        self._writer.flush()
