"""From a data set to the device, in the order of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


class Feed:
    """The images of a step on the device, by their indices."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._device, self._workers = device, workers

    def __call__(
        self, data: Any, cuts: list[tuple[Tensor, int]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """(images, labels, place of the first) of each cut of indices."""
        data.set_epoch(epoch)
        loader = DataLoader(
            _Batches(data),
            batch_size=None,
            sampler=[indices.tolist() for indices, _ in cuts],
            num_workers=self._workers,
            generator=torch.Generator(),  # the caller's is left alone
            pin_memory=self._device.type == "cuda",
        )
        for batch, (_, first) in zip(loader, cuts, strict=True):
            images, labels = batch if isinstance(batch, list | tuple) else (batch, None)
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            labels = None if labels is None else labels.to(self._device, non_blocking=True)
            yield images, labels, first


class _Batches(Dataset):
    """A data set by lists of indices: at once where it has a ``batch``, one by one where not."""

    def __init__(self, data: Any) -> None:
        self._data, self._at_once = data, getattr(data, "batch", None)

    def __getitem__(self, indices: list[int]) -> Any:
        if self._at_once is not None:
            return self._at_once(indices)
        return default_collate([self._data[i] for i in indices])
