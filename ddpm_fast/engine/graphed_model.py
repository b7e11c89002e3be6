"""Replay of a model's calls as a CUDA graph, outside a `Sampler`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils.cuda_graphs import GraphedStep, is_capturing
from ddpm_fast.utils.fork import ForkSafeLock


class GraphedModel:
    """Call `model(x, t, class_labels)` by replaying a CUDA graph, captured at the first call.

    Another shape or dtype of the inputs is captured again. Inside another capture the model runs
    directly and becomes part of that graph. Calls are serialised across threads and streams,
    because the graph has one set of buffers.

    Args:
        model: the model; its calls must not synchronize.
        device: its CUDA device.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._lock = ForkSafeLock()
        self._inputs: list[Tensor | None] = []
        self._out: Tensor | None = None
        self._graph: GraphedStep | None = None
        self._done: torch.cuda.Event | None = None

    @torch.inference_mode(False)  # the buffers are used inside and outside of inference mode
    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Return the model's output in newly allocated memory."""
        if is_capturing():
            return self._model(x, t, class_labels)
        if not isinstance(t, Tensor):
            t = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        inputs = [x, t.expand(x.shape[0]), class_labels]
        with self._lock, torch.cuda.device(self._device):
            if self._graph is None or not _alike(inputs, self._inputs):
                return self._captured(inputs)
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            for buffer, value in zip(self._inputs, inputs, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            self._graph()
            out = self._out.clone()  # type: ignore[union-attr]
            self._done = stream.record_event()
            return out

    def _captured(self, inputs: list[Tensor | None]) -> Tensor:
        """Capture a graph for these shapes; return the output of a direct call."""
        result = self._model(*inputs)
        buffers = [None if tensor is None else tensor.clone() for tensor in inputs]
        out = torch.empty_like(result)

        def step() -> None:
            out.copy_(self._model(*buffers))

        graph = GraphedStep(step, lambda: None, self._device, unrolled=False)
        self._graph, self._inputs, self._out = graph, buffers, out
        return result


def _alike(inputs: list[Tensor | None], others: list[Tensor | None]) -> bool:
    """Return True if the tensors have the same shapes, dtypes and devices."""
    kinds, others_kinds = (
        [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        for tensors in (inputs, others)
    )
    return kinds == others_kinds
