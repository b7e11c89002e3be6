"""`ddpm-fast noise`: add noise to an image under several schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from ddpm_fast.cli.model import SeedOption
from ddpm_fast.cli.schedules import SCHEDULES, schedule_of
from ddpm_fast.diffusion.forward import q_sample
from ddpm_fast.ops.philox import STREAM_TRAINING, philox_normal
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import open_image, save_png, sheet, to_tensor

T = 1000
LARGEST = 128  # pixels of the longer side of an image that --size does not set


def noise(
    image: Annotated[Path, typer.Argument(help="An image: PNG, JPEG, ...", show_default=False)],
    schedules: Annotated[
        str,
        typer.Option(
            help=f"Noise schedules, separated by commas: {', '.join(SCHEDULES)}; arguments after"
            " colons, as power:2 (the exponent) or linear:0.0001:0.02 (first and last beta)."
        ),
    ] = "linear,sine_wave,power:1.5,power:2,power:10",
    columns: Annotated[
        int,
        typer.Option(min=2, max=T, help=f"Number of timesteps, evenly spaced over 0 .. {T - 1}."),
    ] = 8,
    seed: SeedOption = 0,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Pixels of the image's longer side.",
            show_default=f"the image's, at most {LARGEST}",
        ),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Pixels of the sheet per pixel of the image.",
            show_default="larger for small images",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File of the sheet, a .png.")] = Path("out/noise.png"),
) -> None:
    """Add noise to an image under several schedules.

    Each row shows x_t of a schedule at a few timesteps t. All rows use the same noise.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out must be a .png file; got {str(out)!r}")
    x0 = _read_image(image, size)
    names = [name.strip() for name in schedules.split(",")]
    chosen = [schedule_of("--schedules", name, T) for name in names]
    prepare_folder(out.parent)

    t = torch.tensor([round(i * (T - 1) / (columns - 1)) for i in range(columns)])
    batch = x0.expand(columns, *x0.shape).contiguous(memory_format=torch.channels_last)
    z = philox_normal(columns, x0.shape, seed, STREAM_TRAINING)
    rows = [q_sample(batch, t, z, schedule) for schedule in chosen]
    headings = [f"t = {i}" for i in t.tolist()]
    save_png(sheet(torch.cat(rows), columns, 4, scale, names, headings), out)
    typer.echo(f"wrote    {out}")


def _read_image(path: Path, size: int | None) -> Tensor:
    """Read an image: float32 [C, H, W] in [-1, 1], C = 1 if grey and else 3, on white."""
    opened = open_image(path)
    longer = max(opened.size)
    wanted = min(longer, LARGEST) if size is None else size
    if wanted != longer:
        shape = [max(1, round(side * wanted / longer)) for side in opened.size]
        opened = opened.resize((shape[0], shape[1]), Image.Resampling.LANCZOS)
    return to_tensor(opened)
