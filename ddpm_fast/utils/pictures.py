"""Images from disk: pictures and arrays, as float32 in [-1, 1]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg")


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A picture in mode L or RGB, upright: 16 bits rounded to 8, transparency laid on white.

    Raises ValueError naming the file where it is none that can be read, OSError from the disk.
    """
    try:
        with Image.open(path) as file:
            return _flat(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is no picture that can be read") from error
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: cannot be read: {error}") from error


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture in mode L or RGB as float32 [C, H, W] in [-1, 1], C 1 or 3."""
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1)
    return torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1)


def read_images(
    path: str | os.PathLike[str], sample_shape: tuple[int, int, int], num: int | None = None
) -> Tensor:
    """Images of one shape (C, H, W), float32 [N, C, H, W] in [-1, 1]; num: the first ones alone.

    path: a .npy of uint8 (0 is -1, 255 is 1) or of floats in [-1, 1], [N, C, H, W] or, for C = 1,
    [N, H, W]; or a folder of PNG and JPEG pictures, read in the order of their names. Of a picture,
    colours become grey where its channels are equal, and grey becomes colours.

    Raises ValueError naming the file that is broken, of another shape or out of range, or where
    there are none or fewer than num; OSError from the disk.
    """
    path = Path(path)
    read = _of_folder if path.is_dir() else _of_array
    images = read(path, sample_shape, num)
    if num is not None and len(images) < num:
        raise ValueError(f"{path}: holds {len(images)} images; asked for {num}")
    return images


def _of_folder(folder: Path, sample_shape: tuple[int, int, int], num: int | None) -> Tensor:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"{folder}: holds no pictures ({', '.join(ENDINGS)})")
    return torch.stack([read_image(path, sample_shape) for path in files[:num]])


def read_image(path: str | os.PathLike[str], sample_shape: tuple[int, int, int]) -> Tensor:
    """A picture of that shape (C, H, W), float32 in [-1, 1]; otherwise as `read_images`."""
    image = to_tensor(read_picture(path))
    channels, *size = sample_shape
    if len(image) == 3 and channels == 1 and (image == image[:1]).all():
        image = image[:1]
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if list(image.shape) != [channels, *size]:
        raise ValueError(f"{path}: must be {_text(sample_shape)}; got {_text(image.shape)}")
    return image


def _of_array(path: Path, sample_shape: tuple[int, int, int], num: int | None) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: is no .npy that can be read, nor a folder") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: holds several arrays; a .npy of one is read")
    shapes = [sample_shape, sample_shape[1:]] if sample_shape[0] == 1 else [sample_shape]
    if array.shape[1:] not in shapes or len(array) == 0:
        accepted = " or ".join(f"[N, {', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{path}: must be {accepted}, N >= 1; got {list(array.shape)}")
    kept = array[:num]
    if kept.dtype == np.uint8:
        values = kept.astype(np.float32) / np.float32(127.5) - 1
    elif kept.dtype.kind == "f":
        values = kept.astype(np.float32)
    else:
        raise ValueError(f"{path}: must be uint8 or floats in [-1, 1]; got {array.dtype}")
    if not (np.abs(values) <= 1).all():
        low, high = values.min(), values.max()
        raise ValueError(f"{path}: floats must lie in [-1, 1]; got {low:g} to {high:g}")
    return torch.from_numpy(values.reshape(-1, *sample_shape))


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _flat(picture: Image.Image) -> Image.Image:
    """Mode L or RGB: 16 bits rounded to 8, transparency laid on white."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} is not supported; 8 or 16 bits a channel are")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
