"""The loops of a model that are kept between calls: their buffers, their graphs, and whose turn."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import torch

from ddpm_fast.sampling.step_loop import Model, StepLoop
from ddpm_fast.utils.cuda_graphs import UNROLLED_STEPS, CaptureError, GraphedStep, capture_key

Advance = Callable[[int], None]
Graph = Literal["auto"] | bool


class CachedLoop(NamedTuple):
    """A loop, what advances it, and how many steps that does best at once."""

    loop: StepLoop
    advance: Advance
    stride: int


class LoopCache:
    """Up to ``kept`` loops of one model by key; what is dropped frees its buffers and its graph.

    Samplers that share a cache take turns by its ``lock``, and on a GPU the work of each turn
    begins where that of the last one ends, on whatever stream. graph: as `Sampler` takes it; False
    off the GPU.
    """

    def __init__(self, model: Model, device: torch.device, graph: Graph, kept: int) -> None:
        self.lock = threading.Lock()
        self._model, self._device, self._graph, self._kept = model, device, graph, kept
        self._loops: dict[Hashable, CachedLoop] = {}
        self._captured_state: object = None
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopCache:
        raise TypeError("the buffers and graphs of a LoopCache cannot be copied; make a new one")

    def __len__(self) -> int:
        return len(self._loops)

    def acquire(self) -> None:
        """Wait, on the GPU, for the last turn's work; drop graphs that read what is no more."""
        if self._device.type != "cuda":
            return
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        state = capture_key(self._model)
        if state != self._captured_state:
            self._loops.clear()
        self._captured_state = state

    def release(self) -> None:
        """The end of a turn."""
        if self._device.type == "cuda":
            self._done = torch.cuda.current_stream(self._device).record_event()

    def loop(self, key: Hashable, make: Callable[[], StepLoop]) -> CachedLoop:
        """The loop of a key and what advances it, made at first use; it becomes the newest."""
        found = self._loops.pop(key, None)
        if found is None:
            while len(self._loops) >= self._kept:
                self._loops.pop(next(iter(self._loops)))
            found = self._captured(make())
        self._loops[key] = found
        return found

    def _captured(self, loop: StepLoop) -> CachedLoop:
        if self._graph:
            try:
                return CachedLoop(
                    loop, GraphedStep(loop.step, loop.rewind, self._device), UNROLLED_STEPS
                )
            except CaptureError as error:
                if self._graph is True:
                    raise
                warnings.warn(f"sampling without a CUDA graph: {error}", stacklevel=7)
                self._graph = False
        return CachedLoop(loop, loop.advance, 1)
