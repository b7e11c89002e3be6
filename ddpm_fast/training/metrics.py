"""What the steps of an epoch have come to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Tally:
    """The losses of an epoch's steps, over all processes, and the seconds that they took.

    Nothing waits for a GPU between two readings.
    """

    def __init__(
        self,
        processes: Any,
        epoch: int,
        first_step: int,
        losses: Sequence[float] = (),
        seconds: float = 0.0,
    ) -> None:
        self._processes, self._epoch, self._first_step = processes, epoch, first_step
        self.losses, self.seconds = list(losses), seconds
        self._unread: list[Tensor] = []
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin to count seconds: what was done since the last reading is no step."""
        self._since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Take the loss of this process's share of a step, on the device."""
        self._unread.append(loss)

    def read(self) -> None:
        """Bring `losses` and `seconds` up to date; to be called by all processes.

        Raises RuntimeError where a loss is not finite, at every reading from then on.
        """
        if not self._unread:
            return
        # Of all processes, in the order of the places.
        means = self._processes.reduce(torch.stack(self._unread), "mean").double().cpu()
        if not means.isfinite().all():
            step = self._first_step + len(self.losses) + int((~means.isfinite()).nonzero()[0])
            raise RuntimeError(f"the loss is not finite at step {step}, epoch {self._epoch}")
        now = time.perf_counter()
        self.losses += means.tolist()
        self.seconds += now - self._since
        self._unread, self._since = [], now

    def row(self, images: int) -> dict[str, float]:
        """Mean, min and max of what was read, and the speed; images: of all those steps."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {
            "loss": float(losses.mean()),
            "loss_min": float(losses.min()),
            "loss_max": float(losses.max()),
            "images_per_s": round(images / self.seconds, 2),
        }
