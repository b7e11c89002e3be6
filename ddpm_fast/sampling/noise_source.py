"""Noise that the kernel does not make: drawn from generators, or given as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks


@dataclass(frozen=True)
class GeneratorNoise:
    """Noise drawn from torch generators in diffusers' order: x_T, then each row that draws.

    generators: one, which draws whole micro-batches one after another, so that a single one gets
    the numbers of a diffusers pipeline of that batch size; or one for each sample (a list of one
    counts as that one). On another device than the samples they draw there. x_T_dtype, step_dtype:
    what is drawn in; None is the dtype of the state. float16 noise holds other numbers.

    Raises TypeError, ValueError for something else.
    """

    generators: torch.Generator | Sequence[torch.Generator]
    x_T_dtype: torch.dtype | None = None
    step_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "generators", _generators("generators", self.generators))

    def serves(self, num: int) -> bool:
        """Whether there is a generator for each of num samples."""
        return isinstance(self.generators, torch.Generator) or len(self.generators) == num

    def draw(self, like: Tensor, place: slice, dtype: torch.dtype | None) -> Tensor:
        """Normals of the shape of ``like``, the samples at ``place`` of a call."""
        dtype = dtype or like.dtype
        if isinstance(self.generators, torch.Generator):
            return _normals(like.shape, self.generators, dtype)
        one = (1, *like.shape[1:])
        return torch.cat(
            [_normals(one, each, dtype).to(like.device) for each in self.generators[place]]
        )


def _generators(name: str, value: Any) -> torch.Generator | tuple[torch.Generator, ...]:
    """One generator, or one for each of two samples and more."""
    if not isinstance(value, Sequence):
        return checks.instance(name, value, torch.Generator)
    if not value:
        raise ValueError(f"{name} must be one generator or more; got an empty list")
    found = [checks.instance(f"{name}[{i}]", one, torch.Generator) for i, one in enumerate(value)]
    return found[0] if len(found) == 1 else tuple(found)


def _normals(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


class DrawnNoise:
    """`GeneratorNoise` for the rows of a table."""

    def __init__(self, noise: GeneratorNoise, table: StepTable) -> None:
        self._noise, self._table = noise, table

    def x_T(self, x: Tensor, place: slice) -> Tensor:
        """The starting points of the samples at ``place``, of the shape of x."""
        return self._noise.draw(x, place, self._noise.x_T_dtype)

    def fill(self, target: Tensor, place: slice, done: int, first_rows: list[int]) -> None:
        """Write the noise of the step after ``done`` steps; what is not drawn meets S = 0."""
        if self._table.start == "random" or self._table.draws(done):
            target.copy_(self._noise.draw(target, place, self._noise.step_dtype))


class TensorNoise:
    """A tensor [steps, num, ...]: row i of the table adds noise[i]."""

    def __init__(self, noise: Tensor, table: StepTable) -> None:
        self._noise, self._table = noise, table

    def x_T(self, x: Tensor, place: slice) -> None:
        """None: the starting points are not part of the tensor."""

    def fill(self, target: Tensor, place: slice, done: int, first_rows: list[int]) -> None:
        """Write the noise of the step after ``done`` steps for the samples at ``place``."""
        noise = self._noise[:, place]
        if self._table.start != "random":
            target.copy_(noise[done])
            return
        for i, first in enumerate(first_rows):
            if first + done < self._table.steps:
                target[i].copy_(noise[first + done, i])


def as_noise(noise: Any) -> str | GeneratorNoise | Tensor:
    """A sampler's argument noise: "philox", `GeneratorNoise` or a tensor.

    Raises TypeError for anything else.
    """
    if isinstance(noise, (Tensor, GeneratorNoise)) or noise == "philox":
        return noise
    if isinstance(noise, (torch.Generator, list, tuple)):
        return GeneratorNoise(_generators("noise", noise))
    raise TypeError(
        "noise must be 'philox', a torch.Generator or a list of them, a GeneratorNoise or a tensor"
        f" [steps, num, ...]; got {noise!r}"
    )


def source_of(
    noise: str | GeneratorNoise | Tensor, table: StepTable
) -> DrawnNoise | TensorNoise | None:
    """What fills the noise of a loop for a table; None where the kernel makes it."""
    if isinstance(noise, GeneratorNoise):
        return DrawnNoise(noise, table)
    return TensorNoise(noise, table) if isinstance(noise, Tensor) else None
