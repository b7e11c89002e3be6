"""Benchmark of each operation of a network's plan, against the roofline limits."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ddpm_fast.bench import networks
from ddpm_fast.bench.cases import Benchmark, Run, relative_rms, timing_columns
from ddpm_fast.bench.operators import Measured, operator_cases
from ddpm_fast.bench.roofline import RooflineLimits
from ddpm_fast.bench.timing import interleaved, once
from ddpm_fast.engine.autotune.tuner import CudaTimer
from ddpm_fast.engine.convolution.candidates import adds_residuals
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.operations import Convolution, Normalization, SelfAttention
from ddpm_fast.models import UNet

_log = logging.getLogger("ddpm_fast")
_MAX_VARIANTS = 2  # variants of one provider that are timed in every round
COPY = "copy of as many bytes"


def operations(
    unet: UNet, batch: int, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> list[tuple[Measured, int]]:
    """List the distinct operations of an engine's plan and their counts, the costliest first.

    Args:
        unet: the network.
        batch: images in a batch.
        dtype: dtype of the engine.
        size: height and width of the images; None for the network's own.
    """
    height, width = size or networks.image_size(unet)
    norms_add = not adds_residuals(unet.device)
    program, _ = lower(unet, batch, height, width, dtype, norms_add=norms_add)
    found = [
        op
        for op in program.operations
        if isinstance(op, Convolution | Normalization | SelfAttention)
    ]
    counts = Counter(op.spec for op in found)
    distinct = {op.spec: op for op in reversed(found)}
    pairs = [(distinct[spec], count) for spec, count in counts.items()]
    return sorted(pairs, key=lambda pair: -_weight(*pair))


def _weight(operation: Measured, count: int) -> float:
    """Estimate an operation's share of the time, for sorting."""
    return count * (operation.flops / 100 + operation.nbytes)


class KernelBench(Benchmark):
    """Every distinct operation of a network's plan, by every implementation that runs."""

    def measure(
        self, rounds: int, limit: float, roofline: RooflineLimits
    ) -> Iterator[list[dict[str, Any]]]:
        """Measure one operation after the other.

        Args:
            rounds: measurements of each implementation.
            limit: seconds after which no further operation is measured.
            roofline: the device's limits, measured in the same run.

        Yields:
            The rows of one operation, one for each implementation that runs. `error` is the rms of
            the difference from float64 in the first sample, relative to the rms of the result.
            `GB_per_s` counts the bytes that the operation must move, `TFLOP_per_s` the products as
            the network defines them, whatever an implementation does.
        """
        end = time.perf_counter() + limit
        pairs = operations(self.unet, self.batch, self.dtype, self.size)
        for number, (operation, count) in enumerate(pairs):
            if number and time.perf_counter() > end:
                return
            with torch.no_grad():
                rows = self._measure_one(operation, rounds, roofline)
            about = self.subject(self.dtype) | {"count": count}
            yield [about | row | roofline.columns for row in rows]

    def _measure_one(
        self, operation: Measured, rounds: int, roofline: RooflineLimits
    ) -> list[dict[str, Any]]:
        cases = operator_cases(operation)
        timer = CudaTimer(self.device) if self.on_gpu else None
        calls: dict[str, Run] = {}
        errors: dict[str, float] = {}
        roles = {case.name: case.role for case in cases.cases}
        for case in cases.cases:
            if case.baseline and not self._with_baselines:
                continue
            try:
                run = case.prepare().run
                errors[case.name] = relative_rms(run(), cases.expected)
                calls[case.name] = timer.prepare(run) if timer else run
            except Exception as error:
                _log.info("%s: without %s: %s", operation.spec, case.name, error)
        calls = _promising(calls, self.device)
        half = torch.empty(operation.nbytes // 2, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(half)

        def copy() -> None:
            other.copy_(half)

        calls[COPY] = timer.prepare(copy) if timer else copy
        repeats = timer.calls if timer else 1
        rows = []
        for name, seconds in interleaved(calls, self.device, rounds).items():
            median = statistics.median(seconds) / repeats
            counted = cases.kind != "group_norm" and name != COPY
            rate = operation.flops / median if counted else None
            bandwidth = operation.nbytes / median
            rows.append(
                {
                    "kind": cases.kind,
                    "operation": str(operation.spec),
                    "implementation": name,
                    "role": roles.get(name, "copy"),
                    **timing_columns(seconds, 3, repeats),
                    "GB_per_s": round(bandwidth / 1e9, 2),
                    "of_copy": round(bandwidth / roofline.copy, 4),
                    "TFLOP_per_s": "" if rate is None else round(rate / 1e12, 4),
                    "of_matmul": "" if rate is None else round(rate / roofline.matmul, 4),
                    "error": "" if name == COPY else f"{errors[name]:.2e}",
                    "nbytes": operation.nbytes,
                    "arithmetic": cases.arithmetic,
                }
            )
        return rows


def _promising(calls: dict[str, Run], device: torch.device) -> dict[str, Run]:
    """Keep the `_KEPT` fastest variants of each provider."""
    seconds = {name: once(call, device) for name, call in calls.items()}
    counts: Counter[str] = Counter()
    best = set()
    for name in sorted(seconds, key=seconds.__getitem__):
        provider = name if name.startswith(("torch", "sdpa")) else name.partition(".")[0]
        counts[provider] += 1
        if counts[provider] <= _MAX_VARIANTS:
            best.add(name)
    return {name: call for name, call in calls.items() if name in best}
