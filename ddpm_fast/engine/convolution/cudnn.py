"""Convolutions of the plan by cuDNN's graphs: each execution plan is a variant of its own.

A residual without a bias gets zeros for one: with both, cuDNN has precompiled kernels. A plan is
built when its workspace is asked for or when it is first run, and not before.
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

# Plans of a form that are offered, in cuDNN's own order; it has up to 80, which take seconds each
# to build and to time. A guess, until the ranks of the fastest are known.
MOST_PLANS = 16


@dataclass
class Launch:
    """A graph with its own copy of weight and bias."""

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
    """A convolution of one or two sources: of two, the second adds the first one's result.

    That result lies in the workspace, rounded to the activations' dtype: one rounding more than a
    convolution of one source has.
    doubled: the spec of an upsampling convolution whose input is enlarged in the workspace first.
    """

    name: str
    launches: list[Launch]
    plans: list[str]
    upsampled: ConvSpec | None = None
    first_bytes: int = 0  # of the first one's result

    @property
    def workspace_bytes(self) -> int:
        """The larger of the plans' own; the enlarged input or the first result lies before it."""
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
    """A doubling with its 3x3 convolution: four convolutions write every other pixel of `out`."""

    name: str
    launches: list[Launch]
    plan: str

    @property
    def workspace_bytes(self) -> int:
        """The largest of the four."""
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
    """The graphs of a convolution: one for each source."""
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
    """The four graphs of a doubling with its convolution, in the order of `PHASES`."""
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
    """cuDNN's graphs."""

    name = "cudnn"

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """It needs an NVIDIA GPU, the package, half precision, and an input."""
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
        except Exception as error:  # whatever a library that does not load raises
            return f"the package nvidia-cudnn-frontend does not load: {error}"
        return None if spec.batch * spec.height * spec.width else "the input is empty"

    def variants(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> list[CudnnVariant | CudnnPhases]:
        """One for each plan, best first by cuDNN's estimate.

        Of two sources, the plans are paired by rank. An upsampling convolution goes by an enlarged
        input, or by four phases with one plan.
        """
        return variants(spec, weight, bias, {"handle": handle_of(spec.device)})


def variants(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, where: dict[str, Any]
) -> list[CudnnVariant | CudnnPhases]:
    """`CudnnProvider.variants` for a device said as to `Graph`; a form without plans is logged."""
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
        except Exception as error:  # cudnn's own, of which some are no RuntimeError
            _log.info("%s: without cudnn's %s: %s", spec, form.__name__, str(error)[:300])
    return found
