"""`ddpm-fast bpd`: variational bound of a checkpoint on images, in bits per dimension."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ddpm_fast.bench.results import write_csv
from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.model import (
    DTYPES,
    BatchOption,
    DataOption,
    ModelOptions,
    NumOption,
    SeedOption,
)
from ddpm_fast.cli.output import check_file, say
from ddpm_fast.diffusion.likelihood import DECODERS, VariationalBound, variational_bound
from ddpm_fast.diffusion.variance import VARIANCES
from ddpm_fast.utils.figures import (
    ACCENT,
    INK,
    add_title,
    new_figure,
    require_matplotlib,
    save_figure,
)
from ddpm_fast.utils.images import read_images


@dataclass(frozen=True)
class BpdModelOptions(ModelOptions):
    """Options of the model, which is evaluated in float32 by default."""

    dtype: Annotated[
        str | None,
        typer.Option(help=f"Dtype of the network: {', '.join(DTYPES)}. The bound is float32."),
    ] = "float32"


def bpd(
    data: DataOption,
    model: BpdModelOptions,
    num: NumOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Evenly spaced timesteps.", show_default="all")
    ] = None,
    variance: Annotated[
        str | None,
        typer.Option(
            help=f"Variance of a reverse step: {', '.join(VARIANCES)}.",
            show_default="the model's",
        ),
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(help=f"Decoder of x_0: {' (256 values) or '.join(DECODERS)} (a density)."),
    ] = "discretised",
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    out: Annotated[Path, typer.Option(help="A .csv with a row for each timestep.")] = Path(
        "out/bpd.csv"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the terms over the timesteps, as a .png.")
    ] = None,
) -> None:
    """Bound the negative log-likelihood of images, in bits per dimension.

    Takes one forward pass for each image and step. The noise of image k does not depend on --num,
    --batch and --steps.
    """
    check_file("--out", out, ".csv")
    if plot is not None:
        check_file("--plot", plot, ".png")
        require_matplotlib()
    opened = model.open()
    images = read_images(data, opened.sample_shape, num)
    labels = opened.labels(model.label, len(images))
    kind: Any = variance or opened.variance
    chosen: Any = decoder

    say("model", opened.description)
    say("data", f"{data}, {len(images)} image{'s' if len(images) > 1 else ''}")
    say("device", opened.with_dtype(device_text(opened.device)))
    T = opened.schedule.T
    which = f"{steps or T} of {T}, variance {kind}, decoder {decoder}"
    say("steps", which)
    begun = time.perf_counter()
    bound = variational_bound(
        opened.network,
        opened.schedule,
        images.to(opened.device),
        prediction=opened.prediction,
        variance=kind,
        clip=opened.clip,
        decoder=chosen,
        steps=steps,
        seed=seed,
        micro_batch=batch,
        pad=False,
        labels=None if labels is None else labels.to(opened.device),
        progress=model.progress,
    )
    rows, texts = summary(bound)
    say("time", f"{time.perf_counter() - begun:.1f} s")
    if model.engine:
        say("engine", opened.engine_report())
    for what, text in texts.items():
        say(what, text)

    write_csv(out, rows)
    say("wrote", str(out))
    if plot is not None:
        below = f"{opened.description}, {data.name}, {len(images)} images, steps {which}"
        save_figure(draw(bound, below), plot)
        say("wrote", str(plot))


def summary(bound: VariationalBound) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Summarise a bound over the images.

    Returns:
        A row for each timestep, the largest first: mean of the term in bits per dimension, its
        standard error (empty for a single image), and means of the squared errors of x_0 and
        epsilon. And the text of each part of the bound.
    """
    columns = zip(
        bound.timesteps.tolist(),
        bound.vb.mean(0).tolist(),
        standard_error(bound.vb).tolist(),
        bound.xstart_mse.mean(0).tolist(),
        bound.mse.mean(0).tolist(),
        strict=True,
    )
    rows: list[dict[str, object]] = [
        {
            "t": t,
            "mean": mean,
            "standard_error": error if len(bound.vb) > 1 else "",
            "xstart_mse": xstart_mse,
            "mse": mse,
        }
        for t, mean, error, xstart_mse, mse in columns
    ]
    parts = {
        "prior": bound.prior_bpd,
        "terms": bound.vb[:, :-1].sum(1),
        "L_0": bound.decoder_bpd,
        "total": bound.total_bpd,
    }
    return rows, {what: f"{_with_error(values)} bits/dim" for what, values in parts.items()}


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over the images [N, ...]: [...], NaN for N = 1."""
    if len(values) == 1:
        return torch.full_like(values[0], float("nan"))
    return values.std(0) / len(values) ** 0.5


def _with_error(values: Tensor) -> str:
    error = f" +- {float(standard_error(values)):.2g}" if len(values) > 1 else ""
    return f"{float(values.mean()):.5g}{error}"


def draw(bound: VariationalBound, below: str) -> Any:
    """Draw the mean of each term over t, on a logarithmic axis; returns a matplotlib Figure.

    A term that is not positive, as L_0 of a density can be, is left out.
    """
    figure, axes = new_figure(8.4, 4.8)
    axes.set_yscale("log")
    t, mean = bound.timesteps.tolist(), bound.vb.mean(0).tolist()
    terms = [point for point in zip(t[:-1], mean[:-1], strict=True) if point[1] > 0]
    if terms:
        axes.plot(*zip(*terms, strict=True), color=ACCENT, linewidth=1.6, label="$L_{t-1}$")
    if mean[-1] > 0:
        axes.scatter(t[-1:], mean[-1:], color="#d97706", s=36, label="$L_0$", zorder=3)
    else:
        axes.plot([], [], " ", label=f"$L_0$ = {mean[-1]:.3g}, not above 0")
    axes.set_xlabel("timestep t")
    axes.set_ylabel("bits per dimension")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    total, prior = float(bound.total_bpd.mean()), float(bound.prior_bpd.mean())
    title = f"{total:.4g} bits/dim, of which the prior is {prior:.2g}"
    add_title(figure, f"Variational bound: {title}", below)
    return figure
