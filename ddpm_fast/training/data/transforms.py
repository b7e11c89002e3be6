"""Resize and crop images by torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.optional import require


def make_transform(resize: int | None, crop: bool) -> Callable[[Image.Image | Tensor], Tensor]:
    """Return a function that converts an image to a float32 tensor [C, H, W] in [-1, 1].

    The function accepts Pillow's images in mode L or RGB, and float32 tensors [..., C, H, W] in
    [0, 1], whose results may exceed [-1, 1] slightly if they are resized.

    Args:
        resize: Side of the square result, at least 1; bicubic, with antialiasing. None: no resize.
        crop: Resize the shorter side to `resize` and crop the centre. False: resize to a square,
            without keeping the aspect ratio.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: `crop` without `resize`.
    """
    v2 = require("torchvision", "a folder of images, or resize,", "torchvision.transforms.v2")
    steps: list[Callable] = [v2.PILToTensor()]
    if resize is not None:
        side = checks.integer("resize", resize, 1, 1 << 15)
        size = [side] if crop else [side, side]
        bicubic = v2.InterpolationMode.BICUBIC
        steps.append(v2.Resize(size, interpolation=bicubic, antialias=True))
        steps += [v2.CenterCrop([side, side])] if crop else []
    elif crop:
        raise ValueError("resize must be the side of a square for crop; got None")
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
