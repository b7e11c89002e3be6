"""Map-style data set of images, with labels, flips and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_fast.utils import checks


class ImageSource(Protocol):
    """Source of the images of an `ImageData`. It is pickled for spawned workers."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of each image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index`, in [0, len): float32 [C, H, W] in [-1, 1]."""

    def digest(self) -> str:
        """Return the SHA-256 of all that determines the images, in hex."""


class TensorImages:
    """Images in memory, float32 [N, C, H, W] in [-1, 1], N >= 1."""

    def __init__(self, images: Tensor) -> None:
        checks.batch("images", images, (torch.float32,))
        if images.ndim != 4 or images.numel() == 0:
            shape = checks.shape_text(images)
            raise ValueError(f"images must be [N, C, H, W], not empty; got {shape}")
        if not (images.abs() <= 1).all():
            low, high = (value.item() for value in images.aminmax())
            raise ValueError(f"images must be in [-1, 1]; got {low:g} to {high:g}")
        self._images = images.detach().cpu().contiguous()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of each image."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return a copy of the images at these indices, [n, C, H, W]."""
        return self._images[torch.from_numpy(indices)]

    def digest(self) -> str:
        """Return the SHA-256 of shape and values, in hex."""
        found = hashlib.sha256(checks.shape_text(self._images).encode())
        found.update(self._images.numpy().reshape(-1).view(np.uint8).data)
        return found.hexdigest()


class ImageData(Dataset):
    """Images, with a label for each if there are classes.

    `data[i]` is a float32 tensor [C, H, W] in [-1, 1], or a pair of it and its label, an int in
    [0, num_classes). It works with forked, spawned and persistent workers of a DataLoader.

    Args:
        images: A float32 tensor [N, C, H, W] in [-1, 1], or an `ImageSource`.
        name: Name of the data set.
        parameters: JSON-serialisable description of how it was made; part of the fingerprint.
        labels: One int for each image, or None.
        class_names: Name of each class. Required with labels.
        flip: Flip each image left to right with probability 1/2. The choice depends on seed, epoch
            and image alone (see `set_epoch`).
        seed: Seed of the flips, at least 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        images: Tensor | ImageSource,
        *,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self._source = TensorImages(images) if isinstance(images, Tensor) else images
        self.name = checks.instance("name", name, str)
        self._parameters = dict(parameters or {})
        self._flip = checks.instance("flip", flip, bool)
        self._seed = checks.integer("seed", seed, 0, checks.SEED_END)
        self._indices = np.arange(len(self._source))
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._digest: str | None = None
        if (labels is None) != (class_names is None):
            raise ValueError(
                "labels and class_names must both be None, or neither; got"
                f" {labels!r:.40} and {class_names!r:.40}"
            )
        self.class_names = None if class_names is None else tuple(class_names)
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        if self._labels is not None:
            if self._labels.shape != (len(self),):
                raise ValueError(
                    f"labels must be one for each of {len(self)} images;"
                    f" got shape {list(self._labels.shape)}"
                )
            checks.integer("the least of labels", self._labels.min(), 0, self.num_classes or 0)
            checks.integer("the largest of labels", self._labels.max(), 0, self.num_classes or 0)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of each image."""
        return self._source.sample_shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def epoch(self) -> int:
        """Current epoch, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which selects the flips, here and in workers.

        Call it before the iterator of an epoch is created, because workers prefetch.

        Args:
            epoch: Epoch, from 0.
        """
        self._epoch.fill_(checks.integer("epoch", epoch, 0, 1 << 63))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of name, parameters, labels, seed of the flips and images: 64 hex digits.

        It is the same in every process and epoch, and differs if an image, the order or the
        augmentation differs. The images are hashed at the first use.
        """
        if self._digest is None:
            self._digest = self._source.digest()
        labels = None if self._labels is None else self._labels[self._indices].tolist()
        flip_seed = self._seed if self._flip else None
        about = [self.name, self._parameters, self.class_names, labels, flip_seed, self._digest]
        text = json.dumps([*about, self._indices.tolist()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        """Return image `index`, with its label if there are labels. Raises IndexError."""
        position = int(self._indices[index])
        image = self._source[position]
        if self._flip and self._is_flipped(position):
            image = image.flip(-1)
        return image if self._labels is None else (image, int(self._labels[position]))

    def batch(self, indices: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
        """Return several images at once.

        A subclass that overrides `__getitem__` must override `batch` too.

        Args:
            indices: Indices of the images.

        Returns:
            A new tensor, float32 [n, C, H, W], and, with labels, the labels, int64 [n].
        """
        positions = self._indices[np.asarray(indices, dtype=np.int64)]
        if isinstance(self._source, TensorImages):
            images = self._source.batch(positions)
        else:
            images = torch.stack([self._source[position] for position in positions.tolist()])
        if self._flip:
            mirrored = [
                i for i, position in enumerate(positions.tolist()) if self._is_flipped(position)
            ]
            images[mirrored] = images[mirrored].flip(-1)
        return (
            images if self._labels is None else (images, torch.from_numpy(self._labels[positions]))
        )

    def _is_flipped(self, position: int) -> bool:
        """Return True if an image is flipped in this epoch."""
        return bool(np.random.default_rng((self._seed, self.epoch, position)).integers(2))

    def split(self, test: float, seed: int = 0) -> tuple[ImageData, ImageData]:
        """Split into two disjoint parts: one for training, one for testing, without flips.

        Each part keeps the order of the images. No image is copied.

        Args:
            test: Share of the second part, in (0, 1).
            seed: Seed of the random split, at least 0.

        Returns:
            The training part and the test part.

        Raises:
            ValueError: `test` is out of range, or a part would be empty.
        """
        if not 0 < test < 1:
            raise ValueError(f"test must be a number in (0, 1); got {test!r}")
        checks.integer("seed", seed, 0, checks.SEED_END)
        count = round(test * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"test must leave at least one image in both parts; got {test:g}, which is {count}"
                f" of {len(self)} images"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        train, held = np.sort(order[count:]), np.sort(order[:count])
        return self._part(train, self._flip), self._part(held, False)

    def _part(self, chosen: np.ndarray, flip: bool) -> ImageData:
        part = ImageData.__new__(ImageData)
        part.__dict__.update(self.__dict__)
        part._indices = self._indices[chosen]
        part._flip = flip
        part._epoch = self._epoch.clone().share_memory_()
        return part

    def __repr__(self) -> str:
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return f"ImageData({self.name}: {len(self)} of {list(self.sample_shape)}{classes})"
