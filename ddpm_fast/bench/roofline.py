"""What the device can do at most: bytes moved by a copy, products of large matrices."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ddpm_fast.bench.timing import interleaved
from ddpm_fast.engine.plan.memory_check import free_bytes

_ROUNDS = 9


@dataclass(frozen=True)
class RooflineLimits:
    """Measured rates: ``copy`` in bytes/s, read and written; ``matmul`` in FLOP/s in a dtype."""

    copy: float
    matmul: float
    dtype: torch.dtype

    @property
    def columns(self) -> dict[str, float]:
        """What a row of results says of them."""
        return {
            "copy_GB_per_s": float(f"{self.copy / 1e9:.4g}"),
            "matmul_TFLOP_per_s": float(f"{self.matmul / 1e12:.4g}"),
        }


def measure(
    device: torch.device,
    dtype: torch.dtype,
    copy_bytes: int | None = None,
    sides: tuple[int, ...] | None = None,
    rounds: int = _ROUNDS,
) -> RooflineLimits:
    """Medians over ``rounds`` in which the cases take turns; of the products the fastest size.

    copy_bytes: of the source, by default far beyond any cache, within the memory that is free.
    sides: of the square matrices. float32 on a GPU is measured with TF32, which cuDNN's
    convolutions use as well.
    """
    on_gpu = device.type == "cuda"
    if copy_bytes is None:
        most, free = 1 << 30 if on_gpu else 1 << 28, free_bytes(device)
        copy_bytes = most if free is None else min(most, free // 8)
    if sides is None:
        sides = (4096, 8192) if on_gpu else (1024, 2048)
    source = torch.ones(copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    cases = {"copy": lambda: target.copy_(source)}
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        cases[f"{side}"] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # type: ignore[misc]
    with torch.no_grad(), _tf32():
        times = interleaved(cases, device, rounds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return RooflineLimits(
        2 * source.nbytes / median["copy"],
        max(2 * side**3 / median[f"{side}"] for side in sides),
        dtype,
    )


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
