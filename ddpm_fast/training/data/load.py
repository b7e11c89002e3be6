"""Load a data set by name: generated triangles, scikit-learn's digits, or a folder of images."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import torch

from ddpm_fast.training.data.dataset import ImageData
from ddpm_fast.training.data.image_folder import (
    FolderImages,
    class_of,
    image_paths,
    inspect_files,
    readable_files,
)
from ddpm_fast.training.data.transforms import make_transform
from ddpm_fast.training.data.triangles import CANVAS, FORMS, SIZE, cached_triangles
from ddpm_fast.utils import checks
from ddpm_fast.utils.files import cache_dir
from ddpm_fast.utils.optional import require

DIGITS = "digits"
DIGITS_WHITE = 16  # largest value of a pixel in scikit-learn's digits, 0 to 16 for white to black
NAMES = (*FORMS, DIGITS)


def load_data(
    source: str | os.PathLike[str],
    *,
    num: int = 10_000,
    seed: int = 0,
    size: int | None = None,
    resize: int | None = None,
    crop: bool = False,
    flip: bool = False,
    channels: int | None = None,
    labels: bool = False,
    skip_broken: bool = False,
    cache: bool = True,
) -> ImageData:
    """Load images to train on.

    Args:
        source: Name of a data set, or a folder:

            - "triangles", "triangles-lowres" or "triangles-array": images of `make_triangles`. They
              are cached as .npy in $DDPM_FAST_CACHE, or in the user's cache folder if it is unset;
              "off" disables the cache.
            - "digits": scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, black on white.
            - anything else: a folder (`./digits` for one with a name from above). Its images, at
              any depth, are sorted by path. Each is decoded once at the start, so that a broken
              file is found before the training, and again whenever it is used.
        num: Number of triangles.
        seed: Seed of the triangles and of `flip`, at least 0.
        size: Side of the triangles' images in pixels. None: 32.
        resize: Side in pixels of the square that digits and files are resized to.
        crop: Resize the shorter side of files, and crop the centre to a square.
        flip: Flip each image left to right with probability 1/2, independently in each epoch.
        channels: 1 or 3. None: 1 if all images are grey, else 3.
        labels: Also load labels: the digits, or the sub-folders in the order of their names.
        skip_broken: Log broken files instead of raising an error.
        cache: Use the cache of triangles.

    Returns:
        Images, float32 [C, H, W] in [-1, 1] each.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is out of range or does not apply to the source; or a folder has no
            images, broken files, images of different sizes without `resize`, or files in no
            sub-folder with `labels`.
        FileNotFoundError: there is no such folder.
        NotADirectoryError: the source is a file.
        ImportError: a package is missing; the message says how to install it.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a str or a path; got {type(source).__name__}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None; got {channels!r}")
    if resize is not None:
        checks.integer("resize", resize, 1, 1 << 15)
    checks.integer("seed", seed, 0, checks.SEED_END)
    if source in FORMS:
        _reject_options(source, resize=resize, crop=crop, labels=labels)
        return _triangles(
            str(source), num, seed, SIZE if size is None else size, channels or 1, flip, cache
        )
    if source == DIGITS:
        _reject_options(source, size=size, crop=crop)
        return _digits(resize, channels or 1, labels, flip, seed)
    _reject_options(source, size=size)
    return _folder(Path(source), resize, crop, channels, labels, skip_broken, flip, seed)


def _reject_options(source: str | os.PathLike[str], **options: int | bool | None) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} must not be set for {source!s}; got {value!r}")


def _triangles(
    form: str, num: int, seed: int, size: int, channels: int, flip: bool, cache: bool
) -> ImageData:
    checks.integer("num", num, 1, 1 << 31)
    images = cached_triangles(num, seed, form, cache_dir() if cache else None, size)
    return ImageData(
        torch.from_numpy(images).expand(-1, channels, -1, -1),
        name=form,
        parameters={"num": num, "seed": seed, "size": size, "canvas": CANVAS},
        flip=flip,
        seed=seed,
    )


def _digits(resize: int | None, channels: int, labels: bool, flip: bool, seed: int) -> ImageData:
    found = require("sklearn", "the data set digits", "sklearn.datasets").load_digits()
    ink = torch.from_numpy(found.images.astype(np.float32))[:, None] / DIGITS_WHITE
    images = 1 - 2 * ink
    if resize is not None:
        images = make_transform(resize, crop=False)(1 - ink).clamp(-1, 1)
    return ImageData(
        images.expand(-1, channels, -1, -1),
        name=DIGITS,
        parameters={"resize": resize},
        labels=found.target if labels else None,
        class_names=[str(name) for name in found.target_names] if labels else None,
        flip=flip,
        seed=seed,
    )


def _folder(
    folder: Path,
    resize: int | None,
    crop: bool,
    channels: int | None,
    labels: bool,
    skip_broken: bool,
    flip: bool,
    seed: int,
) -> ImageData:
    if not folder.exists():
        reason = f"must be a folder or one of {', '.join(NAMES)}"
        raise FileNotFoundError(errno.ENOENT, reason, str(folder))
    transform = make_transform(resize, crop)
    paths = image_paths(folder)
    classes = sorted({class_of(path, folder) for path in paths}) if labels else []
    files = readable_files(inspect_files(paths), folder, skip_broken)
    images = FolderImages(files, folder, transform, resize, channels)
    numbers = {name: number for number, name in enumerate(classes)}
    return ImageData(
        images,
        name=folder.resolve().name,
        parameters={"resize": resize, "crop": crop, "channels": images.sample_shape[0]},
        labels=[numbers[class_of(file.path, folder)] for file in files] if labels else None,
        class_names=classes if labels else None,
        flip=flip,
        seed=seed,
    )
