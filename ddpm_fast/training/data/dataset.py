"""Images to train on: a map-style dataset that knows what it holds."""

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
    """Where the images of an `ImageData` lie. Pickled for workers that are spawned."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image ``index`` of 0 to len - 1: float32 [C, H, W] in [-1, 1]."""

    def digest(self) -> str:
        """The SHA-256 of all that the images are made from, in hex."""


class TensorImages:
    """Images in memory: float32 [N, C, H, W] in [-1, 1], N at least 1."""

    def __init__(self, images: Tensor) -> None:
        checks.batch("images", images, (torch.float32,))
        if images.ndim != 4 or images.numel() == 0:
            shape = checks.shape_text(images)
            raise ValueError(f"images must be [N, C, H, W], none empty; got {shape}")
        if not (images.abs() <= 1).all():
            low, high = (value.item() for value in images.aminmax())
            raise ValueError(f"images must lie in [-1, 1]; got {low:g} to {high:g}")
        self._images = images.detach().cpu().contiguous()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]

    def batch(self, indices: np.ndarray) -> Tensor:
        """Images [n, C, H, W] of their own memory."""
        return self._images[torch.from_numpy(indices)]

    def digest(self) -> str:
        """The SHA-256 of shape and values."""
        found = hashlib.sha256(checks.shape_text(self._images).encode())
        found.update(self._images.numpy().reshape(-1).view(np.uint8).data)
        return found.hexdigest()


class ImageData(Dataset):
    """Images, and a label for each if there are classes.

    ``data[i]`` is a float32 tensor [C, H, W] in [-1, 1], or the pair of it and its label, an int
    in [0, num_classes). Workers of a DataLoader may be forked, spawned or kept over epochs.

    images: a float32 tensor [N, C, H, W] in [-1, 1] or an `ImageSource`. name: what to call the
    data. parameters: how it was made, as JSON can hold it; a part of the fingerprint. labels: one
    int for each image. class_names: what the labels stand for; needed with labels, and as many
    as there are classes. flip: mirror an image left to right or not, by a coin that depends on
    seed, epoch and the image alone (see `set_epoch`). seed: an int from 0 on.

    Raises TypeError or ValueError naming the argument.
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
        # Shared, so that workers which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._digest: str | None = None
        if (labels is None) != (class_names is None):
            raise ValueError("labels and class_names must be given together")
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
        """(C, H, W) of every image."""
        return self._source.sample_shape

    @property
    def num_classes(self) -> int | None:
        """How many labels there are; None without labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def epoch(self) -> int:
        """The epoch that was set last; 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the coins of an epoch, an int from 0 on; workers follow.

        To be called before an epoch's iterator is made: workers fetch ahead.
        """
        self._epoch.fill_(checks.integer("epoch", epoch, 0, 1 << 63))

    @property
    def fingerprint(self) -> str:
        """64 hex digits: the SHA-256 of name, parameters, labels, seed of the coins and content.

        The same in another process, whatever the epoch; another where an image, its order or the
        augmentation differs. The content is gone through at the first use.
        """
        if self._digest is None:
            self._digest = self._source.digest()
        labels = None if self._labels is None else self._labels[self._indices].tolist()
        coins = self._seed if self._flip else None
        about = [self.name, self._parameters, self.class_names, labels, coins, self._digest]
        text = json.dumps([*about, self._indices.tolist()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        """Image ``index`` or, with labels, the image and its label. IndexError beyond the last."""
        place = int(self._indices[index])
        image = self._source[place]
        if self._flip and self._coin(place):
            image = image.flip(-1)
        return image if self._labels is None else (image, int(self._labels[place]))

    def batch(self, indices: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
        """``data[i]`` of several at once: float32 [n, C, H, W] and, with labels, int64 [n].

        The images are the caller's to change. A subclass with another ``__getitem__`` needs
        another ``batch``.
        """
        places = self._indices[np.asarray(indices, dtype=np.int64)]
        if isinstance(self._source, TensorImages):
            images = self._source.batch(places)
        else:
            images = torch.stack([self._source[place] for place in places.tolist()])
        if self._flip:
            mirrored = [i for i, place in enumerate(places.tolist()) if self._coin(place)]
            images[mirrored] = images[mirrored].flip(-1)
        return images if self._labels is None else (images, torch.from_numpy(self._labels[places]))

    def _coin(self, place: int) -> bool:
        """Whether an image is mirrored in this epoch."""
        return bool(np.random.default_rng((self._seed, self.epoch, place)).integers(2))

    def split(self, test: float, seed: int = 0) -> tuple[ImageData, ImageData]:
        """Two parts that share no image: one to train on, and one to test on without flips.

        test: the second part's share, above 0 and below 1. seed: an int from 0 on, which decides
        what goes where; each part keeps the order. Nothing is copied. Raises ValueError where a
        part would be empty.
        """
        if not 0 < test < 1:
            raise ValueError(f"test must be a share above 0 and below 1; got {test!r}")
        checks.integer("seed", seed, 0, checks.SEED_END)
        count = round(test * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"test must leave an image to either part; {test:g} of {len(self)} is {count}"
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
