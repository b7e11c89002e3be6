"""Inputs of the checks of `ddpm_fast.verify`: every layout and dtype, on the backend's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.ops import Backend
from ddpm_fast.utils import checks

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "odd", "empty")
# What an operator is run and judged by: (outputs, float64 oracles, sums of absolute terms).
Results = tuple[list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """The inputs of one check, on the backend's device."""

    run: Backend
    dtype: torch.dtype
    layout: str
    device: torch.device

    @property
    def arithmetic(self) -> torch.dtype:
        """float64 for float64, else float32."""
        return checks.compute_dtype(self.dtype)

    def tensor(self, seed: int, dtype: torch.dtype | None = None, written: bool = False) -> Tensor:
        """Normal numbers of the case's layout; a tensor that is written is never expanded."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(_shape(self.layout), generator=generator, dtype=torch.float64)
        values = values.to(dtype or self.dtype).to(self.device)
        if self.layout == "channels_last":
            return values.to(memory_format=torch.channels_last)
        if self.layout == "sliced":
            return values[:, 1:, ::2, 1:]
        if self.layout == "expanded" and not written:
            return values[:, :1].expand_as(values)
        return values

    def made_noise(self, like: Tensor, step: Tensor, rng: Tensor) -> Tensor:
        """The noise of row ``step[n]`` for each sample n, by the backend's own generator."""
        noise = torch.empty_like(like)
        for n, row in enumerate(step.tolist()):
            words = rng + torch.tensor([0, row, n], device=rng.device)
            self.run.philox_normal_(noise[n : n + 1], words)
        return noise

    def indices(self, seed: int, end: int) -> Tensor:
        """A number in [0, end) for each sample."""
        generator = torch.Generator().manual_seed(seed)
        samples = _shape(self.layout)[0]
        return torch.randint(end, (samples,), generator=generator).to(self.device)


def _shape(layout: str) -> tuple[int, ...]:
    """Samples above 4096 elements: more than a tile or a block of any backend."""
    if layout == "empty":
        return (0, 3, 8, 8)
    return (3, 5, 29, 31) if layout == "odd" else (3, 4, 36, 32)
