"""Selection of the fastest of several implementations, by timing them on the device."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch

from ddpm_fast.engine.autotune.cache import PlanCache, TunerChoice
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import CAPTURE_LOCK, capture_graphs
from ddpm_fast.utils.fork import ForkSafeLock

_log = logging.getLogger("ddpm_fast")

Call = Callable[[], None]
MODES = ("on", "off")


class Timer(Protocol):
    """Measurement of calls."""

    def prepare(self, call: Call) -> Call:
        """Warm up a call and return what `seconds` measures; raises if the call fails."""
        ...

    def seconds(self, prepared: Call) -> float:
        """Measure once and return the seconds of one call."""
        ...


class CpuTimer:
    """Timer by the clock.

    Args:
        span: seconds that a measurement lasts at least, by repeating the call.
    """

    def __init__(self, span: float = 2e-3) -> None:
        self.span = span

    def prepare(self, call: Call) -> Call:
        """Call twice, because the first call may build or allocate."""
        call()
        call()
        return call

    def seconds(self, prepared: Call) -> float:
        """Return the mean over the calls of one span."""
        calls = 0
        start = now = time.perf_counter()
        while not calls or now - start < self.span:
            prepared()
            calls += 1
            now = time.perf_counter()
        return (now - start) / calls


class CudaTimer:
    """Timer by CUDA events around a captured CUDA graph, which excludes the host's overhead.

    The calls follow each other directly: data that fits the L2 cache stays there, like activations
    that the preceding operation has just written.

    Args:
        device: a CUDA device.
        calls: calls in the graph.
    """

    def __init__(self, device: torch.device, calls: int = 10) -> None:
        self.device = device
        self.calls = calls
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, call: Call) -> Call:
        """Capture `calls` calls and return the replay."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        (graph,) = capture_graphs(call, (self.calls,), self.device, stream=self._stream)
        with torch.cuda.device(self.device):
            graph.replay()
            torch.cuda.synchronize()
        return graph.replay

    def seconds(self, prepared: Call) -> float:
        """Return the time of one replay divided by its calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            start.record()
            prepared()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


class Tuner:
    """Choose among candidates: the recorded choice if there is one, otherwise the fastest.

    Args:
        device: device of the candidates.
        cache: recorded choices; None for those of the device on disk.
        mode: "on", or "off" to take the first candidate always, without timing, reading or
            recording.
        rounds: measurements of each candidate, at least 1; medians are compared.
        prune_ratio: candidates slower than `prune_ratio` times the fastest in the first round are
            not measured again; at least 1, inf to measure all of them again.
        timer: measures the candidates; None for `CpuTimer` or `CudaTimer`.

    Raises:
        TypeError: `rounds` or `prune_ratio` is not a number.
        ValueError: an argument is out of range.
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
        self.device = device
        self.mode = checks.choice("mode", mode, MODES)
        self.rounds = checks.integer("rounds", rounds, 1)
        self.prune_ratio = checks.real("prune_ratio", prune_ratio, 1, closed="[]")
        self._cache = cache
        self._timer = timer
        self._choices: dict[str, TunerChoice] = {}
        self._lock = ForkSafeLock()  # concurrent timings would disturb each other

    @property
    def choices(self) -> dict[str, TunerChoice]:
        """Choices made by this tuner, by key; part of a run's identity."""
        return dict(self._choices)

    def seconds(self, key: str) -> dict[str, float]:
        """Return the seconds of a key's candidates as they were timed; empty if they were not."""
        choice = self._choices.get(key)
        return {} if choice is None else dict(choice.seconds)

    @property
    def cache(self) -> PlanCache:
        """Recorded choices."""
        if self._cache is None:
            self._cache = PlanCache.of_device(self.device)
        return self._cache

    @property
    def environment(self) -> dict[str, str]:
        """Device and versions that the choices are valid for."""
        return dict(self.cache.environment)

    def fastest(self, key: str, candidates: Mapping[str, Call]) -> str:
        """Return the name of the candidate to use for an operation.

        Args:
            key: identifies the operation and everything its speed depends on, beyond the
                environment.
            candidates: equivalent calls by name. Each is called several times, on a GPU captured
                into a CUDA graph. One that raises is left out and logged.

        Raises:
            ValueError: `candidates` is empty.
            RuntimeError: a CUDA graph is being captured, or every candidate raises (chained to the
                first error).
        """
        if not candidates:
            raise ValueError(f"candidates must not be empty for {key!r}")
        # Lock order: a capture's warm-up holds the capture lock when it calls this.
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
                f"the kernel of {key!r} is not chosen yet and cannot be timed while a CUDA graph is"
                " being captured; run the operation once before the capture"
            )
        seconds, short_of_memory = self._measure(key, candidates)
        best = TunerChoice(min(seconds, key=seconds.__getitem__), seconds)
        # A candidate that ran out of memory may be the fastest in another run.
        standing = best if short_of_memory else self.cache.record(key, best, candidates.keys())
        _log.info("tuned %s: %s of %d", key, standing.name, len(candidates))
        return standing

    def _measure(self, key: str, candidates: Mapping[str, Call]) -> tuple[dict[str, float], bool]:
        """Return the median seconds of the candidates, and True if one ran out of memory."""
        short_of_memory = False
        timer = self._timer = self._timer or self._default_timer()
        prepared: dict[str, Call] = {}
        failure: Exception | None = None
        for name, call in candidates.items():
            try:
                prepared[name] = timer.prepare(call)
            except Exception as error:
                # The traceback would keep the candidates and their memory alive.
                failure = failure or error.with_traceback(None)
                short_of_memory |= isinstance(error, torch.OutOfMemoryError)
                _log.info("%s: without %s, which failed: %s", key, name, _short(error))
        if not prepared:
            raise RuntimeError(f"no candidate for {key!r} runs: {_short(failure)}") from failure
        samples = {name: [timer.seconds(call)] for name, call in prepared.items()}
        limit = self.prune_ratio * min(times[0] for times in samples.values())
        remaining = [name for name in samples if samples[name][0] <= limit]
        prepared = {name: prepared[name] for name in remaining}  # frees the other graphs
        for _ in range(self.rounds - 1):
            for name in remaining:
                samples[name].append(timer.seconds(prepared[name]))
        medians = {name: statistics.median(times) for name, times in samples.items()}
        finite = {name: value for name, value in medians.items() if math.isfinite(value)}
        return finite or medians, short_of_memory

    def _default_timer(self) -> Timer:
        return CudaTimer(self.device) if self.device.type == "cuda" else CpuTimer()


def _short(error: Exception | None) -> str:
    """Return an error's type and first line, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
