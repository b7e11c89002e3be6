"""Capture of steps in CUDA graphs, and their replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ddpm_fast.utils.fork import ForkSafeLock

# Libraries select kernels and allocate memory in their first calls, which a capture forbids.
WARM_UP_CALLS = 3
UNROLLED_STEPS = 8  # steps in the longer of the two graphs: an eighth of the launches
CAPTURE_LOCK = ForkSafeLock()  # a process captures one graph at a time
_thread_state = threading.local()


def is_capturing() -> bool:
    """Return True if this thread captures a CUDA graph, or runs the warm-up of a capture."""
    return getattr(_thread_state, "warming_up", False) or torch.cuda.is_current_stream_capturing()


def retain_for_graph(value: object) -> bool:
    """Keep an object alive as long as the graph that this thread is about to capture.

    For models that may release their buffers while a graph captured from them is in use. A model
    with a method `captured_state` makes the graph outdated when the value of that changes.

    Args:
        value: An object whose memory the graph reads, or a model.

    Returns:
        False if this thread captures no graph.
    """
    retained: list[object] | None = getattr(_thread_state, "retained", None)
    if retained is not None and not any(other is value for other in retained):
        retained.append(value)
    return retained is not None


class CaptureError(RuntimeError):
    """A step cannot be captured in a CUDA graph; the message has the reason."""


class GraphedStep:
    """Repeats a step by replaying CUDA graphs of 1 and of UNROLLED_STEPS steps.

    Args:
        step: Enqueues one step on the current stream. It reads and writes static tensors only, and
            must not synchronize, copy from the host or branch on device values.
        rewind: Resets the step counter to the first row; called before each warm-up call.
        device: A CUDA device.
        unrolled: False captures the graph of one step only, for calls of a single step.

    Raises:
        CaptureError: `step` cannot be captured. The current stream is then as before.
    """

    def __init__(
        self,
        step: Callable[[], None],
        rewind: Callable[[], None],
        device: torch.device,
        unrolled: bool = True,
    ) -> None:
        self._device = device
        self._retained: list[object] = []
        lengths = (1, UNROLLED_STEPS) if unrolled else (1,)
        try:
            graphs = capture_graphs(step, lengths, device, rewind=rewind, retained=self._retained)
        except RuntimeError as error:
            raise CaptureError(
                f"the model cannot be captured in a CUDA graph ({error}); it must not wait for"
                " the GPU, copy from the host or branch on device values"
            ) from error
        self._one, self._many = graphs[0], graphs[1] if unrolled else None
        self._captured_states = self._states()

    def outdated(self) -> bool:
        """Return True if a model that was captured has changed and must be captured again."""
        return self._states() != self._captured_states

    def _states(self) -> list[object]:
        states = (getattr(value, "captured_state", None) for value in self._retained)
        return [state() for state in states if callable(state)]

    def __call__(self, steps: int = 1) -> None:
        """Enqueue a number of steps on the current stream of the device."""
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
    retained: list[object] | None = None,
    stream: torch.cuda.Stream | None = None,
) -> list[torch.cuda.CUDAGraph]:
    """Capture CUDA graphs of one step repeated `lengths` times, on a side stream.

    Args:
        step: Enqueues one step on the current stream, without synchronizing.
        lengths: Steps in each graph. The graphs share one memory pool and must not run at once.
        device: A CUDA device.
        rewind: Called before each warm-up call.
        retained: Receives the objects that models register by `retain_for_graph`. None: they go
            to the list of the capture that this one is part of, if any.
        stream: Side stream of the capture. None: a new one. The allocator and cuBLAS keep memory
            for each stream, so many captures should share one.

    Returns:
        One graph for each of `lengths`.

    Raises:
        RuntimeError: the capture failed; the current stream is then as before.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    with torch.cuda.device(device), CAPTURE_LOCK, _without_autocast_cache():
        outside = torch.cuda.current_stream()
        side = torch.cuda.Stream() if stream is None else stream
        side.wait_stream(outside)
        outer = getattr(_thread_state, "retained", None)
        _thread_state.retained = outer if retained is None else retained
        try:
            with torch.cuda.stream(side):
                _warm_up(step, rewind)
            for length in lengths:
                pool = graphs[0].pool() if graphs else None
                graphs.append(_captured(step, length, side, pool))
        finally:
            _thread_state.retained = outer
            torch.cuda.set_stream(outside)  # torch does not restore it after a failed capture
            outside.wait_stream(side)
    return graphs


def _warm_up(step: Callable[[], None], rewind: Callable[[], None]) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    # Restored afterwards: a tuner captures during the warm-up of another capture.
    outer = getattr(_thread_state, "warming_up", False)
    _thread_state.warming_up = True
    try:
        for _ in range(WARM_UP_CALLS):
            rewind()
            step()
        # With synchronization forbidden: an error here is clean, one inside a capture is not.
        rewind()
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        _thread_state.warming_up = outer
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
    """Disable autocast's cache of weights: a graph would read its tensors after they are freed."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture_key(model: Any) -> object:
    """Return what a captured graph of a model depends on besides its inputs.

    Args:
        model: A callable with a method `captured_state`, or a module, or another callable.

    Returns:
        A comparable object of the autocast state, the modes and the addresses of the parameters. A
        graph must be captured again when it changes.
    """
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    own = getattr(model, "captured_state", None)
    if callable(own):
        return autocast, own()
    if not isinstance(model, torch.nn.Module):
        return autocast, None
    tensors = (*model.parameters(), *model.buffers())
    modes = tuple((type(module), module.training) for module in model.modules())
    return autocast, modes, tuple(tensor.data_ptr() for tensor in tensors)
