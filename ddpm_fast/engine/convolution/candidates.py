"""Candidates for a convolution of a plan, and the choice of the fastest.

A provider turns a `ConvSpec` and its weights into variants: the same convolution by different
kernels. `candidates` lists those of all providers, plain ATen first; `fastest` lets a `Tuner`
choose one.

======== ============================================================ =========================
provider kernels                                                      runs on
======== ============================================================ =========================
aten     torch's own convolution and matrix product                   any device
onednn   oneDNN with a packed weight and the sums fused               CPU, if torch has it
triton   ddpm_fast.ops.triton.conv                                    NVIDIA GPU
cudnn    cuDNN graphs, each execution plan separately                 NVIDIA GPU, with the package
                                                                      nvidia-cudnn-frontend
======== ============================================================ =========================
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.convolution.aten import AtenProvider
from ddpm_fast.engine.convolution.cudnn import CudnnProvider
from ddpm_fast.engine.convolution.onednn import OnednnProvider
from ddpm_fast.engine.convolution.triton import TritonProvider
from ddpm_fast.engine.specs import ConvSpec

_log = logging.getLogger("ddpm_fast")

# Error relative to ATen's result on normal random numbers, as a ratio of Euclidean norms: wrong
# kernels are far above, differences of rounding far below.
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 5e-3, torch.float64: 1e-9}


class Variant(Protocol):
    """One implementation of a convolution, with its own copy of the weights.

    Calls may run concurrently. A variant with an attribute `split_k_locks` takes that many int32
    zeros by that keyword, not shared between calls, and leaves them at zero.
    """

    name: str

    @property
    def workspace_bytes(self) -> int:
        """Size of the workspace of a call; RuntimeError if the kernel cannot be built."""
        ...

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        """Write the convolution of x (and x2) to `out`.

        Args:
            out: output; it shares no memory with the other tensors. All tensors are dense and
                channels_last.
            x: first source.
            x2: second source.
            residual: added to the result.
            workspace: uint8, dense, at least `workspace_bytes`, 256-byte aligned; unused, and may
                be None, if that is 0.
        """
        ...


class Provider(Protocol):
    """Source of variants."""

    name: str

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """Return why this convolution is not supported here; None if it is."""
        ...

    def variants(self, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Sequence[Variant]:
        """Return the variants; weight [O, C1 + C2, K, K] and bias [O] as for `candidates`."""
        ...


PROVIDERS: tuple[Provider, ...] = (
    AtenProvider(),
    OnednnProvider(),
    TritonProvider(),
    CudnnProvider(),
)


def adds_residuals(device: torch.device) -> bool:
    """Return True if convolutions fuse the residual: by oneDNN, or by cuDNN graphs."""
    return device.type == "cpu" or importlib.util.find_spec("cudnn") is not None


def candidates(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> list[Variant]:
    """List the variants of a convolution on its device, in a fixed order, plain ATen first.

    Args:
        spec: the convolution.
        weight: [out_channels, in_channels + in_channels2, kernel, kernel], float32 or the spec's
            dtype, on its device.
        bias: [out_channels], or None without a bias.

    Raises:
        ValueError: weight, bias or the options do not fit the spec.
    """
    _check(spec, weight, bias)
    found: list[Variant] = []
    for provider in PROVIDERS:
        if (reason := provider.unavailable_reason(spec)) is None:
            found.extend(provider.variants(spec, weight, bias))
        else:
            _log.debug("%s: not by %s: %s", spec, provider.name, reason)
    return found


def fastest(spec: ConvSpec, weight: Tensor, bias: Tensor | None, tuner: Tuner) -> Variant:
    """Return the variant that the tuner chooses.

    Variants are timed on random numbers unless the choice is recorded. One that cannot be built, or
    whose result differs from ATen's by more than `TOLERANCE`, is left out. Kernels are built when
    they are first needed: with a recorded choice, only the chosen one.

    Args:
        spec: the convolution.
        weight: as for `candidates`.
        bias: as for `candidates`.
        tuner: chooses the variant.
    """
    options = candidates(spec, weight, bias)
    if len(options) == 1:
        return options[0]
    trial = CandidateCheck(spec, options[0])
    name = tuner.fastest(str(spec), {option.name: trial.of(option) for option in options})
    return next(option for option in options if option.name == name)


class CandidateCheck:
    """Comparison of variants with a reference on the same random tensors, created at first use."""

    def __init__(self, spec: ConvSpec, reference: Variant) -> None:
        self.spec = spec
        self.reference = reference
        self.tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self.expected: Tensor | None = None

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.tensors is None:
            spec = self.spec
            generator = torch.Generator(spec.device).manual_seed(0)

            def normal(channels: int, height: int, width: int) -> Tensor:
                shape = (spec.batch, height, width, channels)
                values = torch.randn(
                    shape, dtype=spec.dtype, device=spec.device, generator=generator
                )
                return values.permute(0, 3, 1, 2)

            x = normal(spec.in_channels, spec.height, spec.width)
            x2 = None
            if spec.in_channels2:
                x2 = normal(spec.in_channels2, spec.height, spec.width)
            residual = normal(spec.out_channels, *spec.out_size) if spec.residual else None
            out = torch.empty_like(normal(spec.out_channels, *spec.out_size))
            self.tensors = (out, x, x2, residual)
            with_workspace(self.reference, spec.device)(*self.tensors)
            self.expected = out.clone()
        return self.tensors

    def of(self, variant: Variant) -> Callable[[], None]:
        """Return a call of the variant; its first result is compared with the reference."""
        run, compared = with_workspace(variant, self.spec.device), False

        def call() -> None:
            nonlocal compared
            tensors = self._prepare()
            if compared:
                run(*tensors)
                return
            tensors[0].fill_(float("nan"))
            run(*tensors)
            self._compare(variant, tensors[0])
            compared = True

        return call

    def _compare(self, variant: Variant, out: Tensor) -> None:
        """Raise RuntimeError if a result is wrong; skip a reference that is not finite."""
        assert self.expected is not None
        wide = torch.promote_types(out.dtype, torch.float32)
        size = float(torch.linalg.vector_norm(self.expected, dtype=wide))
        if not math.isfinite(size):
            return
        error = float(torch.linalg.vector_norm(out - self.expected, dtype=wide))
        rounding = torch.finfo(out.dtype).smallest_normal * math.sqrt(out.numel())
        if not error <= TOLERANCE[out.dtype] * size + rounding:
            raise RuntimeError(
                f"{variant.name} is wrong on {self.spec}: its result differs from ATen's by"
                f" {error:.1e}, of {size:.1e} (Euclidean norms)"
            )


def scratch(variant: Variant, device: torch.device) -> Tensor | None:
    """Allocate the workspace of a variant; None if it needs none."""
    size = variant.workspace_bytes
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def with_workspace(variant: Variant, device: torch.device) -> Callable[..., None]:
    """Return the variant as a call of (out, x, x2, residual), as the engine runs it.

    The first call allocates workspace and locks, which all calls share.
    """
    workspace: Tensor | None = None
    split_k_locks: dict[str, Tensor] = {}
    ready = False
    run: Callable[..., None] = variant

    def call(*tensors: Tensor | None) -> None:
        nonlocal workspace, split_k_locks, ready
        if not ready:
            workspace = scratch(variant, device)
            if count := getattr(variant, "split_k_locks", 0):
                split_k_locks = {
                    "split_k_locks": torch.zeros(count, dtype=torch.int32, device=device)
                }
            ready = True
        run(*tensors, workspace, **split_k_locks)

    return call


def _check(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> None:
    shape = (
        spec.out_channels,
        spec.in_channels + spec.in_channels2,
        spec.kernel,
        spec.kernel,
    )
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight must be {list(shape)} for {spec}; got {list(weight.shape)}")
    if (bias is not None) != spec.bias or (
        bias is not None and tuple(bias.shape) != (spec.out_channels,)
    ):
        wanted = f"[{spec.out_channels}]" if spec.bias else "None"
        got = None if bias is None else list(bias.shape)
        raise ValueError(f"bias must be {wanted} for {spec}; got {got}")
    if spec.upsample and (
        spec.kernel != 3 or spec.stride != 1 or spec.in_channels2 or spec.padding != (1, 1, 1, 1)
    ):
        raise ValueError(
            "upsample must be used with a 3x3 convolution of one source, stride 1 and padding 1;"
            f" got {spec}"
        )
