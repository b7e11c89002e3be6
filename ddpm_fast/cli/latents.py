"""``ddpm-fast encode``, ``decode`` and ``interpolate``: images to latent codes and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.methods import spacing_of
from ddpm_fast.cli.model import (
    SHIPPED,
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    LabelOption,
    ModelOption,
    OpenModel,
    ProgressOption,
    VariantOption,
    clip_of,
)
from ddpm_fast.cli.output import FormOption, Output, check_drawable, check_file, say
from ddpm_fast.sampling.codec import MODES, Codec
from ddpm_fast.utils.images import read_image, read_images, save_npy, save_png, sheet

STEPS = 50

StepsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Steps of the chain, either way.", show_default=f"{STEPS}"),
]
SpacingOption = Annotated[
    str, typer.Option(help="Of the timesteps: linspace, leading, trailing or quad.")
]
TimestepOption = Annotated[
    int | None,
    typer.Option("--t", min=0, help="Timestep of the codes, from 0.", show_default="the last"),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images at a time; sets their last bits.")]
ClipOption = Annotated[
    str, typer.Option(help="Of x0: none, a bound, or dynamic[:QUANTILE[:CAP]]; cuts encodings.")
]


def encode(
    data: DataOption,
    model: ModelOption = SHIPPED,
    variant: VariantOption = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="The first images alone.", show_default="all")
    ] = None,
    steps: StepsOption = None,
    spacing: SpacingOption = "linspace",
    clip: ClipOption = "none",
    t: TimestepOption = None,
    label: LabelOption = None,
    batch: BatchOption = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    engine: EngineOption = True,
    out: Annotated[Path, typer.Option(help="The codes, a .npy of float32 [num, C, H, W].")] = Path(
        "out/codes.npy"
    ),
    picture: Annotated[
        Path | None,
        typer.Option(help="Also decode, and draw images, codes and what came back, as a .png."),
    ] = None,
    progress: ProgressOption = True,
) -> None:
    """Encode images by the ODE of DDIM run from x_0 to noise."""
    check_file("--out", out, ".npy")
    if picture is not None:
        check_file("--picture", picture, ".png")
    opened = OpenModel.open(model, variant, device, dtype, engine)
    codec = _codec(opened, steps, spacing, clip, batch, backend)
    images = read_images(data, opened.sample_shape, num)
    labels = opened.labels(label, len(images))
    if picture is not None:
        check_drawable("--picture", opened.sample_shape[0], model)
    say("model", opened.in_words)
    say("data", f"{data}, {len(images)} image{'s' if len(images) > 1 else ''}")
    say("device", device_text(opened.device))
    begun = time.perf_counter()
    codes = codec.encode(images, t, labels, progress)
    back = None if picture is None else codec.decode(codes, t, labels, progress)
    say("time", f"{time.perf_counter() - begun:.1f} s")
    say("codes", f"mean {float(codes.mean()):.3f}, standard deviation {float(codes.std()):.3f}")
    save_npy(codes.cpu().numpy(), out)
    say("wrote", str(out))
    if picture is not None and back is not None:
        error = (back.cpu() - images).square().mean().sqrt()
        say("decoded", f"rms {float(error):.4f} from the images")
        shown = [images[:8], _visible(codes[:8].cpu()), back[:8].cpu()]
        rows = ["image", "code", "decoded"]
        save_png(sheet(torch.cat(shown), len(images[:8]), 4, None, rows), picture)
        say("wrote", str(picture))


def decode(
    codes: Annotated[
        Path, typer.Argument(help="A .npy of float32 [N, C, H, W], as encode writes it.")
    ],
    model: ModelOption = SHIPPED,
    variant: VariantOption = None,
    steps: StepsOption = None,
    spacing: SpacingOption = "linspace",
    clip: ClipOption = "none",
    t: TimestepOption = None,
    label: LabelOption = None,
    batch: BatchOption = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    engine: EngineOption = True,
    out: Annotated[str, typer.Option(help="A .png (one sheet), a .npy or a folder.")] = (
        "out/decoded.png"
    ),
    form: FormOption = None,
    progress: ProgressOption = True,
) -> None:
    """Decode latent codes by DDIM without noise (eta = 0)."""
    output = Output.parse(out, form)
    opened = OpenModel.open(model, variant, device, dtype, engine)
    codec = _codec(opened, steps, spacing, clip, batch, backend)
    try:
        given = torch.from_numpy(np.load(codes, allow_pickle=False)).float()
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{codes}: is no .npy of numbers that can be read") from error
    if given.ndim != 4 or tuple(given.shape[1:]) != opened.sample_shape:
        wanted = ", ".join(map(str, opened.sample_shape))
        raise ValueError(f"{codes}: must be [N, {wanted}]; got {list(given.shape)}")
    output.check_channels(opened.sample_shape[0], "the model")
    output.prepare()
    images = codec.decode(given, t, opened.labels(label, len(given)), progress)
    say("wrote", output.write(images.cpu(), 0, None))


def interpolate(
    first: Annotated[Path, typer.Argument(help="A picture of the model's size.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    model: ModelOption = SHIPPED,
    variant: VariantOption = None,
    frames: Annotated[int, typer.Option(min=2, help="Images, evenly from one to the other.")] = 9,
    mode: Annotated[str, typer.Option(help=f"{', '.join(MODES)}.")] = "latent-slerp",
    t: Annotated[
        int | None,
        typer.Option(
            "--t",
            min=0,
            help="Timestep to mix at.",
            show_default="the last; stochastic: the middle",
        ),
    ] = None,
    steps: StepsOption = None,
    spacing: SpacingOption = "linspace",
    clip: ClipOption = "none",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of stochastic.")] = 0,
    label: LabelOption = None,
    batch: BatchOption = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    engine: EngineOption = True,
    out: Annotated[str, typer.Option(help="A .png (one row), a .npy or a folder.")] = (
        "out/interpolation.png"
    ),
    form: FormOption = None,
    progress: ProgressOption = True,
) -> None:
    """Interpolate between two pictures through the model."""
    output = Output.parse(out, form)
    opened = OpenModel.open(model, variant, device, dtype, engine)
    codec = _codec(opened, steps, spacing, clip, batch, backend)
    x_a, x_b = (read_image(path, opened.sample_shape)[None] for path in (first, second))
    output.check_channels(opened.sample_shape[0], "the model")
    output.prepare()
    weights = [i / (frames - 1) for i in range(frames)]
    chosen: Any = mode
    labels = opened.labels(label, 1)
    images = codec.interpolate(x_a, x_b, weights, chosen, t, seed, labels, progress)[:, 0].cpu()
    if output.form == "png" and not output.is_folder:
        save_png(sheet(images, frames), output.path)
        say("wrote", str(output.path))
    else:
        say("wrote", output.write(images, 0, None))


def _codec(
    opened: OpenModel, steps: int | None, spacing: str, clip: str, batch: int, backend: str
) -> Codec:
    return Codec(
        opened.network,
        opened.schedule,
        opened.sample_shape,
        min(STEPS, opened.schedule.T) if steps is None else steps,
        opened.prediction,
        clip_of(clip, None),
        spacing_of(spacing),
        opened.variance,
        micro_batch=batch,
        device=opened.device,
        backend=backend,
    )


def _visible(codes: Tensor) -> Tensor:
    """Codes as pictures: two standard deviations of N(0, 1) are black and white."""
    return (codes / 2).clamp(-1, 1)
