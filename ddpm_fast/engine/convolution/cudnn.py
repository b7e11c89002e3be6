"""Convolutions by cuDNN graphs: each execution plan is a separate variant.

A residual without a bias gets a bias of zeros, because cuDNN has precompiled kernels for both
together. A plan is built when its workspace size is queried or when it first runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.engine.convolution.aten import (
    PHASES,
    copy_bias,
    pack_weight,
    phase_weight,
    upsample_into,
    upsampled_bytes,
)
from ddpm_fast.engine.convolution.cudnn_graph import DTYPES, Graph, Kernel, handle_of, nhwc
from ddpm_fast.engine.specs import ConvSpec

_log = logging.getLogger("ddpm_fast")

# Plans considered, in the order of cuDNN's heuristics. It proposes up to 80, and each takes seconds
# to build and to time. The limit has not been tuned on hardware.
MOST_PLANS = 16


@dataclass
class Launch:
    """Graph with its own copy of weight and bias."""

    graph: Graph
    weight: Tensor
    bias: Tensor | None

    def __call__(
        self, plan: str, out: Tensor, x: Tensor, residual: Tensor | None, workspace: Tensor | None
    ) -> None:
        """Run one of the graph's plans."""
        tensors = {
            Graph.X: x,
            Graph.WEIGHT: self.weight,
            Graph.RESIDUAL: residual,
            Graph.BIAS: self.bias,
            Graph.OUT: out,
        }
        self.graph.run(plan, tensors, workspace)


@dataclass
class CudnnVariant:
    """Convolution of one or two sources; the second graph adds the result of the first.

    That result is stored in the workspace, rounded to the dtype of the activations: one rounding
    more than with one source.

    Attributes:
        launches: the graph of each source.
        plans: name of the plan of each graph.
        upsampled: spec of a convolution whose input is upsampled into the workspace first.
        first_bytes: size of the first graph's result; 0 with one source.
    """

    name: str
    launches: list[Launch]
    plans: list[str]
    upsampled: ConvSpec | None = None
    first_bytes: int = 0

    @property
    def workspace_bytes(self) -> int:
        """Size of the larger plan's workspace, after the upsampled input or first result."""
        sizes = [
            launch.graph.workspace_bytes(plan)
            for launch, plan in zip(self.launches, self.plans, strict=True)
        ]
        return max(sizes) + self._before

    @property
    def _before(self) -> int:
        nbytes = upsampled_bytes(self.upsampled) if self.upsampled else self.first_bytes
        return -(-nbytes // 256) * 256

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        """Write the convolution to `out`."""
        first = out
        if self.upsampled:
            x = upsample_into(workspace, x, self.upsampled)
        elif self.first_bytes:
            assert workspace is not None
            memory = workspace.flatten()[: self.first_bytes].view(out.dtype)
            first = memory.as_strided(out.shape, out.stride())
        if workspace is not None:
            workspace = workspace.flatten()[self._before :]
        self.launches[0](self.plans[0], first, x, residual, workspace)
        if x2 is not None:
            self.launches[1](self.plans[1], out, x2, first, workspace)


@dataclass
class CudnnPhases:
    """3x3 convolution after upsampling, as four convolutions that write every other pixel."""

    name: str
    launches: list[Launch]
    plan: str

    @property
    def workspace_bytes(self) -> int:
        """Size of the largest of the four workspaces."""
        return max(launch.graph.workspace_bytes(self.plan) for launch in self.launches)

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        """Write the convolution to `out`."""
        for launch, (a, b) in zip(self.launches, PHASES, strict=True):
            added = None if residual is None else residual[:, :, a::2, b::2]
            launch(self.plan, out[:, :, a::2, b::2], x, added, workspace)


def kernels(spec: ConvSpec) -> list[Kernel]:
    """Return the graph descriptions of a convolution, one for each source."""
    left, right, top, bottom = spec.padding
    scale = 2 if spec.upsample else 1
    size = (spec.batch, spec.in_channels, scale * spec.height, scale * spec.width)
    out = (spec.batch, spec.out_channels, *spec.out_size)
    first = Kernel(
        size=size,
        out_channels=spec.out_channels,
        window=(spec.kernel, spec.kernel),
        stride=spec.stride,
        pre=(top, left),
        post=(bottom, right),
        out_strides=nhwc(out),
        residual=spec.residual,
        bias=spec.bias or spec.residual,
        dtype=spec.dtype,
    )
    if not spec.in_channels2:
        return [first]
    second = replace(
        first,
        size=(size[0], spec.in_channels2, *size[2:]),
        residual=True,
        bias=True,
    )
    return [replace(first, bias=spec.residual), second]


def phase_kernels(spec: ConvSpec) -> list[Kernel]:
    """Return the four graph descriptions of an upsampling convolution, in the order of `PHASES`."""
    whole = kernels(replace(spec, upsample=False))[0]
    batch, row, pixel = (
        nhwc((spec.batch, spec.out_channels, *spec.out_size))[i] for i in (0, 2, 3)
    )
    return [
        replace(
            whole,
            window=(2, 2),
            pre=(1 - a, 1 - b),
            post=(a, b),
            out_strides=(batch, 1, 2 * row, 2 * pixel),
        )
        for a, b in PHASES
    ]


def _installed() -> bool:
    return importlib.util.find_spec("cudnn") is not None


class CudnnProvider:
    """cuDNN graphs."""

    name = "cudnn"

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """Check the GPU, the package, the dtype and that the input is not empty."""
        if spec.device.type != "cuda":
            return f"it runs on NVIDIA GPUs; this is {spec.device}"
        if spec.dtype not in DTYPES:
            return f"it takes float16 and bfloat16, not {spec.dtype}"
        if not _installed():
            return "the package is not installed; `pip install nvidia-cudnn-frontend`"
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU (see nvidia-smi)"
        try:
            importlib.import_module("cudnn")
        except Exception as error:  # loading a library may raise anything
            return f"the package nvidia-cudnn-frontend does not load: {error}"
        return None if spec.batch * spec.height * spec.width else "the input is empty"

    def variants(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> list[CudnnVariant | CudnnPhases]:
        """Return one variant for each plan, ordered by cuDNN's estimate.

        With two sources, plans of the same rank are paired. An upsampling convolution runs on the
        upsampled input, or as four phases with one plan.
        """
        return variants(spec, weight, bias, {"handle": handle_of(spec.device)})


def variants(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, where: dict[str, Any]
) -> list[CudnnVariant | CudnnPhases]:
    """Return `CudnnProvider.variants` for a device given as for `Graph`; log failed forms."""
    own = copy_bias(bias, spec.dtype)
    zeros = torch.zeros(spec.out_channels, dtype=spec.dtype, device=weight.device)

    def launch(kernel: Kernel, part: Tensor, bias: Tensor | None) -> Launch:
        added = (zeros if bias is None else bias) if kernel.bias else None
        return Launch(Graph(kernel, where), part, added)

    def whole() -> list[CudnnVariant | CudnnPhases]:
        parts = [pack_weight(weight[:, : spec.in_channels], spec.dtype)]
        biases = [own]
        if spec.in_channels2:
            parts.append(pack_weight(weight[:, spec.in_channels :], spec.dtype))
            biases = [None, own]
        launches = [launch(*each) for each in zip(kernels(spec), parts, biases, strict=True)]
        upsampled = spec if spec.upsample else None
        size = spec.batch * spec.out_channels * math.prod(spec.out_size) * spec.dtype.itemsize
        first_bytes = size if spec.in_channels2 else 0
        prefix = "cudnn.nearest" if spec.upsample else "cudnn"
        pairs = zip(*(each.graph.plans for each in launches), strict=False)
        return [
            CudnnVariant(
                f"{prefix}.{'+'.join(plans)}", launches, list(plans), upsampled, first_bytes
            )
            for plans in islice(pairs, MOST_PLANS)
        ]

    def phases() -> list[CudnnVariant | CudnnPhases]:
        weights = phase_weight(weight, spec.dtype)
        launches = [
            launch(kernel, part, own)
            for kernel, part in zip(phase_kernels(spec), weights, strict=True)
        ]
        common = set.intersection(*(set(each.graph.plans) for each in launches))
        plans = [plan for plan in launches[0].graph.plans if plan in common]
        return [CudnnPhases(f"cudnn.phases.{plan}", launches, plan) for plan in plans[:MOST_PLANS]]

    found: list[CudnnVariant | CudnnPhases] = []
    for form in (whole, phases) if spec.upsample else (whole,):
        try:
            found.extend(form())
        except Exception as error:  # some of cudnn's errors are no RuntimeError
            _log.info("%s: without cudnn's %s: %s", spec, form.__name__, str(error)[:300])
    return found
