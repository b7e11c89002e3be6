"""Timing that holds on a shared machine: cases in turn, round by round, and quantiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Case = Callable[[], object]

LEAST_S = 2e-3
_WARM_CALLS = 3
_GAUGING_CALLS = 5
_SLOW_S = 0.2  # a call that takes longer needs no more than one to be warm
_LEAST_ROUNDS = 3


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


def once(case: Case, device: torch.device) -> float:
    """Seconds of a warm call, roughly."""
    _seconds(case, 1, device)
    second = _seconds(case, 1, device)
    if second > _SLOW_S:
        return second
    _seconds(case, _WARM_CALLS, device)
    return statistics.median(_seconds(case, 1, device) for _ in range(_GAUGING_CALLS))


def interleaved(
    cases: Mapping[str, Case],
    device: torch.device,
    rounds: int = 60,
    least: float | None = None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds a call of each case, ``rounds`` times, the cases taking turns.

    Each measurement lasts at least about ``least`` seconds, by default LEAST_S, so that short calls
    are timed by the dozen; each round begins with another case, so that none always follows the
    same one. After ``limit`` seconds no further round is begun, but three are measured in any case.
    """
    least = LEAST_S if least is None else least
    names = list(cases)
    calls = {}
    for name in names:
        calls[name] = max(1, min(1000, round(least / max(once(cases[name], device), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= _LEAST_ROUNDS and time.perf_counter() - begin > limit:
            break
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_seconds(cases[name], calls[name], device))
    return times


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds; all the same where there is one measurement."""
    if len(seconds) == 1:
        return dict.fromkeys(("p20_us", "p50_us", "p80_us"), seconds[0] * 1e6)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6}
