"""Folders of images: each file is decoded once to check it, and again whenever it is used."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpm_fast.utils.images import SUFFIXES, decode_image

MAX_NAMED = 5  # files that an error message names

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class ImageFile:
    """Facts about a file that has been decoded.

    Attributes:
        path: The file.
        size: Width and height in pixels.
        grey: True for a greyscale image.
        digest: SHA-256 of the file, in hex.
        error: Reason why the file cannot be decoded; empty if it can be.
    """

    path: Path
    size: tuple[int, int] = (0, 0)
    grey: bool = True
    digest: str = ""
    error: str = ""


def image_paths(folder: Path) -> list[Path]:
    """Find images below a folder by their suffixes.

    Follows links. Names that begin with a dot are skipped.

    Args:
        folder: The folder.

    Returns:
        Sorted paths.

    Raises:
        NotADirectoryError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder", str(folder))
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _inspect(path: Path) -> ImageFile:
    try:
        content = path.read_bytes()
        image = decode_image(content)
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        return ImageFile(path, error=f"{type(error).__name__}: {error}")
    return ImageFile(path, image.size, image.mode == "L", hashlib.sha256(content).hexdigest())


def inspect_files(paths: Sequence[Path]) -> list[ImageFile]:
    """Decode each file once, on several threads, with a progress bar if it takes long."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(_inspect, paths)
        return list(tqdm(found, "reading images", len(paths), delay=2, leave=False))


def readable_files(files: Sequence[ImageFile], folder: Path, skip_broken: bool) -> list[ImageFile]:
    """Return the files that can be decoded, at least one.

    Args:
        files: Files of `inspect_files`.
        folder: Their folder, for messages.
        skip_broken: Log broken files (logger `ddpm_fast`, WARNING) instead of raising.

    Raises:
        ValueError: there is a broken file and `skip_broken` is False, or no file is left.
    """
    if not files:
        raise ValueError(f"{folder} must contain images ({' '.join(SUFFIXES)}); got none")
    broken = [file for file in files if file.error]
    if broken and not skip_broken:
        names = "; ".join(f"{file.path} ({file.error})" for file in broken[:MAX_NAMED])
        more = f"; and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        raise ValueError(
            f"{len(broken)} of {len(files)} images in {folder} cannot be read: {names}{more};"
            " remove them, or skip them by skip_broken (--skip-broken)"
        )
    for file in broken:
        _log.warning("skipped %s: %s", file.path, file.error)
    if len(broken) == len(files):
        raise ValueError(f"none of the {len(files)} images in {folder} can be read")
    return [file for file in files if not file.error]


def class_of(path: Path, folder: Path) -> str:
    """Return the name of the sub-folder of `folder` that contains a file, at any depth.

    Raises:
        ValueError: the file is in the folder itself.
    """
    first, *below = path.relative_to(folder).parts
    if not below:
        raise ValueError(
            f"{path} must be in a sub-folder of {folder}: the sub-folders are the classes"
        )
    return first


class FolderImages:
    """`ImageSource` that decodes a file whenever its image is used.

    Args:
        files: At least one file below `folder`, without an error.
        folder: The folder.
        transform: Converts an image in mode L or RGB to a float32 tensor [C, H, W].
        side: Side of the square images of `transform`. None: it keeps the size.
        channels: 1 or 3. None: 1 if all files are grey, else 3.

    Raises:
        ValueError: the size is kept and two files differ in size; the message names them.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        folder: Path,
        transform: Callable[[Image.Image], Tensor],
        side: int | None = None,
        channels: int | None = None,
    ) -> None:
        self._transform = transform
        first = files[0]
        other = next((file for file in files if file.size != first.size), None)
        if side is None and other is not None:
            raise ValueError(
                "images must have the same size, or be resized by resize (--resize);"
                f" {first.path} has {_size_text(first)}, {other.path} {_size_text(other)}"
            )
        if channels is None:
            channels = 1 if all(file.grey for file in files) else 3
        width, height = first.size if side is None else (side, side)
        self.sample_shape = (channels, height, width)
        self._mode = "L" if channels == 1 else "RGB"
        self._paths = [str(file.path) for file in files]
        names = [(file.path.relative_to(folder).as_posix(), file.digest) for file in files]
        self._digest = hashlib.sha256(repr(names).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self._paths[index]
        try:
            decoded = decode_image(Path(path).read_bytes())
        except Exception as error:  # Pillow's decoders raise exceptions of any type
            raise ValueError(f"{path} can no longer be read: {error}") from error
        image = self._transform(decoded.convert(self._mode))
        if image.shape != self.sample_shape:
            raise ValueError(
                f"{path} must be {list(self.sample_shape)} as before; got {list(image.shape)}"
            )
        return image

    def digest(self) -> str:
        """Return the SHA-256 of the files' names below the folder and their content."""
        return self._digest


def _size_text(file: ImageFile) -> str:
    return f"{file.size[0]} x {file.size[1]} pixels"
