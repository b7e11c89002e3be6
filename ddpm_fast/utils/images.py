"""Images on disk: sheets of samples, PNG and JPEG files, and arrays.

Files are written by `files.atomic_write`.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.files import PathLike, atomic_write

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # of Pillow, that are read
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".pgm"),
    *(".bmp", ".tif", ".tiff", ".webp", ".gif"),
)
BACKGROUND = 176  # grey: black and white images both stand out from it
INK = 24
FONT_SIZES = range(14, 7, -1)
CELL_SIDE = 96  # pixels: scale=None enlarges the longer side of an image to at most this
SHEET_SIDE = 4096  # pixels: scale=None does not enlarge a sheet beyond this


def to_uint8(images: Tensor) -> Tensor:
    """Convert images from [-1, 1] to 8-bit values.

    -1 becomes 0 and 1 becomes 255. Values outside, infinities too, are clamped. NaN becomes 0, with
    a RuntimeWarning that counts it.

    Args:
        images: Floating-point [N, C, H, W].

    Returns:
        uint8 [N, H, W, C] on the same device.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: `images` has another number of dimensions.
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
    """Arrange images in a grid on grey, row by row.

    Args:
        images: Floating-point [N, C, H, W] in [-1, 1], N >= 1, C 1 or 3 (see `to_uint8`).
        columns: Images in a row. None: about as many as there are rows.
        padding: Width of the grey border of each image, in pixels.
        scale: Each pixel becomes a square of scale x scale. None: small images are enlarged to at
            most 96 pixels a side.
        row_names: A name for each row, written at the left, or none.
        column_names: A name for each column, written above, or none.

    Returns:
        A PIL image in mode L or RGB.

    Raises:
        TypeError: `images` is no floating-point tensor, or a number is no integer.
        ValueError: an argument is out of range.
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
    """Return the grid with names in a margin, in the largest font that fits the columns."""
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
    named = Image.new(grid.mode, size_px, (BACKGROUND,) * bands)
    named.paste(grid, (left, top))
    draw, ink = ImageDraw.Draw(named), (INK,) * bands
    middle = padding / 2
    for i, name in enumerate(row_names):
        y = top + middle + (i + 0.5) * cell[1]
        draw.text((left - gap, y), name, ink, font, anchor="rm")
    for i, name in enumerate(column_names):
        x = left + middle + (i + 0.5) * cell[0]
        draw.text((x, top), name, ink, font, anchor="md")
    return named


def save_png(image: Image.Image, path: PathLike) -> None:
    """Write a PIL image as PNG with `files.atomic_write`.

    Args:
        image: The image.
        path: Name of the file; an existing file is replaced.

    Raises:
        OSError: with the path and the reason, if the file cannot be written.
    """
    # Encoded in memory: an error of the disk then keeps its errno.
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    with atomic_write(path) as file:
        file.write(encoded.getbuffer())


def save_npy(array: np.ndarray, path: PathLike) -> None:
    """Write an array as .npy (format 1.0, C order) with `files.atomic_write`.

    Args:
        array: An array of numbers.
        path: Name of the file; an existing file is replaced.

    Raises:
        TypeError: the array holds Python objects, which would be pickled.
        OSError: with the path and the reason, if the file cannot be written.
    """
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise TypeError(f"array must hold numbers; got dtype {array.dtype}")
    with atomic_write(path) as file:
        # np.save loses the errno of the disk.
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def save_images(images: Tensor, folder: PathLike, first_index: int = 0) -> list[Path]:
    """Write each image as a PNG file, named 00000.png, 00001.png, ...

    An error leaves the complete files written before it.

    Args:
        images: As in `sheet`; N may be 0.
        folder: An existing folder.
        first_index: Number in the name of the first file, at least 0.

    Returns:
        The paths of the files.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: `images` cannot be drawn.
        OSError: with the path and the reason, if a file cannot be written.
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


def decode_image(content: bytes) -> Image.Image:
    """Decode an image file in one of `FORMATS`.

    The image is rotated as its EXIF orientation says. 16-bit grey is rounded to 8 bits.
    Transparent pixels are composited on white.

    Args:
        content: The bytes of the file.

    Returns:
        A PIL image in mode L if the file is grey, else RGB.

    Raises:
        Exception: Pillow's decoders raise errors of many types for damaged files.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode} is not supported; 8 bits a channel and 16-bit grey are"
        )
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def open_image(path: PathLike) -> Image.Image:
    """Read an image file; see `decode_image`.

    Raises:
        ValueError: the file is no image that can be decoded; the message names it.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        return decode_image(content)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is no image that can be read") from error
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL image in mode L or RGB to float32 [C, H, W] in [-1, 1], C 1 or 3."""
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1)


def read_image(path: PathLike, sample_shape: tuple[int, int, int]) -> Tensor:
    """Read an image file of a given shape.

    Args:
        path: An image file in one of `FORMATS`.
        sample_shape: (C, H, W). For C = 1 a colour image with equal channels is accepted, for
            C = 3 a grey one.

    Returns:
        float32 [C, H, W] in [-1, 1].

    Raises:
        ValueError: the file cannot be decoded, or has another shape; the message names it.
        OSError: the file cannot be read.
    """
    image = to_tensor(open_image(path))
    channels, *size = sample_shape
    if len(image) == 3 and channels == 1 and (image == image[:1]).all():
        image = image[:1]
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if list(image.shape) != [channels, *size]:
        raise ValueError(f"{path}: must be {_text(sample_shape)}; got {_text(image.shape)}")
    return image


def read_images(
    path: PathLike, sample_shape: tuple[int, int, int], num: int | None = None
) -> Tensor:
    """Read images of one shape from an array or a folder.

    Args:
        path: A .npy file of uint8 (0 is -1, 255 is 1) or of floats in [-1, 1], [N, C, H, W] or, for
            C = 1, [N, H, W]; or a folder of image files (see `SUFFIXES`), read in the order of
            their names.
        sample_shape: (C, H, W), as in `read_image`.
        num: Number of images, the first ones. None: all.

    Returns:
        float32 [N, C, H, W] in [-1, 1].

    Raises:
        ValueError: an image is damaged, of another shape or out of range, or there are none or
            fewer than `num`; the message names the file.
        OSError: a file cannot be read.
    """
    path = Path(path)
    read = _read_folder if path.is_dir() else _read_array
    images = read(path, sample_shape, num)
    if num is not None and len(images) < num:
        raise ValueError(f"{path}: must hold at least {num} images; got {len(images)}")
    return images


def _read_folder(folder: Path, sample_shape: tuple[int, int, int], num: int | None) -> Tensor:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return torch.stack([read_image(path, sample_shape) for path in files[:num]])


def _read_array(path: Path, sample_shape: tuple[int, int, int], num: int | None) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: is neither a .npy file nor a folder of images") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: must be one array (.npy); got several")
    shapes = [sample_shape, sample_shape[1:]] if sample_shape[0] == 1 else [sample_shape]
    if array.shape[1:] not in shapes or len(array) == 0:
        accepted = " or ".join(f"[N, {', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{path}: must be {accepted}, N >= 1; got {list(array.shape)}")
    selected = array[:num]
    if selected.dtype == np.uint8:
        values = selected.astype(np.float32) / np.float32(127.5) - 1
    elif selected.dtype.kind == "f":
        values = selected.astype(np.float32)
    else:
        raise ValueError(f"{path}: must be uint8 or floats in [-1, 1]; got {array.dtype}")
    if not (np.abs(values) <= 1).all():
        low, high = values.min(), values.max()
        raise ValueError(f"{path}: floats must lie in [-1, 1]; got {low:g} to {high:g}")
    return torch.from_numpy(values.reshape(-1, *sample_shape))


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
