"""Images on disk: samples as sheets, single pictures and arrays, each file written whole.

A file is written under a temporary name in its folder, flushed to the disk and then renamed, so
that its final name never holds a part of it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.files import PathLike, atomic_write

BACKGROUND = 176  # grey: white images and black ones both stand out from it
INK = 24
FONT_SIZES = range(14, 7, -1)
CELL_SIDE = 96  # pixels that scale=None enlarges the longer side of an image to, at most
SHEET_SIDE = 4096  # pixels that a sheet is not enlarged beyond


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit values: float [N, C, H, W] -> uint8 [N, H, W, C], same device.

    -1 becomes 0 and 1 becomes 255; values outside are clamped, infinities too. NaN becomes 0, with
    a RuntimeWarning that counts it. Raises TypeError for what is no floating-point tensor,
    ValueError for another number of dimensions.
    """
    values = checks.images("images", images).detach()
    nan = values.isnan()
    if nan.any():
        affected = int(nan.flatten(1).any(1).sum())
        warnings.warn(
            f"{affected} of {len(values)} images hold NaN ({int(nan.sum())} values), drawn black",
            RuntimeWarning,
            stacklevel=2,
        )
    scaled = (values.float() / 2 + 0.5).clamp(0, 1).nan_to_num(0) * 255
    return scaled.round().byte().permute(0, 2, 3, 1)


def sheet(
    images: Tensor,
    columns: int | None = None,
    padding: int = 2,
    scale: int | None = None,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Image.Image:
    """Images side by side on grey, row by row.

    images: float [N, C, H, W] in [-1, 1], N >= 1, C 1 or 3 (see `to_uint8`). columns: how many in a
    row; None: about as many as there are rows. padding: grey pixels around each. scale: each pixel
    becomes a square of scale x scale; None enlarges small images to at most 96 pixels a side.
    row_names, column_names: one for each row or column, written at the left and above, or none.

    Returns a PIL image in mode L or RGB. Raises TypeError or ValueError naming the argument.
    """
    pixels = to_uint8(images).cpu().numpy()
    count, height, width, channels = pixels.shape
    if min(pixels.shape) == 0 or channels not in (1, 3):
        shape = checks.shape_text(images)
        raise ValueError(f"images must be [N, C, H, W], none empty, C 1 or 3; got {shape}")
    side = math.isqrt(count - 1) + 1
    columns = side if columns is None else checks.integer("columns", columns, 1, 1 << 31)
    columns = min(columns, count)
    rows = -(-count // columns)
    padding = checks.integer("padding", padding, 0, 1 << 16)
    if scale is None:
        fits = SHEET_SIDE // max(rows * (height + padding), columns * (width + padding))
        scale = max(1, min(fits, CELL_SIDE // max(height, width)))
    scale = checks.integer("scale", scale, 1, 1 << 16)
    for name, names, wanted in (
        ("row_names", row_names, rows),
        ("column_names", column_names, columns),
    ):
        if len(names) not in (0, wanted):
            raise ValueError(f"{name} must be {wanted} or none; got {len(names)}")

    down, across = height * scale + padding, width * scale + padding
    canvas = np.full(
        (rows * down + padding, columns * across + padding, channels), BACKGROUND, np.uint8
    )
    for i, image in enumerate(pixels):
        top, left = i // columns * down + padding, i % columns * across + padding
        cell = canvas[top : top + height * scale, left : left + width * scale]
        cell[:] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    grid = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    if not row_names and not column_names:
        return grid
    return _with_names(grid, (across, down), padding, row_names, column_names)


def _with_names(
    grid: Image.Image,
    cell: tuple[int, int],
    padding: int,
    row_names: Sequence[str],
    column_names: Sequence[str],
) -> Image.Image:
    """The grid with its rows and columns named in a margin, in a size that fits the columns."""
    for size in FONT_SIZES:
        font = ImageFont.load_default(size)
        if all(font.getlength(name) < cell[0] for name in column_names):
            break
    gap = max(padding, 6)
    left = math.ceil(max(map(font.getlength, row_names), default=0))
    left += 2 * gap if row_names else 0
    top = size + gap if column_names else 0
    bands = len(grid.getbands())
    size_px = (left + grid.width, top + grid.height)
    picture = Image.new(grid.mode, size_px, (BACKGROUND,) * bands)
    picture.paste(grid, (left, top))
    draw, ink = ImageDraw.Draw(picture), (INK,) * bands
    middle = padding / 2
    for i, name in enumerate(row_names):
        y = top + middle + (i + 0.5) * cell[1]
        draw.text((left - gap, y), name, ink, font, anchor="rm")
    for i, name in enumerate(column_names):
        x = left + middle + (i + 0.5) * cell[0]
        draw.text((x, top), name, ink, font, anchor="md")
    return picture


def save_png(image: Image.Image, path: PathLike) -> None:
    """Write a PIL image as PNG, whole or not at all; replaces a file of that name.

    Raises OSError with the path and the reason.
    """
    # Encoded in memory: errors of the disk then keep their number, and leave no half of a file.
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    with atomic_write(path) as file:
        file.write(encoded.getbuffer())


def save_npy(array: np.ndarray, path: PathLike) -> None:
    """Write an array as .npy (format 1.0, C order), whole or not at all; replaces a file.

    Raises TypeError for an array of Python objects, which would be pickled; OSError with the path
    and the reason.
    """
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise TypeError(f"array must hold numbers; got dtype {array.dtype}")
    with atomic_write(path) as file:
        # Not np.save: it loses the reason why a disk refuses.
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def save_images(images: Tensor, folder: PathLike, first_index: int = 0) -> list[Path]:
    """Write each image as a PNG of its own, 00000.png on; returns the paths.

    images: as in `sheet`, N may be 0. The number of a name is first_index plus the place in the
    batch. An error leaves the files before it, whole. Raises TypeError or ValueError for images
    that cannot be drawn, OSError with the path and the reason.
    """
    first_index = checks.integer("first_index", first_index, 0, checks.SAMPLE_END)
    pixels = to_uint8(images).cpu().numpy()
    if pixels.shape[3] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels; got {checks.shape_text(images)}")
    paths = []
    for i, image in enumerate(pixels, first_index):
        paths.append(Path(folder, f"{i:05d}.png"))
        save_png(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), paths[-1])
    return paths
