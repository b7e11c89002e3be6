"""A folder of images: each file is looked at once at the start, and decoded when it is used."""

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

NAMED = 5  # files that an error names before it counts the rest

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class FoundFile:
    """What is known of a file once it has been decoded; ``fault`` is why it cannot be."""

    path: Path
    size: tuple[int, int] = (0, 0)  # width, height
    grey: bool = True
    digest: str = ""
    fault: str = ""


def image_paths(folder: Path) -> list[Path]:
    """The images below a folder by their suffix, sorted; names that begin with a dot are not read.

    Links are followed. Raises NotADirectoryError for what is no folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is no folder", str(folder))
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _look(path: Path) -> FoundFile:
    try:
        content = path.read_bytes()
        image = decode_image(content)
    except Exception as error:  # Pillow's decoders raise what they like
        return FoundFile(path, fault=f"{type(error).__name__}: {error}")
    return FoundFile(path, image.size, image.mode == "L", hashlib.sha256(content).hexdigest())


def look_at(paths: Sequence[Path]) -> list[FoundFile]:
    """Read and decode each file once, on several threads; a bar is shown where it takes long."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = pool.map(_look, paths)
        return list(tqdm(looks, "reading images", len(paths), delay=2, leave=False))


def without_broken(files: Sequence[FoundFile], folder: Path, skip_broken: bool) -> list[FoundFile]:
    """The files that can be decoded, at least one.

    Raises ValueError naming the others, or logs each (logger ``ddpm_fast``, WARNING) where
    ``skip_broken``. Raises ValueError where none is left.
    """
    if not files:
        raise ValueError(f"{folder} holds no images, which are named {' '.join(SUFFIXES)}")
    broken = [file for file in files if file.fault]
    if broken and not skip_broken:
        names = "; ".join(f"{file.path} ({file.fault})" for file in broken[:NAMED])
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise ValueError(
            f"{len(broken)} of {len(files)} images in {folder} cannot be read: {names}{more};"
            " remove them, or go on without them by skip_broken (--skip-broken)"
        )
    for file in broken:
        _log.warning("skipped %s: %s", file.path, file.fault)
    if len(broken) == len(files):
        raise ValueError(f"none of the {len(files)} images in {folder} can be read")
    return [file for file in files if not file.fault]


def class_of(path: Path, folder: Path) -> str:
    """The name of the sub-folder of ``folder`` that a file lies in, at any depth.

    Raises ValueError for a file that lies in the folder itself.
    """
    first, *rest = path.relative_to(folder).parts
    if not rest:
        raise ValueError(
            f"{path} lies in no sub-folder; with labels the sub-folders of {folder} are the classes"
        )
    return first


class FolderImages:
    """Files decoded as they are asked for; an `ImageSource`.

    files: at least one, each below ``folder`` and without a fault. transform: what makes a float32
    tensor [C, H, W] of a picture in mode L or RGB. side: of the squares that it makes; None where
    it keeps the size. channels: 1 or 3; None is 1 where all files are grey.

    Raises ValueError naming two files of different sizes where the size is kept.
    """

    def __init__(
        self,
        files: Sequence[FoundFile],
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
                "images must have one size, or be given one by resize (--resize);"
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
        except Exception as error:  # Pillow's decoders raise what they like
            raise ValueError(f"{path} cannot be read any more: {error}") from error
        image = self._transform(decoded.convert(self._mode))
        if image.shape != self.sample_shape:
            raise ValueError(
                f"{path} has become {list(image.shape)}; it was {list(self.sample_shape)}"
            )
        return image

    def digest(self) -> str:
        """The SHA-256 of the files' names below the folder and their content."""
        return self._digest


def _size_text(file: FoundFile) -> str:
    return f"{file.size[0]} x {file.size[1]} pixels"
