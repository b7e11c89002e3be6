"""Which timesteps of a schedule a chain visits, and the checks of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ddpm_fast.utils import checks

SPACINGS = ("linspace", "leading", "trailing", "quad")


def timesteps(
    T: int,
    steps: int | None = None,
    spacing: str | Sequence[int] = "linspace",
    to_data: bool = False,
) -> list[int]:
    """Timesteps of a chain, descending, each in 0..T-1 (index t is step t+1 of the papers).

    T: length of the schedule, at least 1.
    steps: how many, 1..T; None for all T, whatever named spacing is given.
    spacing: "linspace" (both ends included; a single step is t = 0), "leading" (multiples of
    T // steps from 0), "trailing" (back from T - 1 in strides of T / steps), the three of Table 2,
    Lin et al. 2023, rounded as diffusers rounds them; "quad" (squares up to 0.8 T, Song et al.
    2020, Appendix D.2, rounded down); or the timesteps themselves, strictly ascending or
    descending.
    to_data: the named spacings place one timestep more and leave out the lowest, for solvers whose
    last step leads to x_0 itself (diffusers' multistep schedulers); "trailing" is the same.

    Raises TypeError for a T, steps or listed timestep that is no integer; ValueError for one out
    of range, an unknown name, a listed timestep that is repeated or out of order, a steps that is
    not the length of the list, and a quad spacing so dense that it repeats a timestep.
    """
    T = checks.integer("T", T, 1)
    if steps is not None:
        steps = checks.integer("steps", steps, 1, T + 1)
    if not isinstance(spacing, str):
        return _listed(T, steps, spacing)
    if spacing not in SPACINGS:
        raise ValueError(
            f"spacing must be one of {', '.join(SPACINGS)} or a list of timesteps; got {spacing!r}"
        )
    if steps is None:
        return list(range(T - 1, -1, -1))
    if to_data and spacing != "trailing":
        # Of T steps all are kept: there is no further one to leave out.
        return _placed(T, min(steps + 1, T), spacing)[:steps]
    return _placed(T, steps, spacing)


def _placed(T: int, steps: int, spacing: str) -> list[int]:
    """The timesteps of a named spacing, descending."""
    chosen: np.ndarray
    if spacing == "linspace":
        chosen = np.linspace(0, T - 1, steps).round()[::-1]
    elif spacing == "leading":
        chosen = np.arange(steps)[::-1] * (T // steps)
    elif spacing == "trailing":
        # The stride may round so that arange reaches one value too many, at 0.
        chosen = np.arange(T, 0, -T / steps).round()[:steps] - 1
    else:
        chosen = np.floor(np.linspace(0, np.sqrt(0.8 * T), steps) ** 2)[::-1]
        if len(set(chosen.tolist())) < steps:
            raise ValueError(
                f"spacing 'quad' repeats timesteps at steps={steps}, T={T}; use fewer steps"
            )
    return [int(t) for t in chosen]


def _listed(T: int, steps: int | None, spacing: Sequence[int]) -> list[int]:
    """Check a list of timesteps and sort it descending."""
    try:
        values = spacing.tolist() if isinstance(spacing, np.ndarray | Tensor) else list(spacing)
    except TypeError:
        raise TypeError(
            f"spacing must be a name or a list of timesteps; got {type(spacing).__name__}"
        ) from None
    if not isinstance(values, list) or not values:
        raise ValueError("spacing: a list of timesteps must have one axis and at least one element")
    values = [checks.integer(f"spacing[{i}]", t, 0, T) for i, t in enumerate(values)]
    if values[0] < values[-1]:
        values.reverse()
    if any(a <= b for a, b in pairwise(values)):
        raise ValueError("spacing: listed timesteps must be strictly ascending or descending")
    if steps is not None and steps != len(values):
        raise ValueError(
            f"steps must be None or the number of timesteps listed in spacing, {len(values)};"
            f" got {steps}"
        )
    return values
