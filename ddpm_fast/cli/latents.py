"""`ddpm-fast encode`, `decode` and `interpolate`: images to latent codes and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.methods import spacing_of
from ddpm_fast.cli.model import (
    BackendOption,
    BatchOption,
    DataOption,
    ModelOptions,
    NumOption,
    OpenModel,
    clip_of,
)
from ddpm_fast.cli.output import FormOption, Output, check_drawable, check_file, say
from ddpm_fast.diffusion.timesteps import SPACINGS
from ddpm_fast.sampling.codec import MODES, Codec
from ddpm_fast.utils.images import read_image, read_images, save_npy, save_png, sheet

STEPS = 50

TimestepOption = Annotated[
    int | None,
    typer.Option("--t", min=0, help="Timestep of the codes, from 0.", show_default="the last"),
]


@dataclass(frozen=True)
class CodecOptions(ModelOptions):
    """Options of the commands that run a `Codec`."""

    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps in each direction.", show_default=f"{STEPS}"),
    ] = None
    spacing: Annotated[
        str, typer.Option(help=f"Spacing of the timesteps: {', '.join(SPACINGS)}.")
    ] = "linspace"
    clip: Annotated[
        str,
        typer.Option(
            help="Clipping of x0: none, a bound, or dynamic[:QUANTILE[:CAP]]. Clipped encodings"
            " cannot be decoded exactly."
        ),
    ] = "none"
    batch: BatchOption = 64
    backend: BackendOption = "auto"

    def codec(self, opened: OpenModel) -> Codec:
        """Create the codec of a checkpoint."""
        return Codec(
            opened.network,
            opened.schedule,
            opened.sample_shape,
            min(STEPS, opened.schedule.T) if self.steps is None else self.steps,
            opened.prediction,
            clip_of(self.clip, None),
            spacing_of(self.spacing),
            opened.variance,
            micro_batch=self.batch,
            device=opened.device,
            backend=self.backend,
        )


def encode(
    data: DataOption,
    model: CodecOptions,
    num: NumOption = None,
    t: TimestepOption = None,
    out: Annotated[Path, typer.Option(help="The codes, a .npy of float32 [num, C, H, W].")] = Path(
        "out/codes.npy"
    ),
    image_path: Annotated[
        Path | None,
        typer.Option(
            "--picture", help="Also decode the codes, and draw images, codes and decoded images."
        ),
    ] = None,
) -> None:
    """Encode images to latent codes by the ODE of DDIM, from x_0 to noise."""
    check_file("--out", out, ".npy")
    if image_path is not None:
        check_file("--picture", image_path, ".png")
    opened = model.open()
    codec = model.codec(opened)
    images = read_images(data, opened.sample_shape, num)
    labels = opened.labels(model.label, len(images))
    if image_path is not None:
        check_drawable("--picture", opened.sample_shape[0], model.model)
    say("model", opened.description)
    say("data", f"{data}, {len(images)} image{'s' if len(images) > 1 else ''}")
    say("device", device_text(opened.device))
    begun = time.perf_counter()
    codes = codec.encode(images, t, labels, model.progress)
    back = None if image_path is None else codec.decode(codes, t, labels, model.progress)
    say("time", f"{time.perf_counter() - begun:.1f} s")
    say("codes", f"mean {float(codes.mean()):.3f}, standard deviation {float(codes.std()):.3f}")
    save_npy(codes.cpu().numpy(), out)
    say("wrote", str(out))
    if image_path is not None and back is not None:
        error = (back.cpu() - images).square().mean().sqrt()
        say("decoded", f"rms {float(error):.4f} from the images")
        shown = [images[:8], _visible(codes[:8].cpu()), back[:8].cpu()]
        rows = ["image", "code", "decoded"]
        save_png(sheet(torch.cat(shown), len(images[:8]), 4, None, rows), image_path)
        say("wrote", str(image_path))


def decode(
    codes: Annotated[
        Path, typer.Argument(help="A .npy of float32 [N, C, H, W], as encode writes it.")
    ],
    model: CodecOptions,
    t: TimestepOption = None,
    out: Annotated[str, typer.Option(help="A .png (one sheet), a .npy or a folder.")] = (
        "out/decoded.png"
    ),
    form: FormOption = None,
) -> None:
    """Decode latent codes to images by DDIM without noise (eta = 0)."""
    output = Output.parse(out, form)
    opened = model.open()
    codec = model.codec(opened)
    try:
        latents = torch.from_numpy(np.load(codes, allow_pickle=False)).float()
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{codes}: must be a readable .npy of numbers") from error
    if latents.ndim != 4 or tuple(latents.shape[1:]) != opened.sample_shape:
        wanted = ", ".join(map(str, opened.sample_shape))
        raise ValueError(f"{codes}: must be [N, {wanted}]; got {list(latents.shape)}")
    output.check_channels(opened.sample_shape[0], "the model")
    output.prepare()
    images = codec.decode(latents, t, opened.labels(model.label, len(latents)), model.progress)
    say("wrote", output.write(images.cpu(), 0, None))


def interpolate(
    first: Annotated[Path, typer.Argument(help="An image of the model's size.")],
    second: Annotated[Path, typer.Argument(help="Another image of this size.")],
    model: CodecOptions,
    frames: Annotated[int, typer.Option(min=2, help="Number of images, both ends included.")] = 9,
    mode: Annotated[str, typer.Option(help=f"Interpolation: {', '.join(MODES)}.")] = "latent-slerp",
    t: Annotated[
        int | None,
        typer.Option(
            "--t",
            min=0,
            help="Timestep at which the images are mixed.",
            show_default="the last; stochastic: the middle",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise of stochastic.")] = 0,
    out: Annotated[str, typer.Option(help="A .png (one row), a .npy or a folder.")] = (
        "out/interpolation.png"
    ),
    form: FormOption = None,
) -> None:
    """Interpolate between two images through the latent codes of a model."""
    output = Output.parse(out, form)
    opened = model.open()
    codec = model.codec(opened)
    x_a, x_b = (read_image(path, opened.sample_shape)[None] for path in (first, second))
    output.check_channels(opened.sample_shape[0], "the model")
    output.prepare()
    weights = [i / (frames - 1) for i in range(frames)]
    chosen: Any = mode
    labels = opened.labels(model.label, 1)
    images = codec.interpolate(x_a, x_b, weights, chosen, t, seed, labels, model.progress)[
        :, 0
    ].cpu()
    if output.form == "png" and not output.is_folder:
        save_png(sheet(images, frames), output.path)
        say("wrote", str(output.path))
    else:
        say("wrote", output.write(images, 0, None))


def _visible(codes: Tensor) -> Tensor:
    """Scale codes to images: two standard deviations of N(0, 1) are black and white."""
    return (codes / 2).clamp(-1, 1)
