"""Files that the commands write: samples as a sheet, an array or a folder; tables and figures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_images, save_npy, save_png, sheet

FORMATS = ("png", "npy")
FormOption = Annotated[
    str | None,
    typer.Option(
        "--format", help=f"File format: {' or '.join(FORMATS)}.", show_default="as --out, or png"
    ),
]
# Suffixes of file formats that are not supported; other suffixes can be a folder's.
_OTHER_FILES = {".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npz", ".pt"}


def say(what: str, text: str) -> None:
    """Print a line of a command's report."""
    typer.echo(f"{what:<9}{text}")


@dataclass(frozen=True)
class Output:
    """File or folder for samples.

    Attributes:
        path: The file, or the folder for one file per image (png) or `samples.npy`.
        form: "png" or "npy".
        is_folder: True if `path` is a folder.
    """

    path: Path
    form: str
    is_folder: bool

    @classmethod
    def parse(cls, out: str, form: str | None) -> Output:
        """Parse `--out` and `--format`; paths that do not end in .png or .npy are folders.

        Raises:
            ValueError: they contradict each other, or the file format is not supported.
        """
        if form not in (None, *FORMATS):
            raise ValueError(f"--format must be png or npy; got {form!r}")
        path = Path(out)
        suffix = path.suffix.lower()
        if out.endswith(os.sep) or path.is_dir() or suffix.removeprefix(".") not in FORMATS:
            if suffix in _OTHER_FILES and not path.is_dir():
                raise ValueError(f"--out must end in .png or .npy, or be a folder; got {out!r}")
            return cls(path, form or "png", True)
        if form not in (None, suffix.removeprefix(".")):
            raise ValueError(f"--format {form} does not fit --out {out}")
        return cls(path, suffix.removeprefix("."), False)

    def check_channels(self, channels: int, model: str) -> None:
        """Check that the format can hold images of a model. Raises ValueError."""
        if self.form == "png":
            check_drawable("--format png", channels, model, "; take --format npy")

    def prepare(self) -> None:
        """Create the folder and check that it can be written to. Raises OSError."""
        prepare_folder(self.path if self.is_folder else self.path.parent)

    def write(self, samples: Tensor, first_sample: int, scale: int | None) -> str:
        """Write samples, float [N, C, H, W]; returns the names of the files."""
        if self.form == "npy":
            path = self.path / "samples.npy" if self.is_folder else self.path
            save_npy(samples.cpu().numpy(), path)
            return str(path)
        if self.is_folder:
            paths = save_images(samples, self.path, first_sample)
            last = f" .. {paths[-1].name}" if len(paths) > 1 else ""
            return f"{paths[0]}{last}"
        save_png(sheet(samples, scale=scale), self.path)
        return str(self.path)


def check_drawable(option: str, channels: int, model: str, advice: str = "") -> None:
    """Check that images of a model have 1 or 3 channels. Raises ValueError naming the option."""
    if channels not in (1, 3):
        raise ValueError(f"{option} needs 1 or 3 channels; {model} has {channels}{advice}")


def check_file(option: str, path: Path, suffix: str) -> None:
    """Check that a file can be created, before the work begins.

    Raises:
        ValueError: naming the option, for another suffix or a folder.
        OSError: the folder cannot be written to.
    """
    if path.suffix.lower() != suffix or path.is_dir():
        raise ValueError(f"{option} must be a {suffix} file; got {str(path)!r}")
    prepare_folder(path.parent)
