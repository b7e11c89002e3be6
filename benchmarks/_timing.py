"""Timing that holds on a shared machine: cases in turn, round by round, and quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Case = Callable[[], object]


def _seconds(case: Case, calls: int, device: torch.device) -> float:
    """Seconds a call, of ``calls`` calls in a row; on a GPU by its own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            case()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        case()
    return (time.perf_counter() - begin) / calls


def interleaved(
    cases: Mapping[str, Case], device: torch.device, rounds: int = 60, least: float = 2e-3
) -> dict[str, list[float]]:
    """Seconds a call of each case, ``rounds`` times, the cases taking turns.

    Each measurement lasts at least about ``least`` seconds, so that short calls are timed by the
    dozen; each round begins with another case, so that none always follows the same one.
    """
    names = list(cases)
    calls = {}
    for name in names:
        for _ in range(3):
            cases[name]()
        once = statistics.median(_seconds(cases[name], 1, device) for _ in range(5))
        calls[name] = max(1, min(1000, round(least / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_seconds(cases[name], calls[name], device))
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6}
