"""Roofline limits of a device: the bandwidth of a copy and the rate of matrix products."""

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
    """Measured limits.

    Attributes:
        copy: bytes/s read and written by a copy.
        matmul: FLOP/s of a matrix product in `dtype`.
        dtype: dtype of the matrix product.
    """

    copy: float
    matmul: float
    dtype: torch.dtype

    @property
    def columns(self) -> dict[str, float]:
        """Columns of a row of results."""
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
    """Measure the limits of a device.

    Args:
        device: the device.
        dtype: dtype of the matrix products. float32 on a GPU uses TF32, as cuDNN's convolutions do.
        copy_bytes: size of the copied tensor; None for one far larger than any cache, within the
            free memory.
        sides: sides of the square matrices; None for 4096 and 8192 on a GPU, 1024 and 2048 on a
            CPU.
        rounds: measurements of each case, interleaved.

    Returns:
        The medians; of the products, the rate of the fastest size.
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
