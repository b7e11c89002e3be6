"""A model whose calls replay a CUDA graph, for loops that are not a `Sampler`'s."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils.cuda_graphs import GraphedStep, is_capturing


class GraphedModel:
    """``model(x, t, class_labels)`` for inputs of one shape, captured at the first call.

    Inside somebody else's capture the model runs as it is and becomes part of that graph. Calls
    take turns, on any thread and stream: the graph has one set of buffers.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._lock = threading.Lock()
        self._inputs: list[Tensor | None] = []
        self._out: Tensor | None = None
        self._graph: GraphedStep | None = None
        self._done: torch.cuda.Event | None = None

    @torch.inference_mode(False)  # the buffers serve calls inside and outside of it
    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """The model's output, in memory of its own."""
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
            for mine, given in zip(self._inputs, inputs, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)
            self._graph()
            out = self._out.clone()  # type: ignore[union-attr]
            self._done = stream.record_event()
            return out

    def _captured(self, inputs: list[Tensor | None]) -> Tensor:
        """Capture for inputs like these; the result of a plain call, which also checks them."""
        result = self._model(*inputs)
        mine = [None if tensor is None else tensor.clone() for tensor in inputs]
        out = torch.empty_like(result)

        def step() -> None:
            out.copy_(self._model(*mine))

        graph = GraphedStep(step, lambda: None, self._device, unrolled=False)
        self._graph, self._inputs, self._out = graph, mine, out
        return result


def _alike(inputs: list[Tensor | None], others: list[Tensor | None]) -> bool:
    """Whether tensors have the same shapes, types and devices."""
    kinds, others_kinds = (
        [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        for tensors in (inputs, others)
    )
    return kinds == others_kinds
