"""Step loops cached between calls, with their buffers and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from ddpm_fast.sampling.step_loop import Model, StepLoop
from ddpm_fast.utils.cuda_graphs import UNROLLED_STEPS, CaptureError, GraphedStep, capture_key
from ddpm_fast.utils.fork import ForkSafeLock, runs_on_thread_pool

Graph = Literal["auto"] | bool


class CachedLoop(NamedTuple):
    """A loop and the function that advances it.

    Attributes:
        loop: The buffers and the step.
        advance: Runs a number of steps: eagerly, or by replaying a CUDA graph.
        stride: Number of steps that `advance` runs most efficiently in one call.
        warning: Reason why the step could not be captured, when the loop was made; else None.
    """

    loop: StepLoop
    advance: Callable[[int], None]
    stride: int
    warning: str | None = None


class LoopCache:
    """Least-recently-used cache of the loops of one model.

    Samplers that share a cache run one at a time. On a GPU the work of a call starts after that of
    the previous call, whatever streams they use.

    Args:
        model: The model.
        device: Device of the buffers.
        graph: As for `Sampler`; False on the CPU.
        capacity: Largest number of loops. An evicted loop frees its buffers and its graph.
    """

    def __init__(self, model: Model, device: torch.device, graph: Graph, capacity: int) -> None:
        self._lock = ForkSafeLock()
        self._model, self._device, self._graph, self._capacity = model, device, graph, capacity
        self._loops: dict[Hashable, CachedLoop] = {}
        self._captured_state: object = None
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopCache:
        raise TypeError("LoopCache must not be copied: it holds buffers and graphs; make a new one")

    def __len__(self) -> int:
        return len(self._loops)

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Lock the cache, and order the GPU work of this call after that of the previous one.

        Loops whose graph reads old or replaced parameters of the model are evicted.

        Raises:
            RuntimeError: This thread holds the cache already.
        """
        if self._lock.held:
            raise RuntimeError(
                "sampler must not be used within its own run, by the model or by progress; create"
                " another Sampler for that"
            )
        with self._lock:
            runs_on_thread_pool(self._device)
            if self._device.type != "cuda":
                yield
                return
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            state = capture_key(self._model)
            if state != self._captured_state:
                self._loops.clear()
            self._captured_state = state
            for key, cached in list(self._loops.items()):
                if isinstance(cached.advance, GraphedStep) and cached.advance.outdated():
                    del self._loops[key]
            yield
            self._done = torch.cuda.current_stream(self._device).record_event()

    def loop(self, key: Hashable, make: Callable[[], StepLoop]) -> CachedLoop:
        """Return the loop of a key, made and captured at first use.

        Args:
            key: Identifies the shape of the loop.
            make: Makes the loop.

        Returns:
            The loop; its `warning` is set only in the call that made it.

        Raises:
            CaptureError: The step cannot be captured and `graph` is True.
        """
        found = self._loops.pop(key, None)
        warning = None
        if found is None:
            while len(self._loops) >= self._capacity:
                self._loops.pop(next(iter(self._loops)))
            found, warning = self._capture(make())
        self._loops[key] = found
        return found._replace(warning=warning)

    def _capture(self, loop: StepLoop) -> tuple[CachedLoop, str | None]:
        warning = None
        if self._graph:
            try:
                graph = GraphedStep(loop.step, loop.rewind, self._device)
                return CachedLoop(loop, graph, UNROLLED_STEPS), None
            except CaptureError as error:
                if self._graph is True:
                    hint = "Pass graph=False to sample without a graph"
                    raise CaptureError(f"{error}. {hint}") from error
                warning = f"sampling without a CUDA graph: {error}"
                self._graph = False
        return CachedLoop(loop, loop.advance, 1), warning
