"""What a training run has come to, epoch by epoch: a CSV file and its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_fast.utils.figures import ACCENT, FAINT, INK, add_title, new_figure, save_figure
from ddpm_fast.utils.files import atomic_write

FIELDS = ("epoch", "steps", "lr", "loss", "loss_min", "loss_max", "test_loss", "images_per_s")


def write_history(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One row an epoch, floats with all their digits; the file is replaced as a whole.

    Raises OSError with the path and the reason.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def draw_history(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The losses over the epochs: the mean of a step's, their range, and the held-out loss.

    Raises ImportError, and OSError from the disk.
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
