"""Interleaved timing of several cases, and quantiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

LEAST_S = 2e-3
_WARM_CALLS = 3
_GAUGING_CALLS = 5
_SLOW_S = 0.2  # one warm-up call is enough above this duration
_LEAST_ROUNDS = 3


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    """Measure `calls` calls in a row and return the seconds of one; CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def once(call: Call, device: torch.device) -> float:
    """Return a rough estimate of the seconds of one call, after a warm-up."""
    _seconds(call, 1, device)
    second = _seconds(call, 1, device)
    if second > _SLOW_S:
        return second
    _seconds(call, _WARM_CALLS, device)
    return statistics.median(_seconds(call, 1, device) for _ in range(_GAUGING_CALLS))


def interleaved(
    cases: Mapping[str, Call],
    device: torch.device,
    rounds: int = 60,
    least: float | None = None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Time cases in turn, round by round; each round starts with another case.

    Args:
        cases: calls by name.
        device: the device they run on.
        rounds: measurements of each case.
        least: seconds that one measurement lasts at least, by repeating short calls (up to 1000
            times); None for `LEAST_S`.
        limit: seconds after which no further round starts; three rounds are always measured.

    Returns:
        Seconds of one call, for each case and round.
    """
    least = LEAST_S if least is None else least
    names = list(cases)
    calls = {
        name: max(1, min(1000, round(least / max(once(case, device), 1e-7))))
        for name, case in cases.items()
    }
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
    """Return p20, p50 and p80 in microseconds; equal for a single measurement."""
    if len(seconds) == 1:
        return dict.fromkeys(("p20_us", "p50_us", "p80_us"), seconds[0] * 1e6)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6}
