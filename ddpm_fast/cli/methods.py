"""The option `--method`: solvers by name, and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ddpm_fast.cli.model import OpenModel
from ddpm_fast.diffusion.timesteps import SPACINGS
from ddpm_fast.sampling.step_table import StepTable

CPU_STEPS = 250  # default of ancestral sampling on a CPU


@dataclass(frozen=True)
class _Method:
    make: Callable[..., StepTable]
    steps: int | None  # default; None: all
    takes: tuple[str, ...] = ()


METHODS = {
    "ddpm": _Method(StepTable.ddpm, None, ("variance",)),
    "ddim": _Method(StepTable.ddim, 50, ("eta",)),
    "ve_ode": _Method(StepTable.ve_ode, 50),
    "dpmpp_2m": _Method(StepTable.dpmpp_2m, 20),
    "dpmpp_2m_sde": _Method(StepTable.dpmpp_2m_sde, 20),
    "unipc": _Method(StepTable.unipc, 20),
    "plms": _Method(StepTable.plms, 50),
}


def start_of(text: str | None) -> int | Literal["random"] | None:
    """Parse `--start`. Raises ValueError."""
    if text is None:
        return None
    if text == "random":
        return "random"
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"--start must be a step from 1 or random; got {text!r}")
    return int(text)


def spacing_of(text: str) -> str:
    """Check `--spacing`. Raises ValueError."""
    if text not in SPACINGS:
        raise ValueError(f"--spacing must be {', '.join(SPACINGS)}; got {text!r}")
    return text


def table_of(
    model: OpenModel,
    method: str,
    steps: int | None,
    spacing: str | None,
    clip: Any,
    start: int | Literal["random"] | None = None,
    eta: float | None = None,
    variance: str | None = None,
) -> tuple[StepTable, str]:
    """Create the step table of a method.

    Args:
        model: Checkpoint.
        method: A key of `METHODS`.
        steps: Sampling steps. None: the method's default.
        spacing: Spacing of the timesteps. None: the method's default.
        clip: Clipping of x0.
        start: Step that starts from noise. None: the last.
        eta: Noise of ddim. None: 0.
        variance: Variance of ddpm. None: the model's.

    Returns:
        The table, and a description of its options.

    Raises:
        ValueError: the method is unknown or does not have an option, or the network does not learn
            the variance that is needed.
    """
    if method not in METHODS:
        raise ValueError(f"--method must be {', '.join(METHODS)}; got {method!r}")
    chosen = METHODS[method]
    for name, value in (("eta", eta), ("variance", variance)):
        if value is not None and name not in chosen.takes:
            takers = [other for other, m in METHODS.items() if name in m.takes]
            raise ValueError(f"--{name} is an option of --method {takers[0]}; got {method}")
    T = model.schedule.T
    length = min(start, T) if isinstance(start, int) else T
    reason = ""
    if steps is None:
        steps = min(length if chosen.steps is None else chosen.steps, length)
        if chosen.steps is None and model.device.type == "cpu" and steps > CPU_STEPS:
            steps = CPU_STEPS
            reason = f" (the default on a CPU; --steps {length} takes all)"
    options: dict[str, Any] = {} if spacing is None else {"spacing": spacing_of(spacing)}
    text = ""
    if "variance" in chosen.takes:
        options["variance"] = variance or model.variance
        text += f", variance {options['variance']}"
    if "eta" in chosen.takes:
        options["eta"] = 0.0 if eta is None else eta
        text += f", eta {options['eta']:g}"
    table = chosen.make(
        model.schedule, steps, prediction=model.prediction, clip=clip, start=start, **options
    )
    if table.learned and not model.learns_variance:
        raise ValueError(
            "--variance must be posterior or beta for a network of C channels, which learns none;"
            f" got {options['variance']}{'' if variance else ' (of the model)'}"
        )
    count = len(set(table.timesteps.tolist()))
    if count < steps:
        reason = f" ({steps} of --spacing {spacing}, without repetitions)"
    return table, f"{count} of {T}{reason}{text}" + ("" if start is None else f", start {start}")
