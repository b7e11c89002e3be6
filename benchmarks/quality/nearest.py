"""Distance of images to the nearest training image, to detect memorisation.

The reference are fresh images of the training recipe: samples of a model that has learnt the
distribution are as close to the training images as fresh ones, memorised samples are closer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEAREST_COLUMNS = ("nearest", "nearest_fresh", "nearest_of_fresh", "novel")
LEAST_RATIO = 0.9
CHUNK = 256  # images in a block: 10 MB of products with 10,000 training images

Images = NDArray[np.float32]


def _symmetries(images: Tensor) -> list[Tensor]:
    """Return the eight flips and transposes of square images [n, 1, s, s]."""
    turned = (images, images.transpose(-1, -2))
    flips: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-1, -2))
    return [image.flip(axes) for image in turned for axes in flips]


def nearest_distances(images: Images, training: Images) -> NDArray[np.float64]:
    """Return the L2 distance over all pixels from each image to the nearest training image.

    A training image counts in all eight flips and transposes, which are the recipe's augmentations.

    Args:
        images: [n, 1, s, s] in [-1, 1], n >= 1.
        training: [m, 1, s, s] in [-1, 1], m >= 1.

    Returns:
        float64 [n].

    Raises:
        ValueError: an array has another shape.
    """
    for name, stack in (("images", images), ("training", training)):
        if stack.ndim != 4 or 0 in stack.shape or stack.shape[2] != stack.shape[3]:
            raise ValueError(f"{name} must be [n, 1, s, s], n >= 1; got {stack.shape}")
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"images must be of the shape of training, {training.shape[1:]}; got {images.shape[1:]}"
        )
    known = torch.from_numpy(training).float().flatten(1)
    squares = known.square().sum(1)
    found = []
    for chunk in torch.from_numpy(images).float().split(CHUNK):
        each = []
        # Transforming the image instead of the training images gives the same distances.
        for turned in _symmetries(chunk):
            flat = turned.flatten(1)
            nearest = (squares - 2 * flat @ known.T).argmin(1)
            # Again from the difference: the products lose small distances to rounding.
            each.append((flat.double() - known[nearest].double()).norm(dim=1))
        found.append(torch.stack(each).amin(0))
    return torch.cat(found).numpy()


class Memorisation:
    """Comparison of samples and fresh images by the distance to the nearest training image.

    Args:
        training: training images, as for `nearest_distances`.
        make_fresh: returns n images of the training recipe that are not among them.
    """

    def __init__(self, training: Images, make_fresh: Callable[[int], Images]) -> None:
        self._training = training
        self._make_fresh = make_fresh
        self._fresh_medians: dict[int, float] = {}

    def columns(self, images: Images) -> dict[str, object]:
        """Return `NEAREST_COLUMNS`: medians of images and fresh images, ratio, verdict.

        `novel` is True if the ratio is at least 0.9, and False for a NaN ratio.
        """
        count = len(images)
        if count not in self._fresh_medians:
            self._fresh_medians[count] = self._median(self._make_fresh(count))
        median, fresh = self._median(images), self._fresh_medians[count]
        ratio = median / fresh if fresh else float("nan")
        values = (round(median, 3), round(fresh, 3), round(ratio, 4), ratio >= LEAST_RATIO)
        return dict(zip(NEAREST_COLUMNS, values, strict=True))

    def _median(self, images: Images) -> float:
        return float(np.median(nearest_distances(images, self._training)))
