"""Triangles of Martinez Rojas 2023, sections 5 and 6.1: generated, with an optional cache.

A triangle has three uniform random corners on a canvas, and is filled with black on white. The
thesis trains on three forms of them, `FORMS`; a seed gives the same triangles in each form.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL import __version__ as pillow_version

from ddpm_fast.utils import checks
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_npy

SIZE = 32
CANVAS = 720
WHITE = 255

Images = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Corners = NDArray[np.int64]

_log = logging.getLogger("ddpm_fast")


def _draw(corners: Corners, side: int) -> Image.Image:
    bitmap = Image.new("L", (side, side), WHITE)
    ImageDraw.Draw(bitmap).polygon([(x, y) for x, y in corners.tolist()], fill=0)
    return bitmap


def _draw_reduced(corners: Corners, size: int, canvas: int) -> Pixels:
    return np.asarray(_draw(corners, canvas).resize((size, size), Image.Resampling.LANCZOS))


def _draw_jpeg(corners: Corners, size: int, canvas: int) -> Pixels:
    file = io.BytesIO()
    _draw((2 * corners + 1) * size // (2 * canvas), size).save(file, "JPEG")
    return np.asarray(Image.open(file))


def _draw_exact(corners: Corners, size: int, canvas: int) -> Pixels:
    """Draw by exact integers: positions are multiplied by 2 * canvas."""
    points = (2 * corners + 1) * size
    centres = (2 * np.arange(size) + 1) * canvas
    x, y = centres[None, :], centres[:, None]
    (left, top), (right, bottom) = points.min(0), points.max(0)
    # The bounding box is needed for collinear corners, whose line is inside all three edges.
    within = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    sides = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True)
    ]
    inside = (np.minimum.reduce(sides) >= 0) | (np.maximum.reduce(sides) <= 0)
    return np.where(inside & within, 0, WHITE).astype(np.uint8)


FORMS: dict[str, Callable[[Corners, int, int], Pixels]] = {
    "triangles": _draw_reduced,
    "triangles-lowres": _draw_jpeg,
    "triangles-array": _draw_exact,
}


def make_triangles(
    n: int, seed: int, form: str = "triangles", size: int = SIZE, canvas: int = CANVAS
) -> Images:
    """Draw filled triangles: background +1 (white), triangle -1 (black), one channel.

    The same arguments give the same images (with one version of Pillow), and a smaller `n` the
    first of them. Very thin triangles may leave an image blank.

    Args:
        n: Number of images, at least 0.
        seed: Seed, at least 0. Corners are three uniform random pixels of the canvas, the same in
            each form.
        form: How a triangle is drawn:

            - "triangles": on the canvas, and reduced to size x size by a Lanczos filter. Edges are
              smooth, and overshoot is clipped to white and black.
            - "triangles-lowres": by Pillow at size x size in black and white, and compressed as
              JPEG in memory (Pillow's quality of 75). This gives the grey dots around the edges
              that the thesis attributes to drawing and converting at this size; the thesis does
              not name its file format.
            - "triangles-array": without noise. A pixel is -1 if its centre is in the triangle or
              on its edge, by exact integers, and +1 elsewhere.
        size: Side of an image in pixels.
        canvas: Side of the canvas in pixels.

    Returns:
        Images, float32 [n, 1, size, size] in [-1, 1].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    checks.integer("n", n, 0, 1 << 31)
    checks.integer("seed", seed, 0, checks.SEED_END)
    checks.integer("size", size, 1, 1 << 15)
    checks.integer("canvas", canvas, 1, 1 << 15)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    all_corners = np.random.default_rng(seed).integers(0, canvas, (n, 3, 2))
    images = np.empty((n, 1, size, size), np.float32)
    for image, corners in zip(images, all_corners, strict=True):
        image[0] = FORMS[form](corners, size, canvas)
    return images / np.float32(127.5) - 1


def cached_triangles(
    n: int, seed: int, form: str, folder: Path | None, size: int = SIZE, canvas: int = CANVAS
) -> Images:
    """Return the images of `make_triangles` from a cache.

    Args:
        n: Number of images.
        seed: Seed.
        form: A key of `FORMS`.
        folder: Folder of the cache. If a file is missing or damaged, the images are generated and
            written to it; an error in writing is logged (logger `ddpm_fast`, WARNING). None: no
            cache.
        size: Side of an image.
        canvas: Side of the canvas.

    Returns:
        Images, float32 [n, 1, size, size].
    """
    if folder is None:
        return make_triangles(n, seed, form, size, canvas)
    name = f"{form}-n{n}-seed{seed}-size{size}-canvas{canvas}-pillow{pillow_version}.npy"
    path = folder / name
    cached = _read(path, (n, 1, size, size))
    if cached is not None:
        return cached
    images = make_triangles(n, seed, form, size, canvas)
    try:
        prepare_folder(folder)
        save_npy(images, path)
    except OSError as error:
        _log.warning("images are not cached: %s", error)
    return images


def _read(path: Path, shape: tuple[int, ...]) -> Images | None:
    try:
        images = np.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s cannot be read and is generated again: %s", path, error)
        return None
    complete = isinstance(images, np.ndarray) and (images.dtype, images.shape) == (
        np.float32,
        shape,
    )
    if not complete or not (np.abs(images) <= 1).all():
        _log.warning("%s contains other data and is generated again", path)
        return None
    return images
