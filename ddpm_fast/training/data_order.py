"""Which image, which timestep and which noise a step gets: by counters alone.

Place p of a run is the p-th image that it sees. Everything random of it is made from the seed and
p, so that a run that is resumed or spread over processes sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast.ops.philox import STREAM_TRAINING, random_words

STREAM_TIMESTEPS = STREAM_TRAINING + 16
STREAM_DROPPED_LABELS = STREAM_TRAINING + 17
STREAM_HELD_OUT = STREAM_TRAINING + 18  # the noise of held-out images, the same in every epoch
STREAM_HELD_OUT_TIMESTEPS = STREAM_TRAINING + 19


def timesteps(seed: int, first: int, num: int, T: int, stream: int = STREAM_TIMESTEPS) -> Tensor:
    """Timesteps for the places first .. first + num - 1, uniform in 0..T-1, int64 on the CPU."""
    return (random_words(seed, stream, first, num) * T) >> 32


def dropped(seed: int, first: int, num: int, share: float) -> Tensor:
    """Which of the places first .. first + num - 1 lose their label, bool on the CPU."""
    return random_words(seed, STREAM_DROPPED_LABELS, first, num) < int(share * 2**32)


def torch_seed(seed: int, step: int, rank: int) -> int:
    """What torch's own generator draws from in a step of a process: a network's dropout."""
    return ((seed * 1_000_003 + step) * 1009 + rank) % (1 << 63)


def cut(num: int, batch: int, ranks: int) -> tuple[int, int]:
    """The images of a step and the steps of an epoch of num images, over all processes.

    Fewer images than a batch make one step, of as many as every process can have the same of.
    """
    batch = min(batch, num // ranks * ranks)
    if batch == 0:
        raise ValueError(f"data must have an image for each of {ranks} processes; got {num}")
    return batch, num // batch


class Epoch:
    """The order of num images in an epoch, in steps of ``batch``; what is left over is left out."""

    def __init__(self, num: int, batch: int, seed: int, epoch: int) -> None:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
        self._order = torch.randperm(num, generator=generator)
        self._batch = batch
        self.first = epoch * num  # the place of its first image

    def batches(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, int]]:
        """The indices of a process's share of each step, and the place of the first of them."""
        share = self._batch // ranks
        for begin in range(0, len(self._order) - self._batch + 1, self._batch):
            place = begin + rank * share
            yield self._order[place : place + share], self.first + place
