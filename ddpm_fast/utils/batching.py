"""Division of samples into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through a model together.

    Attributes:
        first_sample: Index of the sample in slot 0, counted over all calls with one seed.
        size: Number of slots.
        slots: Slots of the requested samples; the others are padding.
        samples: Position of the requested samples in the tensors of the call.
    """

    first_sample: int
    size: int
    slots: slice
    samples: slice

    def take(self, values: Tensor, num: int) -> Tensor:
        """Return the values of each slot.

        Args:
            values: One value for each sample of the call, [num, ...].
            num: Number of samples of the call. Padding repeats the first or the last of them.

        Returns:
            Tensor [size, ...] on the device of `values`.
        """
        begin = self.samples.start - self.slots.start
        index = torch.arange(begin, begin + self.size, device=values.device).clamp(0, num - 1)
        return values.index_select(0, index)


def micro_batches(num: int, first_sample: int, size: int, pad: bool) -> Iterator[MicroBatch]:
    """Divide samples into micro-batches.

    With padding, sample k is always in slot k % size, whatever other samples a call has: the slot
    and the batch size change the last bits of a convolution.

    Args:
        num: Number of samples.
        first_sample: Index of the first of them.
        size: Largest micro-batch; with padding, the size of all of them.
        pad: Pad the first and the last micro-batch to `size` slots.

    Yields:
        The micro-batches, in the order of the samples.
    """
    done = 0
    while done < num:
        sample = first_sample + done
        before = sample % size if pad else 0
        count = min(size - before, num - done)
        yield MicroBatch(
            first_sample=sample - before,
            size=size if pad else count,
            slots=slice(before, before + count),
            samples=slice(done, done + count),
        )
        done += count


def by_sample(values: Tensor) -> Tensor:
    """Return the elements of each sample in one dimension.

    Args:
        values: [N, ...], also [N], whose samples are single numbers.

    Returns:
        [N, elements], a view where possible.
    """
    return values.flatten(1) if values.ndim > 1 else values[:, None]
