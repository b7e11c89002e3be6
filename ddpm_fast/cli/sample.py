"""``ddpm-fast sample``: images from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from PIL import Image
from torch import Tensor

from ddpm_fast.checkpoint import Checkpoint, load
from ddpm_fast.cli.devices import device_of, device_text
from ddpm_fast.cli.output import FORMATS, Output
from ddpm_fast.engine import accelerate
from ddpm_fast.images import prepare_folder, save_png, sheet
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedules import NoiseSchedule
from ddpm_fast.tables import StepTable

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "triangles"
CPU_STEPS = 250
STRIP_STATES = 10
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def sample(
    model: Annotated[
        Path, typer.Option(help="Folder of a diffusers pipeline.", show_default="triangles")
    ] = SHIPPED,
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps, evenly spaced over the chain.",
            show_default=f"all on a GPU, {CPU_STEPS} on a CPU",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Step that begins with noise, 1 to the chain's length; or random, for each image.",
            show_default="the last",
        ),
    ] = None,
    variance: Annotated[
        str | None,
        typer.Option(help="Of each step: posterior or beta.", show_default="the model's"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, 64 bits.")] = 0,
    first_sample: Annotated[
        int, typer.Option(min=0, help="Index of the first image among those of the seed.")
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Images at a time; sets the last bits of each.")
    ] = 64,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="the GPU, if any")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Of the network: {', '.join(DTYPES)}. The chain itself is float32.",
            show_default="float16 on a GPU, float32 on a CPU",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of the updates: auto, reference, cpu, triton or cuda.")
    ] = "auto",
    engine: Annotated[
        bool,
        typer.Option(help="Run the network as a fused plan where that is faster; a CPU times it."),
    ] = True,
    out: Annotated[
        str | None,
        typer.Option(
            help="A .png (one sheet), a .npy (float32 [num, C, H, W], not clamped) or a folder "
            "(00000.png and on, by index; or samples.npy).",
            show_default="out/<model>.png",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help=" or ".join(FORMATS) + ".", show_default="as --out, or png"),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="Pixels of a sheet per pixel.", show_default="small images grow"
        ),
    ] = None,
    trajectory: Annotated[
        Path | None,
        typer.Option(help="Also write the first images' way from noise, as a .png."),
    ] = None,
    trajectory_num: Annotated[int, typer.Option(min=1, help="How many of them.")] = 8,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Sample images from a checkpoint.

    Ancestral sampling (DDPM) over evenly spaced steps, whatever scheduler the folder names. Image k
    of a seed is the same whatever --num and --first-sample.
    """
    output = Output.parse(out or f"out/{model.resolve().name}.{form or 'png'}", form)
    _check_strip(trajectory, output)
    place = device_of(device)
    chosen_dtype = dtype or ("float16" if place.type == "cuda" else "float32")
    if chosen_dtype not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join(DTYPES)}; got {dtype!r}")

    # The engine rounds the weights itself, once; sums of them before.
    kept = torch.float32 if engine else DTYPES[chosen_dtype]
    checkpoint = _supported(load(model, kept, place), model)
    network: Any = checkpoint.unet
    if engine:
        network = accelerate(
            checkpoint.unet,
            dtype=DTYPES[chosen_dtype],
            num_timesteps=cast(NoiseSchedule, checkpoint.schedule).T,
        )
    table, which = _table(checkpoint, steps, _start(start), variance, place)
    sample_shape = cast(tuple[int, int, int], checkpoint.sample_shape)
    sampler = Sampler(network, table, sample_shape, batch, place, backend=backend)
    if sample_shape[0] not in (1, 3) and (output.form == "png" or trajectory is not None):
        raise ValueError(
            f"--format png draws 1 or 3 channels, {model} has {sample_shape[0]}; take --format npy"
        )
    output.prepare()
    if trajectory is not None:
        prepare_folder(trajectory.parent)

    shape = " x ".join(map(str, sample_shape))
    _say("model", f"{'triangles (shipped)' if model == SHIPPED else model}, {shape}")
    where = f"{sampler.backend} on {device_text(place)}"
    _say("backend", where if engine else f"{where}, network in {chosen_dtype}")
    _say("steps", which)
    _say("images", f"{first_sample} .. {first_sample + num - 1} of seed {seed}, {batch} at a time")
    _note_padding(num, first_sample, batch)
    begun = time.perf_counter()
    strip_num = min(trajectory_num, num) if trajectory is not None else 0
    samples, states, counts = _run(sampler, num, seed, first_sample, strip_num, progress)
    _say("time", f"{time.perf_counter() - begun:.1f} s")
    if engine:
        _say("engine", network.report().splitlines()[-1])
    _say("wrote", output.write(samples, first_sample, scale))
    if trajectory is not None:
        save_png(_strip(states, counts, table, first_sample, scale), trajectory)
        _say("wrote", str(trajectory))


def _say(what: str, text: str) -> None:
    typer.echo(f"{what:<9}{text}")


def _check_strip(trajectory: Path | None, output: Output) -> None:
    if trajectory is None:
        return
    if trajectory.suffix.lower() != ".png" or trajectory.is_dir():
        raise ValueError(f"--trajectory must be a .png file; got {str(trajectory)!r}")
    if trajectory.resolve() == output.path.resolve():
        raise ValueError(f"--trajectory and --out must differ; got {str(trajectory)!r} for both")


def _start(text: str | None) -> int | Literal["random"] | None:
    if text is None:
        return None
    if text == "random":
        return "random"
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"--start must be a step from 1 or random; got {text!r}")
    return int(text)


def _supported(checkpoint: Checkpoint, model: Path) -> Checkpoint:
    """The checkpoint, unless it asks for what this command does not do."""
    config = checkpoint.unet.config
    reason = None
    if checkpoint.schedule is None:
        reason = "it holds a network alone; scheduler/scheduler_config.json is needed"
    elif checkpoint.sample_shape is None:
        reason = "its unet/config.json has no sample_size"
    elif checkpoint.thresholding:
        reason = "it needs dynamic thresholding (thresholding in scheduler_config.json)"
    elif checkpoint.variance not in ("posterior", "beta"):
        reason = f"its variance is {checkpoint.variance} (variance_type in scheduler_config.json)"
    elif config.class_embed_type is not None or config.num_class_embeds is not None:
        reason = "its network needs class labels"
    if reason is not None:
        raise ValueError(f"{model}: cannot be sampled here: {reason}")
    return checkpoint


def _table(
    checkpoint: Checkpoint,
    steps: int | None,
    start: int | Literal["random"] | None,
    variance: str | None,
    device: torch.device,
) -> tuple[StepTable, str]:
    """The step table, and its choice of steps in words."""
    if checkpoint.schedule is None:
        raise ValueError("checkpoint must have a schedule")
    T = checkpoint.schedule.T
    length = min(start, T) if isinstance(start, int) else T
    why = ""
    if steps is None:
        steps = length if device.type == "cuda" else min(CPU_STEPS, length)
        if steps < length:
            why = f" (the default on a CPU; --steps {length} takes all)"
    kind: Any = variance or checkpoint.variance
    prediction: Any = checkpoint.prediction
    table = StepTable.ddpm(
        checkpoint.schedule,
        steps,
        variance=kind,
        prediction=prediction,
        clip=checkpoint.clip,
        spacing="linspace",
        start=start,
    )
    begin = "" if start is None else f", start {start}"
    return table, f"{steps} of {T}{why}, variance {kind}{begin}"


def _note_padding(num: int, first_sample: int, batch: int) -> None:
    runs = ((first_sample + num - 1) // batch - first_sample // batch + 1) * batch
    if runs >= 2 * num:
        typer.echo(
            f"note: {num} image{'s' if num > 1 else ''} cost as much as {runs}, because {batch} run"
            " together; a smaller --batch is faster and changes their last bits",
            err=True,
        )


def _run(
    sampler: Sampler, num: int, seed: int, first_sample: int, strip_num: int, progress: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """Samples, and of the first strip_num the states after so many steps [states, strip_num, ...].

    The states are recorded for the first micro-batches alone: those of all could fill the memory.
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
            recorded, seed, first_sample, progress=progress, return_steps=counts
        )
        parts.append(part.cpu())
        states = all_states[:, :strip_num].cpu()
    if num > recorded:
        rest = sampler.sample(num - recorded, seed, first_sample + recorded, progress=progress)
        parts.append(rest.cpu())
    return torch.cat(parts), states, counts


def _strip(
    states: Tensor, counts: list[int], table: StepTable, first_sample: int, scale: int | None
) -> Image.Image:
    """A row for each sample, a column for each state, from noise to the image."""
    names = [f"{count} steps" for count in counts]
    if table.start != "random":
        names = [f"t = {t}" for t in table.timesteps[counts[:-1]].tolist()] + ["x_0"]
    rows = [str(first_sample + i) for i in range(states.shape[1])]
    images = states.transpose(0, 1).flatten(0, 1)
    return sheet(images, len(counts), 4, scale, rows, names)
