"""The order of images, timesteps and dropped labels of a training: functions of counters alone.

Position p of a training is the p-th image that it sees. Everything random about it is computed from
the seed and p, so that a resumed training, and one on several processes, sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast.ops.philox import STREAM_TRAINING, random_words

STREAM_TIMESTEPS = STREAM_TRAINING + 16
STREAM_DROPPED_LABELS = STREAM_TRAINING + 17
STREAM_HELD_OUT = STREAM_TRAINING + 18  # noise of the held-out images, the same in every epoch
STREAM_HELD_OUT_TIMESTEPS = STREAM_TRAINING + 19


def random_timesteps(
    seed: int, first: int, num: int, T: int, stream: int = STREAM_TIMESTEPS
) -> Tensor:
    """Return uniform timesteps in [0, T) for `num` positions from `first` on, int64 on the CPU."""
    return (random_words(seed, stream, first, num) * T) >> 32


def dropped_labels(seed: int, first: int, num: int, share: float) -> Tensor:
    """Return a mask of the positions whose label is dropped, bool [num] on the CPU."""
    return random_words(seed, STREAM_DROPPED_LABELS, first, num) < int(share * 2**32)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generator for one step of a process, such as for dropout."""
    return ((seed * 1_000_003 + step) * 1009 + rank) % (1 << 63)


def epoch_size(num: int, batch: int, processes: int) -> tuple[int, int]:
    """Return the batch size over all processes and the steps of an epoch of `num` images.

    Fewer images than a batch make one step with the same number of images for every process.

    Raises:
        ValueError: There are fewer images than processes.
    """
    batch = min(batch, num // processes * processes)
    if batch == 0:
        raise ValueError(f"data must have an image for each of {processes} processes; got {num}")
    return batch, num // batch


class EpochOrder:
    """The random order of the images in one epoch, as batches; an incomplete last one is dropped.

    Args:
        num: Images of the data set.
        batch: Images of a step, over all processes.
        seed: Seed of the training.
        epoch: Number of the epoch, from 0.

    Attributes:
        first: Position of the epoch's first image in the training.
    """

    def __init__(self, num: int, batch: int, seed: int, epoch: int) -> None:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
        self._order = torch.randperm(num, generator=generator)
        self._batch = batch
        self.first = epoch * num

    def batches(self, rank: int, processes: int) -> Iterator[tuple[Tensor, int]]:
        """Yield indices and position of the first image of this process's share of each step."""
        share = self._batch // processes
        for begin in range(0, len(self._order) - self._batch + 1, self._batch):
            first = begin + rank * share
            yield self._order[first : first + share], self.first + first
