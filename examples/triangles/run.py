"""The experiment of the thesis: triangles in three forms, under five noise schedules.

    python examples/triangles/run.py --quick     one form, a tiny network: minutes on two CPU cores
    python examples/triangles/run.py --gpu       the small U-Net, all fifteen trainings
    python examples/triangles/run.py             the network of the thesis, 100 epochs

--epochs, --images and --samples change a plan; --quick --images 10000 takes about an hour on CPUs.
The report is written to --out: a table and the figures of the thesis. Trained networks are kept in
--runs, and an interrupted training is resumed from there.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from report import STARTS, Result, draw_samples, write_report

from ddpm_fast import NoiseSchedule, ScheduleWarning
from ddpm_fast.training.build_network import build_network
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.data import load_data
from ddpm_fast.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
FORMS = ("triangles", "triangles-lowres", "triangles-array")
SCHEDULES = {
    "linear": NoiseSchedule.linear,
    "sine wave": NoiseSchedule.sine_wave,
    "x^1.5": lambda: NoiseSchedule.power(1.5),
    "x^2": lambda: NoiseSchedule.power(2),
    "x^10": lambda: NoiseSchedule.power(10),
}


@dataclass(frozen=True)
class Plan:
    """Forms of the data, network and length of the trainings."""

    name: str
    forms: tuple[str, ...]
    network: str
    images: int
    epochs: int
    batch: int
    lr: float
    precision: str
    samples: int
    steps: int


PLANS = {
    "quick": Plan("quick", FORMS[2:], "tiny", 2_000, 30, 64, 2e-3, "float32", 64, 100),
    "gpu": Plan("gpu", FORMS, "small", 10_000, 100, 256, 1e-3, "bfloat16", 512, 250),
    "full": Plan("full", FORMS, "thesis", 10_000, 100, 128, 4e-4, "float32", 512, 1000),
}


def train(plan: Plan, form: str, name: str, out: Path, device: str, progress: bool) -> Trainer:
    """Train, or resume a training, on one form of the data under one schedule."""
    data = load_data(form, num=plan.images)
    options = TrainOptions(
        epochs=plan.epochs,
        batch=plan.batch,
        lr=plan.lr,
        warmup=200,
        ema=0.995,
        precision=plan.precision,
    )
    schedule = SCHEDULES[name]()
    trainer = Trainer(
        build_network(plan.network, data.sample_shape),
        data,
        schedule,
        options,
        out,
        device=device,
        resume=(out / "state.pt").exists(),
        save_every=max(1, plan.epochs // 4),
    )
    for _ in trainer.run(progress):
        pass
    return trainer


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for argparse: an int of at least `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {text}")
        return value

    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="one form of the data, a tiny network")
    which.add_argument("--gpu", action="store_true", help="the small U-Net, all three forms")
    parser.add_argument("--epochs", type=at_least(1), help="epochs of each training")
    parser.add_argument("--images", type=at_least(10), help="training images")
    parser.add_argument("--samples", type=at_least(STARTS), help="samples of each network")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--runs", type=Path, help="folder of the trainings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args()

    # x^10 leaves much of the image in x_T, as intended by the experiment.
    warnings.simplefilter("ignore", ScheduleWarning)
    plan = PLANS["quick" if options.quick else "gpu" if options.gpu else "full"]
    changes = {name: getattr(options, name) for name in ("epochs", "images", "samples")}
    plan = replace(plan, **{name: value for name, value in changes.items() if value is not None})
    out = options.out or Path("out") / f"triangles-{plan.name}"
    runs = options.runs or out / "runs"
    results: list[Result] = []
    for form in plan.forms:
        for name in SCHEDULES:
            print(f"{form}, {name}", flush=True)
            # One folder for each length, which determines the learning-rate schedule.
            length = f"{plan.images}-images-{plan.epochs}-epochs"
            folder = runs / length / form / name.replace(" ", "-").replace("^", "")
            trainer = train(plan, form, name, folder, options.device, not options.no_progress)
            results.append(draw_samples(trainer, form, name, plan.samples, plan.steps))
    write_report(out, plan, results, options.device)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
