"""One step as a CUDA graph: captured once, replayed for every step of every chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP_CALLS = 3  # libraries choose and allocate in their first calls, which capture forbids


class CaptureError(RuntimeError):
    """A step that a CUDA graph cannot hold, with what made it fail."""


class GraphedStep:
    """A callable that replays ``step`` as one CUDA graph.

    step: enqueues one step on the current stream, reading and writing static tensors only. It must
    not allocate across calls, wait for the GPU or branch on device values. rewind: brings the step
    counter back to the first row; called before each warm-up call, so that they all are valid.

    The capture is bound to the thread that makes it; other threads may go on using the GPU.
    Raises CaptureError where ``step`` cannot be captured.
    """

    def __init__(
        self, step: Callable[[], None], rewind: Callable[[], None], device: torch.device
    ) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._graph = self._capture(step, rewind)

    @staticmethod
    def _capture(step: Callable[[], None], rewind: Callable[[], None]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                rewind()
                step()
            rewind()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            raise CaptureError(
                f"the model cannot be captured in a CUDA graph ({error}); it must not wait for"
                " the GPU, copy from the host or branch on device values. Pass graph=False to"
                " sample without a graph"
            ) from error
        return graph

    def __call__(self) -> None:
        """Enqueue one step on the current stream of the device."""
        with torch.cuda.device(self._device):
            self._graph.replay()
