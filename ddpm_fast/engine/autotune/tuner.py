"""Choosing the fastest of several ways to do the same thing, by timing them on this device."""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch

from ddpm_fast.engine.autotune.cache import PlanCache, TunerChoice
from ddpm_fast.utils.cuda_graphs import CAPTURE_LOCK, capture_graphs

_log = logging.getLogger("ddpm_fast")

Call = Callable[[], None]
MODES = ("on", "off")


class Timer(Protocol):
    """Measures calls."""

    def prepare(self, call: Call) -> Call:
        """Warm a call up and return what `seconds` measures. Raises where the call fails."""
        ...

    def seconds(self, prepared: Call) -> float:
        """Of one call, measured once."""
        ...


class CpuTimer:
    """By the clock, over as many calls as take at least `span` seconds."""

    def __init__(self, span: float = 2e-3) -> None:
        self.span = span

    def prepare(self, call: Call) -> Call:
        """Two calls: the first may build things."""
        call()
        call()
        return call

    def seconds(self, prepared: Call) -> float:
        """The mean of some calls."""
        calls = 0
        start = now = time.perf_counter()
        while not calls or now - start < self.span:
            prepared()
            calls += 1
            now = time.perf_counter()
        return (now - start) / calls


class CudaTimer:
    """By events around a captured CUDA graph of several calls, so without the host's share.

    The calls follow each other directly: what fits the L2 cache stays there, as activations that
    the operation before has just written do.
    """

    def __init__(self, device: torch.device, calls: int = 10) -> None:
        self.device = device
        self.calls = calls

    def prepare(self, call: Call) -> Call:
        """Warm the call up and capture `calls` of it; return the replay."""
        (graph,) = capture_graphs(call, (self.calls,), self.device)
        with torch.cuda.device(self.device):
            graph.replay()
            torch.cuda.synchronize()
        return graph.replay

    def seconds(self, prepared: Call) -> float:
        """One replay, for each of its calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            start.record()
            prepared()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


class Tuner:
    """Chooses among candidates: a recorded choice where there is one, else the fastest.

    device: where the candidates run. cache: the recorded choices; by default those of the device
    on disk. mode ``"off"``: always the first candidate, nothing timed, read or kept. rounds: how
    often each candidate is measured; medians are compared. After the first round those slower than
    `prune_ratio` times the best are measured no more.
    """

    def __init__(
        self,
        device: torch.device,
        cache: PlanCache | None = None,
        *,
        mode: str = "on",
        rounds: int = 7,
        prune_ratio: float = 1.5,
        timer: Timer | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}; got {mode!r}")
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {rounds}")
        if not prune_ratio >= 1:
            raise ValueError(f"prune_ratio must be at least 1; got {prune_ratio}")
        self.device = device
        self.mode = mode
        self.rounds = rounds
        self.prune_ratio = prune_ratio
        self._cache = cache
        self._timer = timer
        self._choices: dict[str, TunerChoice] = {}
        self._lock = threading.RLock()  # threads take turns: timings would disturb each other

    @property
    def choices(self) -> dict[str, TunerChoice]:
        """What this tuner has answered, key by key: part of a run's identity."""
        return dict(self._choices)

    def seconds(self, key: str) -> dict[str, float]:
        """What a key's candidates took a call, when they were timed; empty where nobody did."""
        choice = self._choices.get(key)
        return {} if choice is None else dict(choice.seconds)

    @property
    def cache(self) -> PlanCache:
        """The recorded choices."""
        if self._cache is None:
            self._cache = PlanCache.of_device(self.device)
        return self._cache

    @property
    def environment(self) -> dict[str, str]:
        """The device and the versions that the choices hold for."""
        return dict(self.cache.environment)

    def fastest(self, key: str, candidates: Mapping[str, Call]) -> str:
        """The name of the candidate to use for an operation.

        key: names the operation and all that its speed depends on, beside the environment.
        candidates: calls that do the same, by name; each is called several times and captured
        into a CUDA graph on a GPU. One that raises is left out and logged.

        Raises ValueError without candidates; RuntimeError while a CUDA graph is being captured, or
        where every candidate raises (from the first one's error).
        """
        if not candidates:
            raise ValueError(f"candidates must not be empty for {key!r}")
        # A capture's warm-up comes with CAPTURE_LOCK, and then wants this lock: so does everybody.
        with CAPTURE_LOCK if self.device.type == "cuda" else nullcontext(), self._lock:
            if key not in self._choices or self._choices[key].name not in candidates:
                self._choices[key] = self._choose(key, candidates)
            return self._choices[key].name

    def _choose(self, key: str, candidates: Mapping[str, Call]) -> TunerChoice:
        first = next(iter(candidates))
        if self.mode == "off":
            return TunerChoice(first)
        recorded = self.cache.get(key)
        if recorded is not None and recorded.name in candidates:
            return recorded
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernel of {key!r} is not chosen yet, and choosing it takes timings, which"
                " cannot be made while a CUDA graph is being captured: run the operation once"
                " before the capture"
            )
        seconds, short_of_memory = self._measure(key, candidates)
        best = TunerChoice(min(seconds, key=seconds.__getitem__), seconds)
        # What memory was missing for today may be the fastest tomorrow.
        standing = best if short_of_memory else self.cache.record(key, best, candidates.keys())
        _log.info("tuned %s: %s of %d", key, standing.name, len(candidates))
        return standing

    def _measure(self, key: str, candidates: Mapping[str, Call]) -> tuple[dict[str, float], bool]:
        """Medians of interleaved rounds, in seconds, of every candidate that runs.

        Also whether one did not for lack of memory.
        """
        short_of_memory = False
        timer = self._timer = self._timer or self._default_timer()
        prepared: dict[str, Call] = {}
        failure: Exception | None = None
        for name, call in candidates.items():
            try:
                prepared[name] = timer.prepare(call)
            except Exception as error:
                # Its traceback would keep the candidates, and with them their memory.
                failure = failure or error.with_traceback(None)
                short_of_memory |= isinstance(error, torch.OutOfMemoryError)
                _log.info("%s: without %s, which failed: %s", key, name, _short(error))
        if not prepared:
            raise RuntimeError(f"no candidate for {key!r} runs: {_short(failure)}") from failure
        samples = {name: [timer.seconds(call)] for name, call in prepared.items()}
        limit = self.prune_ratio * min(times[0] for times in samples.values())
        remaining = [name for name in samples if samples[name][0] <= limit]
        prepared = {name: prepared[name] for name in remaining}  # the others' graphs are freed
        for _ in range(self.rounds - 1):
            for name in remaining:
                samples[name].append(timer.seconds(prepared[name]))
        medians = {name: statistics.median(times) for name, times in samples.items()}
        finite = {name: value for name, value in medians.items() if math.isfinite(value)}
        return finite or medians, short_of_memory

    def _default_timer(self) -> Timer:
        return CudaTimer(self.device) if self.device.type == "cuda" else CpuTimer()


def _short(error: Exception | None) -> str:
    """The first line of an error, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
