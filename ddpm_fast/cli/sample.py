"""`ddpm-fast sample`: sample images from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.methods import CPU_STEPS, METHODS, start_of, table_of
from ddpm_fast.cli.model import BackendOption, BatchOption, ModelOptions, SeedOption, clip_of
from ddpm_fast.cli.output import FormOption, Output, check_drawable, say
from ddpm_fast.diffusion.timesteps import SPACINGS
from ddpm_fast.ops.row import column
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_png, sheet

STRIP_STATES = 10


def sample(
    model: ModelOptions,
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    method: Annotated[str, typer.Option(help=f"Solver: {', '.join(METHODS)}.")] = "ddpm",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sampling steps.",
            show_default=f"ddpm: all on a GPU, {CPU_STEPS} on a CPU; dpmpp, unipc: 20; others: 50",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            help=f"Spacing of the timesteps: {', '.join(SPACINGS)}.",
            show_default="the method's",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Noise of ddim: 0 is none, 1 as much as ddpm.", show_default="0"),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="Clipping of x0: none, a bound, or dynamic[:QUANTILE[:CAP]] for each image.",
            show_default="the model's",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Step that starts from noise, from 1; or random, for each image.",
            show_default="the last",
        ),
    ] = None,
    variance: Annotated[
        str | None,
        typer.Option(
            help="Variance of ddpm: posterior, beta (both also with _log), learned or"
            " learned_range.",
            show_default="the model's",
        ),
    ] = None,
    seed: SeedOption = 0,
    first_sample: Annotated[
        int, typer.Option(min=0, help="Index of the first image among those of the seed.")
    ] = 0,
    batch: BatchOption = 64,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance; 1 is none.", show_default="none"),
    ] = None,
    null_label: Annotated[
        int | None,
        typer.Option(
            min=0, help="Class that stands for no label in guidance.", show_default="the last"
        ),
    ] = None,
    backend: BackendOption = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            help="A .png (one sheet), a .npy (float32 [num, C, H, W], not clamped) or a folder"
            " (00000.png and on, by index; or samples.npy).",
            show_default="out/<model>.png",
        ),
    ] = None,
    form: FormOption = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Pixels of a sheet per pixel of an image.",
            show_default="larger for small images",
        ),
    ] = None,
    trajectory: Annotated[
        Path | None,
        typer.Option(help="Also write the states of the first images over the steps, as a .png."),
    ] = None,
    trajectory_num: Annotated[
        int, typer.Option(min=1, help="Number of images in the trajectory.")
    ] = 8,
) -> None:
    """Sample images from a checkpoint.

    The default method is ancestral sampling (DDPM); the folder's scheduler class is ignored. Image
    k of a seed does not depend on --num and --first-sample.
    """
    output = Output.parse(out or f"out/{Path(model.model).resolve().name}.{form or 'png'}", form)
    _check_strip(trajectory, output)
    opened = model.open()
    x0_clip = clip_of(clip, opened.clip)
    table, which = table_of(opened, method, steps, spacing, x0_clip, start_of(start), eta, variance)
    labels = opened.labels(model.label, num, first_sample)
    if guidance is not None:
        table = table.with_guidance(guidance)
        which += f", guidance {guidance:g}"
    if labels is None and (guidance is not None or null_label is not None):
        raise ValueError("--guidance and --null-label need a model with classes, and --label")
    if null_label is None and opened.classes is not None:
        null_label = opened.classes - 1
    sampler = Sampler(
        opened.network,
        table,
        opened.sample_shape,
        batch,
        opened.device,
        backend=backend,
        null_label=null_label,
    )
    output.check_channels(opened.sample_shape[0], model.model)
    if trajectory is not None:
        check_drawable("--trajectory", opened.sample_shape[0], model.model)
    output.prepare()
    if trajectory is not None:
        prepare_folder(trajectory.parent)

    say("model", opened.description)
    say("backend", opened.with_dtype(f"{sampler.backend} on {device_text(opened.device)}"))
    say("method", method)
    say("steps", which)
    say("images", f"{first_sample} .. {first_sample + num - 1} of seed {seed}, {batch} at a time")
    _note_padding(num, first_sample, batch)
    begun = time.perf_counter()
    strip_num = min(trajectory_num, num) if trajectory is not None else 0
    samples, states, counts = _run(
        sampler, num, seed, first_sample, strip_num, model.progress, labels
    )
    say("time", f"{time.perf_counter() - begun:.1f} s")
    if model.engine:
        say("engine", opened.engine_report())
    say("wrote", output.write(samples, first_sample, scale))
    if trajectory is not None:
        save_png(_strip(states, counts, table, first_sample, scale), trajectory)
        say("wrote", str(trajectory))


def _check_strip(trajectory: Path | None, output: Output) -> None:
    if trajectory is None:
        return
    if trajectory.suffix.lower() != ".png" or trajectory.is_dir():
        raise ValueError(f"--trajectory must be a .png file; got {str(trajectory)!r}")
    if trajectory.resolve() == output.path.resolve():
        raise ValueError(f"--trajectory and --out must differ; got {str(trajectory)!r} for both")


def _note_padding(num: int, first_sample: int, batch: int) -> None:
    runs = ((first_sample + num - 1) // batch - first_sample // batch + 1) * batch
    if runs >= 2 * num:
        images = f"{num} image{'s' if num > 1 else ''}"
        typer.echo(
            f"note: {images} take as long as {runs} in batches of {batch}; a smaller --batch is"
            " faster and changes the last bits",
            err=True,
        )


def _run(
    sampler: Sampler,
    num: int,
    seed: int,
    first_sample: int,
    strip_num: int,
    progress: bool,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Sample, and record the states of the first images.

    States are recorded for the first micro-batches only, to bound the memory.

    Returns:
        Samples [num, ...], states [S, strip_num, ...], and the numbers of steps after each state.
    """
    last = sampler.table.steps
    counts = sorted({round(i * last / (STRIP_STATES - 1)) for i in range(STRIP_STATES)})
    recorded = 0
    if strip_num:
        end = -(-(first_sample + strip_num) // sampler.micro_batch) * sampler.micro_batch
        recorded = min(num, end - first_sample)
    parts = []
    states = torch.empty(0)
    if recorded:
        part, all_states = sampler.sample(
            recorded,
            seed,
            first_sample,
            progress=progress,
            return_steps=counts,
            labels=None if labels is None else labels[:recorded],
        )
        parts.append(part.cpu())
        states = all_states[:, :strip_num].cpu()
    if num > recorded:
        part = sampler.sample(
            num - recorded,
            seed,
            first_sample + recorded,
            progress=progress,
            labels=None if labels is None else labels[recorded:],
        )
        parts.append(part.cpu())
    return torch.cat(parts), states, counts


def _strip(
    states: Tensor, counts: list[int], table: StepTable, first_sample: int, scale: int | None
) -> Image.Image:
    """Draw a row for each sample and a column for each state, from noise to the image."""
    names = [f"{count} steps" for count in counts]
    if table.start != "random":
        names = [f"t = {t}" for t in table.timesteps[counts[:-1]].tolist()] + ["x_0"]
    rows = [str(first_sample + i) for i in range(states.shape[1])]
    if table.init_scale != 1:
        # Scale states of the variance-exploding form as the network's input.
        scales = [1 / table.init_scale, *table.rows[:, column("Cin")].tolist()]
        states = states * torch.tensor([scales[i] for i in counts]).view(-1, 1, 1, 1, 1)
    images = states.transpose(0, 1).flatten(0, 1)
    return sheet(images, len(counts), 4, scale, rows, names)
