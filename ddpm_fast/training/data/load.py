"""Data by name: generated triangles, scikit-learn's digits, or a folder of images."""

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
    look_at,
    without_broken,
)
from ddpm_fast.training.data.transforms import to_images
from ddpm_fast.training.data.triangles import CANVAS, FORMS, SIZE, kept_triangles
from ddpm_fast.utils import checks
from ddpm_fast.utils.files import cache_dir
from ddpm_fast.utils.optional import require

DIGITS = "digits"
DIGITS_WHITE = 16  # scikit-learn counts the ink of a pixel from 0 to 16
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
    """Images to train on, as `ImageData`: float32 [C, H, W] in [-1, 1] each.

    source:
        ``triangles``, ``triangles-lowres``, ``triangles-array``: ``num`` images of
            `make_triangles` by ``seed``, ``size`` pixels a side (None: 32). With ``cache`` they
            are kept as .npy in $DDPM_FAST_CACHE (or the user's cache folder; ``off`` keeps
            nothing) and read from there the next time.
        ``digits``: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, black on white.
        anything else: the folder of that name (``./digits`` for one that has a name from above):
            all images below it, sorted by path. Each is decoded once, so that a broken file is
            named now and not in the middle of a training, and then again whenever it is used.

    num: of triangles alone. seed: an int from 0 on, for the triangles and for ``flip``. resize, of
    digits and folders: the side of the square that images are brought to. crop, of folders: keep
    the aspect, and cut out the middle. flip: mirror images left to right by a coin for each image
    and epoch. channels: 1 or 3; None is 1 where all images are grey. labels: give labels too, the
    digits or the sub-folders in the order of their names. skip_broken: log broken files instead
    of raising.

    Raises TypeError or ValueError for an option that is out of range or that the source does not
    have; FileNotFoundError or NotADirectoryError; ValueError for a folder without images, broken
    files, images of different sizes without ``resize``, or files in no sub-folder with
    ``labels``; ImportError naming what to install.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a name or a folder; got {type(source).__name__}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None; got {channels!r}")
    if resize is not None:
        checks.integer("resize", resize, 1, 1 << 15)
    checks.integer("seed", seed, 0, checks.SEED_END)
    if source in FORMS:
        _refuse(source, resize=resize, crop=crop, labels=labels)
        return _triangles(
            str(source), num, seed, SIZE if size is None else size, channels or 1, flip, cache
        )
    if source == DIGITS:
        _refuse(source, size=size, crop=crop)
        return _digits(resize, channels or 1, labels, flip, seed)
    _refuse(source, size=size)
    return _folder(Path(source), resize, crop, channels, labels, skip_broken, flip, seed)


def _refuse(source: str | os.PathLike[str], **options: int | bool | None) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is no option of {source!s}; got {value!r}")


def _triangles(
    form: str, num: int, seed: int, size: int, channels: int, flip: bool, cache: bool
) -> ImageData:
    checks.integer("num", num, 1, 1 << 31)
    images = kept_triangles(num, seed, form, cache_dir() if cache else None, size)
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
        images = to_images(resize, crop=False)(1 - ink).clamp(-1, 1)
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
        reason = f"neither a folder nor one of {', '.join(NAMES)}"
        raise FileNotFoundError(errno.ENOENT, reason, str(folder))
    transform = to_images(resize, crop)
    paths = image_paths(folder)
    classes = sorted({class_of(path, folder) for path in paths}) if labels else []
    files = without_broken(look_at(paths), folder, skip_broken)
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
