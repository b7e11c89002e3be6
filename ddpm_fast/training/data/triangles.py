"""The triangles of Martinez Rojas 2023, sections 5 and 6.1: generated, and kept on disk if wanted.

Three uniform random points on a canvas, filled with black on white. The thesis trains on three
forms of them, here `FORMS`; the same seed gives the same triangles in each.
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


def _reduced(corners: Corners, size: int, canvas: int) -> Pixels:
    return np.asarray(_draw(corners, canvas).resize((size, size), Image.Resampling.LANCZOS))


def _through_a_file(corners: Corners, size: int, canvas: int) -> Pixels:
    file = io.BytesIO()
    _draw((2 * corners + 1) * size // (2 * canvas), size).save(file, "JPEG")
    return np.asarray(Image.open(file))


def _covered(corners: Corners, size: int, canvas: int) -> Pixels:
    """By exact integers: positions are multiplied by 2 * canvas."""
    points = (2 * corners + 1) * size
    centres = (2 * np.arange(size) + 1) * canvas
    x, y = centres[None, :], centres[:, None]
    (left, top), (right, bottom) = points.min(0), points.max(0)
    # The box matters where the corners lie on one line, all of which is on every side.
    within = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    sides = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True)
    ]
    inside = (np.minimum.reduce(sides) >= 0) | (np.maximum.reduce(sides) <= 0)
    return np.where(inside & within, 0, WHITE).astype(np.uint8)


FORMS: dict[str, Callable[[Corners, int, int], Pixels]] = {
    "triangles": _reduced,
    "triangles-lowres": _through_a_file,
    "triangles-array": _covered,
}


def make_triangles(
    n: int, seed: int, form: str = "triangles", size: int = SIZE, canvas: int = CANVAS
) -> Images:
    """Draw filled triangles: background +1 (white), triangle -1 (black), one channel.

    n: how many, at least 0. seed: an int from 0 on. The corners are three uniform random pixels
    of a canvas x canvas bitmap each, in every form the same ones. size: the side of an image.

    form:
        ``triangles``: drawn on the canvas and reduced to size x size by Lanczos; edges are smooth,
            and what overshoots is cut off at white and black.
        ``triangles-lowres``: drawn at size x size by Pillow, which knows black and white alone,
            then written as an image file and read again. The file is a JPEG (in memory, Pillow's
            quality of 75): its compression leaves the grey dots around the edges that the thesis
            blames on drawing and converting at this size; it does not name its file format.
        ``triangles-array``: noise-free; a pixel is -1 where its centre lies in the triangle or on
            its edge, by exact integers, and +1 elsewhere.

    Returns float32 [n, 1, size, size] in [-1, 1]. The same arguments give the same images (on one
    version of Pillow), and a smaller n the first of them. Slivers may leave an image blank.
    Raises ValueError or TypeError naming the argument.
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


def kept_triangles(
    n: int, seed: int, form: str, folder: Path | None, size: int = SIZE, canvas: int = CANVAS
) -> Images:
    """The images of `make_triangles`, read from a .npy in ``folder`` where they are there whole.

    Otherwise they are made, and written there. A folder that cannot be written to is logged
    (logger ``ddpm_fast``, WARNING) and left; None keeps nothing.
    """
    if folder is None:
        return make_triangles(n, seed, form, size, canvas)
    name = f"{form}-n{n}-seed{seed}-size{size}-canvas{canvas}-pillow{pillow_version}.npy"
    path = folder / name
    kept = _read(path, (n, 1, size, size))
    if kept is not None:
        return kept
    images = make_triangles(n, seed, form, size, canvas)
    try:
        prepare_folder(folder)
        save_npy(images, path)
    except OSError as error:
        _log.warning("images are not kept: %s", error)
    return images


def _read(path: Path, shape: tuple[int, ...]) -> Images | None:
    try:
        images = np.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s cannot be read and is made again: %s", path, error)
        return None
    whole = isinstance(images, np.ndarray) and (images.dtype, images.shape) == (np.float32, shape)
    if not whole or not (np.abs(images) <= 1).all():
        _log.warning("%s holds something else and is made again", path)
        return None
    return images
