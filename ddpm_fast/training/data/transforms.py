"""Resizing and cropping, by torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.optional import require


def to_images(resize: int | None, crop: bool) -> Callable[[Image.Image | Tensor], Tensor]:
    """What turns a picture into a float32 tensor [C, H, W] in [-1, 1].

    It takes Pillow's images of mode L and RGB and float32 tensors [..., C, H, W] in [0, 1], whose
    results may leave [-1, 1] a little where they are resized.

    resize: the side of the result, an int from 1 on; None keeps the size. crop: keep the aspect,
    make the shorter side ``resize`` and cut out the middle, where otherwise the whole is
    squeezed into a square. Bicubic, with antialiasing.

    Raises ImportError without torchvision, ValueError for crop without resize.
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
        raise ValueError("crop needs resize, the side of the square that is cut out")
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
