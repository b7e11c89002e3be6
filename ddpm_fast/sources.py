"""Noise that the kernel does not make: drawn from a generator, or given as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.tables import StepTable


class GeneratorNoise:
    """A torch.Generator, drawn from in diffusers' order: x_T, then each row that draws.

    Micro-batch after micro-batch, for the wanted samples alone, so that a single micro-batch gets
    the numbers of a diffusers pipeline of that batch size.
    """

    def __init__(self, generator: torch.Generator, table: StepTable) -> None:
        self._generator, self._table = generator, table

    def x_T(self, x: Tensor) -> Tensor:
        """The starting points, of the shape and dtype of x."""
        return torch.randn(
            x.shape, generator=self._generator, device=self._generator.device, dtype=x.dtype
        )

    def fill(self, target: Tensor, place: slice, done: int, first_rows: list[int]) -> None:
        """Write the noise of the step after ``done`` steps; what is not drawn meets S = 0."""
        if self._table.start == "random" or self._table.draws(done):
            target.copy_(self.x_T(target))


class TensorNoise:
    """A tensor [steps, num, ...]: row i of the table adds noise[i]."""

    def __init__(self, noise: Tensor, table: StepTable) -> None:
        self._noise, self._table = noise, table

    def x_T(self, x: Tensor) -> None:
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
