"""Report of the triangle experiment: figures of every schedule and a table of sample quality."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, StepTable, philox_normal, q_sample
from ddpm_fast.bench.results import metadata, write_csv
from ddpm_fast.training.data import make_triangles
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.figures import ACCENT, FAINT, INK, add_title, new_figure, save_figure
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_png, sheet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality.nearest import Memorisation  # noqa: E402
from sample_quality import foreground_areas, triangle_share  # noqa: E402

STATES = 10  # states from noise to an image
STARTS = 5  # samples shown, as in the thesis
COLOURS = (ACCENT, "#c2410c", "#1d4ed8", "#7c3aed", INK)


@dataclass(frozen=True)
class Result:
    """Result of one training."""

    form: str
    schedule: str
    noise: NoiseSchedule
    history: list[dict[str, Any]]
    training: Any  # training images
    images: Tensor  # [num, 1, 32, 32]
    strip: Tensor  # [STATES, 1, 32, 32], from noise to an image

    @property
    def last(self) -> dict[str, Any]:
        """Metrics of the last epoch."""
        return self.history[-1]


def draw_samples(trainer: Trainer, form: str, schedule: str, num: int, steps: int) -> Result:
    """Sample as the thesis does, by ancestral sampling with the variance beta_t."""
    network = trainer.averaged.eval()
    table = StepTable.ddpm(
        trainer.schedule, steps, "beta", trainer.options.prediction, spacing="linspace"
    )
    counts = [round(i * table.steps / (STATES - 1)) for i in range(STATES)]
    sampler = Sampler(network, table, network.config.sample_shape, min(num, 64))
    images = sampler.sample(num, seed=1, progress=False).cpu()
    _, states = sampler.sample(1, seed=1, progress=False, return_steps=counts)
    return Result(
        form,
        schedule,
        trainer.schedule,
        trainer.history,
        trainer.train_data,
        images,
        states[:, 0].cpu(),
    )


def write_report(out: Path, plan: Any, results: Sequence[Result], device: str) -> None:
    """Write README.md, quality.csv and the figures to a folder."""
    prepare_folder(out)
    forms = list(dict.fromkeys(result.form for result in results))
    draw_schedules(results, out / "schedules.png")
    draw_forward(results, out / "forward.png")
    for form in forms:
        of_form = [result for result in results if result.form == form]
        names = [result.schedule for result in of_form]
        strips = torch.cat([result.strip for result in of_form])
        save_png(sheet(strips, STATES, 2, 2, names), out / f"reverse_{form}.png")
        starts = torch.cat([result.images[:STARTS] for result in of_form])
        save_png(sheet(starts, STARTS, 2, 2, names), out / f"starts_{form}.png")
        draw_losses(of_form, out / f"loss_{form}.png")
    rows = quality(results)
    about = metadata()
    write_csv(out / "quality.csv", [about | row for row in rows])
    machine = str(about["gpu"]) if device != "cpu" else f"{about['cores']} cores of {about['cpu']}"
    when = f"{str(about['date'])[:10]}, {machine}, torch {torch.__version__}"
    (out / "README.md").write_text(text(plan, rows, forms, minutes(results), when))


def minutes(results: Sequence[Result]) -> float:
    """Return the minutes of all training steps, including those of earlier runs."""
    epochs = ((len(r.training), row["images_per_s"]) for r in results for row in r.history)
    return sum(images / speed for images, speed in epochs) / 60


@dataclass(frozen=True)
class Recipe:
    """Measures of images generated as the training images."""

    share: float  # share of triangles
    areas: Any  # areas of the foregrounds
    nearest: Memorisation


def recipe(form: str, training: Any) -> Recipe:
    """Measure a form of the data; its trainings share the data set `training`."""
    fresh = make_triangles(2_000, seed=7, form=form)
    seen = torch.stack([training[i] for i in range(len(training))]).numpy()
    nearest = Memorisation(seen, lambda num: fresh[:num])
    return Recipe(triangle_share(fresh), foreground_areas(fresh), nearest)


def quality(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row of measures for each training."""
    training = {result.form: result.training for result in results}
    recipes = {form: recipe(form, images) for form, images in training.items()}
    rows = []
    for result in results:
        of_data, images = recipes[result.form], result.images.numpy()
        areas = foreground_areas(images), of_data.areas
        rows.append(
            {
                "form": result.form,
                "schedule": result.schedule,
                "signal_left": f"{float(result.noise.sqrt_alphas_cumprod[-1]):.3f}",
                "samples": len(images),
                "triangles": f"{triangle_share(images):.3f}",
                "of_data": f"{of_data.share:.3f}",
                "ks_area": f"{stats.ks_2samp(*areas).statistic:.3f}",
                "grey": f"{float((result.images.abs() < 0.5).float().mean()):.3f}",
                "nearest": f"{of_data.nearest.columns(images)['nearest_of_fresh']:.3f}",
                "loss": f"{result.last['loss']:.5f}",
                "test_loss": f"{result.last['test_loss']:.5f}",
            }
        )
    return rows


def draw_schedules(results: Sequence[Result], path: Path) -> None:
    """Draw the betas of each schedule, and the share of the image that is left."""
    figure, (above, below) = new_figure(7, 6, [1, 1])
    found = {result.schedule: result.noise for result in results}
    for (name, schedule), colour in zip(found.items(), COLOURS, strict=True):
        above.plot(schedule.betas, color=colour, label=name)
        below.plot(schedule.sqrt_alphas_cumprod, color=colour, label=name)
    above.set_ylabel("beta", color=INK)
    below.set_ylabel("share of the image left", color=INK)
    below.set_xlabel("timestep", color=INK)
    above.legend(frameon=False, labelcolor=FAINT, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    add_title(figure, "Five noise schedules", "1000 steps, betas from 1e-4 to 0.02")
    save_figure(figure, path)


def draw_forward(results: Sequence[Result], path: Path) -> None:
    """Draw a triangle with noise of each schedule."""
    found = {result.schedule: result.noise for result in results}
    x0 = torch.from_numpy(make_triangles(1, seed=11))
    t = torch.tensor([round(i * 999 / (STATES - 1)) for i in range(STATES)])
    batch, noise = (
        x0.expand(STATES, -1, -1, -1).contiguous(),
        philox_normal(STATES, x0.shape[1:], 3),
    )
    rows = [q_sample(batch, t, noise, schedule) for schedule in found.values()]
    headings = [f"t = {i}" for i in t.tolist()]
    save_png(sheet(torch.cat(rows), STATES, 2, 2, list(found), headings), path)


def draw_losses(results: Sequence[Result], path: Path) -> None:
    """Draw mean, minimum and maximum loss of each epoch, and the held-out loss."""
    figure, axes = new_figure(7, 2.2 * len(results), [1] * len(results))
    for panel, result in zip(axes, results, strict=True):
        rows = result.history
        epochs = np.arange(1, len(rows) + 1)
        low, mean, high, test = (
            [row[name] for row in rows] for name in ("loss_min", "loss", "loss_max", "test_loss")
        )
        panel.fill_between(epochs, low, high, color=ACCENT, alpha=0.15, linewidth=0)
        panel.plot(epochs, mean, color=ACCENT, label="mean (band: min to max)")
        panel.plot(epochs, test, color=INK, linestyle="--", label="held out")
        panel.set_yscale("log")
        panel.set_title(result.schedule, loc="left", fontsize=10, color=INK)
    axes[0].legend(frameon=False, labelcolor=FAINT)
    axes[-1].set_xlabel("epoch", color=INK)
    add_title(
        figure,
        f"Loss, {results[0].form}",
        "held out: the averaged network, the same noise in every epoch",
    )
    save_figure(figure, path)


def text(
    plan: Any, rows: Sequence[dict[str, Any]], forms: Sequence[str], minutes: float, when: str
) -> str:
    """Return the text of the report."""
    lines = [
        f"# Triangles under five schedules ({plan.name})",
        "",
        f"Network `{plan.network}`, {plan.images:,} images, {plan.epochs} epochs of batch"
        f" {plan.batch}; {plan.samples} samples by {plan.steps} ancestral steps with the variance"
        f" beta_t. {when}, trained in {minutes:.0f} minutes of steps.",
        "",
        "`triangles`: share of samples that are triangles by the measure of"
        f" `benchmarks/sample_quality.py`, with a standard error of up to"
        f" {0.5 / plan.samples**0.5:.2f}; `of_data`: the same for images generated as the training"
        " images."
        " `ks_area`: Kolmogorov-Smirnov distance of foreground areas. `grey`: share of"
        " pixels that are neither black nor white. `nearest`: median distance to the nearest"
        " training image, relative to that of new triangles.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "| " + " | ".join("---" for _ in rows[0]) + " |",
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
        "## The thesis' finding",
        "",
        "Linear and sine are the best two, and x^10 fails. Here:",
        "",
        *(finding(form, [row for row in rows if row["form"] == form]) for form in forms),
        "",
        "![The schedules](schedules.png)",
        "",
        "![One triangle under every schedule](forward.png)",
    ]
    for form in forms:
        lines += [
            "",
            f"## {form}",
            "",
            f"From noise to an image:\n\n![Reverse process](reverse_{form}.png)",
            "",
            f"Five different starts:\n\n![Starts](starts_{form}.png)",
            "",
            f"![Losses](loss_{form}.png)",
        ]
    return "\n".join(lines) + "\n"


def finding(form: str, rows: Sequence[dict[str, Any]]) -> str:
    """Compare a form's ranking of the schedules to that of the thesis."""
    share = {row["schedule"]: float(row["triangles"]) for row in rows}
    ranked = sorted(share, key=share.__getitem__, reverse=True)
    listed = ", ".join(f"{name} {share[name]:.3f}" for name in ranked)
    if share[ranked[0]] < 0.5 * float(rows[0]["of_data"]):
        return f"- {form}: no network has learnt triangles well enough to compare ({listed})."
    best = set(ranked[:2]) == {"linear", "sine wave"}
    fails = ranked[-1] == "x^10" and share["x^10"] < 0.5 * share[ranked[0]]
    return (
        f"- {form}: linear and sine {'are' if best else 'are not'} the two best;"
        f" x^10 {'fails' if fails else 'does not fail'} ({listed})."
    )
