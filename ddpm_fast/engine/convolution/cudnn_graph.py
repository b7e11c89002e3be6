"""cuDNN graphs of a convolution, by NVIDIA's package nvidia-cudnn-frontend.

A graph is one kernel: convolution, plus residual, plus bias, rounded once. The order matters:
residual before bias matches cuDNN's precompiled convolutions; with the bias first cuDNN falls back
on kernels compiled at run time. The bias must have the dtype of the activations for that.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Kernels whose sums are not in float32, or whose results are not deterministic.
_UNWANTED = (
    "NONDETERMINISTIC",
    "REDUCED_PRECISION_REDUCTION",
    "DOWN_CONVERT_INPUTS",
    "FFT",
    "WINOGRAD",
    "WINOGRAD_TILE_4x4",
    "WINOGRAD_TILE_6x6",
    "WINOGRAD_TILE_13x13",
)
_running = threading.Lock()  # threads share a GPU's handle, which has one stream
DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}


@dataclass(frozen=True)
class Kernel:
    """Description of a graph: out = conv(x, weight) + residual + bias.

    Attributes:
        size: batch, channels, height and width of the input.
        out_channels: channels of the output.
        window: height and width of the kernel.
        stride: stride in both directions.
        pre: padding (top, left).
        post: padding (bottom, right).
        out_strides: strides of output and residual [N, O, H', W'], in elements.
        residual: add a residual.
        bias: add a bias.
        dtype: dtype of the tensors.
    """

    size: tuple[int, int, int, int]
    out_channels: int
    window: tuple[int, int]
    stride: int
    pre: tuple[int, int]
    post: tuple[int, int]
    out_strides: tuple[int, int, int, int]
    residual: bool
    bias: bool
    dtype: torch.dtype

    @property
    def out_size(self) -> tuple[int, int, int, int]:
        """Batch, channels, height and width of the output."""
        height, width = (
            (n + before + after - k) // self.stride + 1
            for n, before, after, k in zip(
                self.size[2:], self.pre, self.post, self.window, strict=True
            )
        )
        return self.size[0], self.out_channels, height, width


def nhwc(size: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the strides of a dense channels_last tensor [N, C, H, W]."""
    _, channels, height, width = size
    return height * width * channels, 1, width * channels, channels


class Graph:
    """cuDNN graph with its proposed execution plans; tensors are bound when it runs.

    Args:
        kernel: the graph's description.
        where: keyword arguments for the device: `handle=` of an available GPU, or
            `device_property=` of a described one, for which plans can be built but not run.

    Raises:
        RuntimeError: no kernel supports the graph. cudnn may raise errors of its own.
    """

    X, WEIGHT, RESIDUAL, BIAS, OUT = range(1, 6)  # identifiers of the tensors

    def __init__(self, kernel: Kernel, where: dict[str, Any]) -> None:
        cudnn = importlib.import_module("cudnn")
        self.kernel = kernel
        self._where = where
        half = getattr(cudnn.data_type, DTYPES[kernel.dtype])
        graph = cudnn.pygraph(
            io_data_type=half,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            **where,
        )

        def tensor(uid: int, size: Any, strides: Any) -> Any:
            created = graph.tensor(dim=list(size), stride=list(strides), data_type=half)
            return created.set_uid(uid)

        window = (kernel.out_channels, kernel.size[1], *kernel.window)
        y = graph.conv_fprop(
            tensor(self.X, kernel.size, nhwc(kernel.size)),
            tensor(self.WEIGHT, window, nhwc(window)),
            pre_padding=list(kernel.pre),
            post_padding=list(kernel.post),
            stride=[kernel.stride] * 2,
            dilation=[1, 1],
        )
        if kernel.residual:
            y = graph.add(y, tensor(self.RESIDUAL, kernel.out_size, kernel.out_strides))
        if kernel.bias:
            channels = (1, kernel.out_channels, 1, 1)
            y = graph.add(y, tensor(self.BIAS, channels, nhwc(channels)))
        y.set_output(True).set_data_type(half).set_uid(self.OUT)
        y.set_dim(list(kernel.out_size)).set_stride(list(kernel.out_strides))
        graph.validate()
        graph.build_operation_graph()
        modes = cudnn.heur_mode
        graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([getattr(notes, n) for n in _UNWANTED if hasattr(notes, n)])
        self._graph = graph
        names = [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
        # The heuristics propose plans repeatedly; keep the first of each name.
        self._index = {name: i for i, name in reversed(list(enumerate(names)))}
        self._built: set[str] = set()

    @property
    def plans(self) -> list[str]:
        """Names of the plans, in the order of cuDNN's heuristics."""
        return sorted(self._index, key=self._index.__getitem__)

    def workspace_bytes(self, plan: str) -> int:
        """Build a plan and return its workspace size; RuntimeError if it cannot be built."""
        index = self._index[plan]
        if plan not in self._built:
            self._graph.build_plan_at_index(index)
            self._built.add(plan)
        return int(self._graph.get_workspace_size_plan_at_index(index))

    def run(self, plan: str, tensors: dict[int, Tensor | None], workspace: Tensor | None) -> None:
        """Run a plan on the current stream; tensors by X, WEIGHT, RESIDUAL, BIAS and OUT."""
        cudnn = importlib.import_module("cudnn")
        if plan not in self._built:
            self.workspace_bytes(plan)
        out = tensors[self.OUT]
        assert out is not None
        handle = self._where["handle"]
        stream = torch.cuda.current_stream(out.device).cuda_stream
        if workspace is None:
            workspace = torch.empty(0, dtype=torch.uint8, device=out.device)
        bound = {uid: value for uid, value in tensors.items() if value is not None}
        with _running, torch.cuda.device_of(out):
            cudnn.set_stream(handle=handle, stream=stream)
            self._graph.execute_plan_at_index(bound, workspace, self._index[plan], handle=handle)


_HANDLES: dict[torch.device, Any] = {}


def handle_of(device: torch.device) -> Any:
    """Return the process's cuDNN handle of a GPU."""
    if device not in _HANDLES:
        with torch.cuda.device(device):
            _HANDLES[device] = importlib.import_module("cudnn").create_handle()
    return _HANDLES[device]
