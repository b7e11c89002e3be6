"""Losses of a training: of one epoch, the history of all epochs as CSV and PNG, and TensorBoard."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils.figures import ACCENT, FAINT, INK, add_title, new_figure, save_figure
from ddpm_fast.utils.files import atomic_write
from ddpm_fast.utils.optional import require

FIELDS = ("epoch", "steps", "lr", "loss", "loss_min", "loss_max", "test_loss", "images_per_s")
TENSORBOARD_FIELDS = ("loss", "test_loss", "lr", "images_per_s")


class EpochMetrics:
    """Losses and duration of the steps of one epoch, averaged over all processes.

    Losses stay on the device until `read`, so that a step does not synchronise with a GPU.

    Args:
        accelerator: An `accelerate.Accelerator`, which averages over processes.
        epoch: Number of the epoch, for messages.
        first_step: Number of the epoch's first step in the training.
        losses: Losses of the steps before a resumed training.
        seconds: Duration of those steps.

    Attributes:
        losses: The loss of each step that was read, a list of floats.
        seconds: Duration of the steps that were read.
    """

    def __init__(
        self,
        accelerator: Any,
        epoch: int,
        first_step: int,
        losses: Sequence[float] = (),
        seconds: float = 0.0,
    ) -> None:
        self._accelerator, self._epoch, self._first_step = accelerator, epoch, first_step
        self.losses, self.seconds = list(losses), seconds
        self._unread: list[Tensor] = []
        self._since = time.perf_counter()

    def start(self) -> None:
        """Start the clock; the time since the last reading is not counted."""
        self._since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Add the loss of this process's share of a step, a tensor on the device."""
        self._unread.append(loss)

    def read(self) -> None:
        """Update `losses` and `seconds`; every process must call it.

        Raises:
            RuntimeError: A loss is not finite, now or at an earlier reading.
        """
        if not self._unread:
            return
        means = self._accelerator.reduce(torch.stack(self._unread), "mean").double().cpu()
        if not means.isfinite().all():
            step = self._first_step + len(self.losses) + int((~means.isfinite()).nonzero()[0])
            raise RuntimeError(f"the loss is not finite at step {step}, epoch {self._epoch}")
        now = time.perf_counter()
        self.losses += means.tolist()
        self.seconds += now - self._since
        self._unread, self._since = [], now

    def summary(self, images: int) -> dict[str, float]:
        """Return mean, minimum and maximum of the losses, and the images per second.

        Args:
            images: Images of all steps that were read.
        """
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {
            "loss": float(losses.mean()),
            "loss_min": float(losses.min()),
            "loss_max": float(losses.max()),
            "images_per_s": round(images / self.seconds, 2),
        }


def write_history(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the history as CSV with the columns FIELDS, one row an epoch; atomic.

    Raises:
        OSError: The file cannot be written; it is then unchanged.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def draw_history(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses over the epochs: mean and range of the steps, and the held-out loss.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    figure, axes = new_figure(7, 4)
    epochs = [row["epoch"] + 1 for row in rows]
    low, high = ([row[name] for row in rows] for name in ("loss_min", "loss_max"))
    axes.fill_between(epochs, low, high, color=ACCENT, alpha=0.15, linewidth=0, label="min to max")
    axes.plot(epochs, [row["loss"] for row in rows], color=ACCENT, label="mean of an epoch's steps")
    held_out = [row["test_loss"] for row in rows]
    if any(value is not None for value in held_out):
        axes.plot(epochs, held_out, color=INK, linestyle="--", label="held-out images")
    axes.set_yscale("log")
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False, labelcolor=FAINT)
    add_title(figure, title, f"{len(rows)} epochs, {rows[-1]['steps']} steps")
    save_figure(figure, path)


def require_tensorboard() -> Any:
    """Return torch's class SummaryWriter.

    Raises:
        ImportError: tensorboard is not installed.
    """
    return require("tensorboard", "--tensorboard", "torch.utils.tensorboard").SummaryWriter


class TensorBoardWriter:
    """Writes a row of the history for each epoch to TensorBoard, over the steps.

    Args:
        folder: Folder of TensorBoard's files.
        history: Rows before a resumed training. The last one is written again, or all of them into
            a new folder; later rows in the folder are purged.
    """

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]] = ()) -> None:
        repeated = history[-1:] if folder.exists() else history
        begin = repeated[0]["steps"] if repeated else 0
        self._writer = require_tensorboard()(str(folder), purge_step=begin)
        for row in repeated:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row of the history and flush it."""
        for name in TENSORBOARD_FIELDS:
            if row[name] is not None:
                self._writer.add_scalar(name, row[name], row["steps"])
        self._writer.flush()
