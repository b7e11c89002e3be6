"""Loading of batches from a data set to the device, in a given order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


class BatchLoader:
    """Loads the images of given indices to a device.

    Args:
        device: Where the images go.
        workers: Processes that load images; 0 loads in this process.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        self._device, self._workers = device, workers

    def __call__(
        self, data: Any, batches: list[tuple[Tensor, int]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """Yield images, labels and the position of the first image of each batch.

        Args:
            data: A map-style data set with `set_epoch`.
            batches: Indices int64 [N] into the data set, and the position of the first image in
                the training, for each batch.
            epoch: Epoch that augmentations depend on.
        """
        data.set_epoch(epoch)
        loader = DataLoader(
            _Batches(data),
            batch_size=None,
            sampler=[indices.tolist() for indices, _ in batches],
            num_workers=self._workers,
            generator=torch.Generator(),  # leaves the global generator unchanged
            pin_memory=self._device.type == "cuda",
        )
        for batch, (_, first) in zip(loader, batches, strict=True):
            images, labels = batch if isinstance(batch, list | tuple) else (batch, None)
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            labels = None if labels is None else labels.to(self._device, non_blocking=True)
            yield images, labels, first


class _Batches(Dataset):
    """A data set indexed by lists; uses the `batch` method of the data set if it has one."""

    def __init__(self, data: Any) -> None:
        self._data, self._load_batch = data, getattr(data, "batch", None)

    def __getitem__(self, indices: list[int]) -> Any:
        if self._load_batch is not None:
            return self._load_batch(indices)
        return default_collate([self._data[i] for i in indices])
