"""Timesteps of a chain."""

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
    """Return the timesteps of a chain, descending.

    The spacings linspace, leading and trailing are those of Table 2, Lin et al. 2023, rounded as by
    diffusers. Index t is step t + 1 of the papers.

    Args:
        T: Length of the schedule, at least 1.
        steps: Number of timesteps, 1..T. None: all T, whatever the named spacing.
        spacing: "linspace": both ends included; a single step is t = 0. "leading": multiples of
            T // steps from 0. "trailing": from T - 1 down in strides of T / steps. "quad": squares
            up to 0.8 T, rounded down (Song et al. 2020, Appendix D.2). Of many steps, some are
            rounded to the same timestep, which is listed once: a step between equal noise levels
            would return its input. Or the timesteps, strictly ascending or descending.
        to_data: Place one timestep more and omit the lowest, for solvers whose last step ends at
            x_0 (diffusers' multistep schedulers). No effect on "trailing" and on listed timesteps.

    Returns:
        Timesteps in [0, T), as many as `steps` but for "quad".

    Raises:
        TypeError: `T`, `steps` or a listed timestep is not an integer.
        ValueError: A value is out of range; the name is unknown; listed timesteps are repeated or
            not sorted, or their number is not `steps`.
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
    # With all T steps there is no further one to omit.
    if to_data and spacing != "trailing" and steps < T:
        return _spaced(T, steps + 1, spacing)[:-1]
    return _spaced(T, steps, spacing)


def _spaced(T: int, steps: int, spacing: str) -> list[int]:
    """Return the timesteps of a named spacing, descending."""
    chosen: np.ndarray
    if spacing == "linspace":
        chosen = np.linspace(0, T - 1, steps).round()[::-1]
    elif spacing == "leading":
        chosen = np.arange(steps)[::-1] * (T // steps)
    elif spacing == "trailing":
        # The stride may round so that arange returns one value too many, at 0.
        chosen = np.arange(T, 0, -T / steps).round()[:steps] - 1
    else:
        chosen = np.unique(np.floor(np.linspace(0, np.sqrt(0.8 * T), steps) ** 2))[::-1]
    return [int(t) for t in chosen]


def _listed(T: int, steps: int | None, spacing: Sequence[int]) -> list[int]:
    """Check listed timesteps and return them descending."""
    try:
        values = spacing.tolist() if isinstance(spacing, np.ndarray | Tensor) else list(spacing)
    except TypeError:
        raise TypeError(
            f"spacing must be a name or a list of timesteps; got {type(spacing).__name__}"
        ) from None
    if not isinstance(values, list) or not values:
        raise ValueError("spacing must be a list of at least one timestep; got none")
    values = [checks.integer(f"spacing[{i}]", t, 0, T) for i, t in enumerate(values)]
    if values[0] < values[-1]:
        values.reverse()
    for a, b in pairwise(values):
        if a <= b:
            raise ValueError(
                f"spacing must be strictly ascending or descending; got neighbours {a} and {b}"
            )
    if steps is not None and steps != len(values):
        raise ValueError(
            f"steps must be None or the number of timesteps listed in spacing, {len(values)};"
            f" got {steps}"
        )
    return values
