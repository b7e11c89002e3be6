"""Each operation of a network's plan by itself: every implementation, against the ceilings."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.bench import networks
from ddpm_fast.bench.operators import Candidate, Measured, OperatorCases, operator_cases
from ddpm_fast.bench.roofline import RooflineLimits
from ddpm_fast.bench.timing import Case, interleaved, once, quantiles
from ddpm_fast.engine.autotune.tuner import CudaTimer
from ddpm_fast.engine.convolution.candidates import adds_residuals
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.operations import Convolution, Normalization, SelfAttention
from ddpm_fast.models import UNet
from ddpm_fast.utils import checks

_log = logging.getLogger("ddpm_fast")
_KEPT = 2  # variants of one provider that are timed to the end, the others only once
COPY = "copy of as many bytes"


def operations(
    unet: UNet, batch: int, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> list[tuple[Measured, int]]:
    """The distinct operations of the plan that an engine makes, and how often each is in it.

    Those with the most work come first. size: of the images; None takes the network's own.
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
    """A rough measure of an operation's share, to begin with the largest."""
    return count * (operation.flops / 100 + operation.nbytes)


def measure(
    name: str,
    unet: UNet,
    batch: int,
    dtype: torch.dtype,
    roofline: RooflineLimits,
    *,
    baselines: bool = True,
    rounds: int = 20,
    limit: float = math.inf,
    size: tuple[int, int] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one operation after the other, one row for each implementation that runs.

    error: rms of the difference from float64 on the first sample, relative to the result's rms.
    GB_per_s counts what the operation must move, whatever an implementation moves beside it;
    TFLOP_per_s the products as the network has them. After ``limit`` seconds
    no further operation is begun.
    """
    begin = time.perf_counter()
    for number, (operation, count) in enumerate(operations(unet, batch, dtype, size)):
        if number and time.perf_counter() - begin > limit:
            return
        with torch.no_grad():
            rows = _measure_one(operation, baselines, rounds, roofline)
        about = {
            "network": name,
            "batch": batch,
            "device": unet.device.type,
            "dtype": checks.dtype_name(dtype),
        }
        tail = roofline.columns
        yield [about | {"count": count} | row | tail for row in rows]


def _measure_one(
    operation: Measured, baselines: bool, rounds: int, roofline: RooflineLimits
) -> list[dict[str, Any]]:
    device = operation.spec.device
    made = operator_cases(operation)
    timer = CudaTimer(device) if device.type == "cuda" else None
    cases: dict[str, Case] = {}
    errors: dict[str, float] = {}
    baseline_names = {c.name for c in made.candidates if c.baseline}
    for candidate in made.candidates:
        if candidate.baseline and not baselines:
            continue
        try:
            errors[candidate.name] = _error(candidate, made)
            cases[candidate.name] = _prepared(candidate.run, timer)
        except Exception as error:
            _log.info("%s: without %s: %s", operation.spec, candidate.name, error)
    cases = _promising(cases, device)
    half = torch.empty(operation.nbytes // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    cases[COPY] = _prepared(lambda: other.copy_(half), timer)
    calls = timer.calls if timer else 1
    times = interleaved(cases, device, rounds)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds) / calls
        counts = made.kind != "group_norm" and name != COPY
        rate = operation.flops / median if counts else None
        bandwidth = operation.nbytes / median
        rows.append(
            {
                "kind": made.kind,
                "operation": str(operation.spec),
                "implementation": name,
                "role": "copy" if name == COPY else "peer" if name in baseline_names else "ours",
                "rounds": len(seconds),
                **{k: round(us / calls, 3) for k, us in quantiles(seconds).items()},
                "GB_per_s": round(bandwidth / 1e9, 2),
                "of_copy": round(bandwidth / roofline.copy, 4),
                "TFLOP_per_s": "" if rate is None else round(rate / 1e12, 4),
                "of_matmul": "" if rate is None else round(rate / roofline.matmul, 4),
                "error": "" if name == COPY else f"{errors[name]:.2e}",
                "nbytes": operation.nbytes,
                "arithmetic": made.arithmetic,
            }
        )
    return rows


def _prepared(call: Any, timer: CudaTimer | None) -> Case:
    """What is timed: on a GPU the replay of a graph of ``timer.calls`` calls."""
    return timer.prepare(call) if timer else call


def _error(candidate: Candidate, made: OperatorCases) -> float:
    got: Tensor = candidate.run()[:1].double()
    error = (got - made.expected).square().mean() / made.expected.square().mean()
    return float(error.sqrt())


def _promising(cases: dict[str, Case], device: torch.device) -> dict[str, Case]:
    """The cases without those of a provider that are slower than its `_KEPT` best."""
    seconds = {name: once(case, device) for name, case in cases.items()}
    kept: Counter[str] = Counter()
    best = set()
    for name in sorted(seconds, key=seconds.__getitem__):
        provider = name if name.startswith(("torch", "sdpa")) else name.partition(".")[0]
        kept[provider] += 1
        if kept[provider] <= _KEPT:
            best.add(name)
    return {name: case for name, case in cases.items() if name in best}
