"""Noise from generators or from a tensor, instead of the kernel's Philox noise."""

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
    """Noise from torch generators, drawn in the order of diffusers: x_T, then each row with noise.

    Attributes:
        generators: One generator, which draws whole micro-batches one after another, so that it
            gives the numbers of a diffusers pipeline of that batch size; or one for each sample (a
            list of one counts as a single one). They draw on their own device.
        x_T_dtype: Dtype of the starting noise. None: that of the state. float16 gives other
            numbers.
        step_dtype: Dtype of the noise of the steps. None: that of the state.

    Raises:
        TypeError: An item is not a generator.
        ValueError: The list is empty.
    """

    generators: torch.Generator | Sequence[torch.Generator]
    x_T_dtype: torch.dtype | None = None
    step_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "generators", _generators("generators", self.generators))

    def serves(self, num: int) -> bool:
        """Return True if there is a generator for each of `num` samples."""
        return isinstance(self.generators, torch.Generator) or len(self.generators) == num

    def draw(self, like: Tensor, samples: slice, dtype: torch.dtype | None) -> Tensor:
        """Return standard normals of the shape of `like`.

        Args:
            like: Tensor of the shape and device of the samples.
            samples: Positions of the samples in the call.
            dtype: Dtype of the noise. None: that of `like`.
        """
        dtype = dtype or like.dtype
        if isinstance(self.generators, torch.Generator):
            return _normals(like.shape, self.generators, dtype)
        one = (1, *like.shape[1:])
        return torch.cat(
            [_normals(one, each, dtype).to(like.device) for each in self.generators[samples]]
        )


def _generators(name: str, value: Any) -> torch.Generator | tuple[torch.Generator, ...]:
    """Return one generator, or a tuple of one for each of at least two samples."""
    if not isinstance(value, Sequence):
        return checks.instance(name, value, torch.Generator)
    if not value:
        raise ValueError(f"{name} must be one generator or more; got an empty list")
    found = [checks.instance(f"{name}[{i}]", one, torch.Generator) for i, one in enumerate(value)]
    return found[0] if len(found) == 1 else tuple(found)


def _normals(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


class DrawnNoise:
    """`GeneratorNoise` for the rows of a table.

    Args:
        noise: The generators.
        table: The table.
    """

    def __init__(self, noise: GeneratorNoise, table: StepTable) -> None:
        self._noise, self._table = noise, table

    def x_T(self, x: Tensor, samples: slice) -> Tensor:
        """Return the starting noise of the samples, of the shape of `x`."""
        return self._noise.draw(x, samples, self._noise.x_T_dtype)

    def fill(self, target: Tensor, samples: slice, done: int, first_rows: list[int]) -> None:
        """Write the noise of a step. Rows for which nothing is drawn have S = 0.

        Args:
            target: Buffer of the noise.
            samples: Positions of the samples in the call.
            done: Number of steps taken.
            first_rows: First row of each sample.
        """
        if self._table.start == "random" or self._table.draws(done):
            target.copy_(self._noise.draw(target, samples, self._noise.step_dtype))


class TensorNoise:
    """Noise from a tensor: row i of the table adds noise[i].

    Args:
        noise: Tensor [steps, num, ...].
        table: The table.
    """

    def __init__(self, noise: Tensor, table: StepTable) -> None:
        self._noise, self._table = noise, table

    def x_T(self, x: Tensor, samples: slice) -> None:
        """Return None: the tensor has no starting noise."""

    def fill(self, target: Tensor, samples: slice, done: int, first_rows: list[int]) -> None:
        """Write the noise of a step; arguments as for `DrawnNoise.fill`."""
        noise = self._noise[:, samples]
        if self._table.start != "random":
            target.copy_(noise[done])
            return
        for i, first in enumerate(first_rows):
            if first + done < self._table.steps:
                target[i].copy_(noise[first + done, i])


def as_noise(noise: Any) -> str | GeneratorNoise | Tensor:
    """Return the argument `noise` of a sampler: "philox", a `GeneratorNoise` or a tensor.

    Raises:
        TypeError: It is something else.
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
    """Return the source that fills the noise of a loop; None for noise from the kernel."""
    if isinstance(noise, GeneratorNoise):
        return DrawnNoise(noise, table)
    return TensorNoise(noise, table) if isinstance(noise, Tensor) else None
