"""Steps as CUDA graphs: captured once, replayed for every step of every chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

WARM_UP_CALLS = 3  # libraries choose and allocate in their first calls, which capture forbids
UNROLLED_STEPS = 8  # steps in the longer of the two graphs: a launch then costs an eighth a step
CAPTURE_LOCK = threading.RLock()  # CUDA has one capture at a time in a process
_here = threading.local()


def is_capturing() -> bool:
    """Whether what this thread enqueues is being captured, or is the warm-up for a capture."""
    return getattr(_here, "warms_up", False) or torch.cuda.is_current_stream_capturing()


def retain_for_graph(thing: object) -> bool:
    """Keep what this thread's coming graph reads, for as long as the graph; False without one.

    For models that may drop their buffers while a graph that was captured from them lives.
    """
    kept: list[object] | None = getattr(_here, "kept", None)
    if kept is not None and not any(other is thing for other in kept):
        kept.append(thing)
    return kept is not None


class CaptureError(RuntimeError):
    """A step that a CUDA graph cannot hold, with what made it fail."""


class GraphedStep:
    """Runs `step` any number of times by replaying CUDA graphs of 1 and of UNROLLED_STEPS steps.

    unrolled: False keeps the graph of one step alone, for calls of a single step.

    step: enqueues one step on the current stream, reading and writing static tensors only. It must
    not wait for the GPU, copy from the host or branch on device values. rewind: brings the step
    counter back to the first row; called before each warm-up call, so that they all are valid.

    Raises CaptureError where ``step`` cannot be captured; the current stream is then as before.
    """

    def __init__(
        self,
        step: Callable[[], None],
        rewind: Callable[[], None],
        device: torch.device,
        unrolled: bool = True,
    ) -> None:
        self._device = device
        self._kept: list[object] = []
        lengths = (1, UNROLLED_STEPS) if unrolled else (1,)
        try:
            graphs = capture_graphs(step, lengths, device, rewind=rewind, kept=self._kept)
        except RuntimeError as error:
            raise CaptureError(
                f"the model cannot be captured in a CUDA graph ({error}); it must not wait for"
                " the GPU, copy from the host or branch on device values. Pass graph=False to"
                " sample without a graph"
            ) from error
        self._one, self._many = graphs[0], graphs[1] if unrolled else None

    def __call__(self, steps: int = 1) -> None:
        """Enqueue so many steps on the current stream of the device."""
        with torch.cuda.device(self._device):
            if self._many is not None:
                for _ in range(steps // UNROLLED_STEPS):
                    self._many.replay()
                steps %= UNROLLED_STEPS
            for _ in range(steps):
                self._one.replay()


def capture_graphs(
    step: Callable[[], None],
    lengths: Sequence[int],
    device: torch.device,
    *,
    rewind: Callable[[], None] = lambda: None,
    kept: list[object] | None = None,
) -> list[torch.cuda.CUDAGraph]:
    """Capture CUDA graphs of one step repeated `lengths` times, on a stream of their own.

    Args:
        step: enqueues one step on the current stream, without synchronizing.
        lengths: steps in each graph. The graphs share one memory pool and must not run at once.
        device: a CUDA device.
        rewind: called before each warm-up call.
        kept: receives the objects that models register by `retain_for_graph`.

    Returns:
        One graph for each of `lengths`.

    Raises:
        RuntimeError: the capture failed; the current stream is then as before.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    with torch.cuda.device(device), CAPTURE_LOCK, _without_autocast_cache():
        outside = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(outside)
        outer, _here.kept = getattr(_here, "kept", None), kept if kept is not None else []
        try:
            with torch.cuda.stream(side):
                _warm_up(step, rewind)
            for length in lengths:
                pool = graphs[0].pool() if graphs else None
                graphs.append(_captured(step, length, side, pool))
        finally:
            _here.kept = outer
            torch.cuda.set_stream(outside)  # torch does not where the capture failed
            outside.wait_stream(side)
    return graphs


def _warm_up(step: Callable[[], None], rewind: Callable[[], None]) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    outer, _here.warms_up = getattr(_here, "warms_up", False), True  # the tuner captures in others'
    try:
        for _ in range(WARM_UP_CALLS):
            rewind()
            step()
        # Once more with waiting forbidden: an error here is clean, one inside a capture is not.
        rewind()
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        _here.warms_up = outer
    rewind()


def _captured(
    step: Callable[[], None],
    steps: int,
    stream: torch.cuda.Stream,
    pool: Any,
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        for _ in range(steps):
            step()
    return graph


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps its casts of the weights only to its end; a graph would read them later."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture_key(model: Any) -> object:
    """What a captured graph of the model depends on besides its inputs: addresses and modes."""
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    if not isinstance(model, torch.nn.Module):
        own = getattr(model, "captured_state", None)
        return autocast, own() if callable(own) else None
    tensors = (*model.parameters(), *model.buffers())
    modes = tuple((type(module), module.training) for module in model.modules())
    return autocast, modes, tuple(tensor.data_ptr() for tensor in tensors)
