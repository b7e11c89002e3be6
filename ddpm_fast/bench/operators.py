"""Implementations of one operation of a network's plan, to be timed and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.bench.cases import Case, Prepared
from ddpm_fast.engine.convolution.candidates import Variant, candidates, with_workspace
from ddpm_fast.engine.plan.operations import Convolution, Normalization, SelfAttention
from ddpm_fast.engine.specs import AttentionSpec, ConvSpec, NormSpec
from ddpm_fast.ops import get_backend, reference, unavailable_reason
from ddpm_fast.ops.aten import SDPA, sdpa
from ddpm_fast.utils import checks

_ROWS = 1000  # of the embedding tables
_LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}

Call = Callable[[], Tensor]
Measured = Convolution | Normalization | SelfAttention


@dataclass(frozen=True)
class OperatorCases:
    """The implementations of one operation on the same random tensors.

    Attributes:
        kind: group_norm, conv 3x3, conv 1x1 or attention.
        cases: the implementations; `prepare().run()` returns the result [N, ...].
        expected: result of the first sample in float64.
        arithmetic: floating-point operations, including those outside matrix products.
    """

    kind: str
    cases: list[Case]
    expected: Tensor
    arithmetic: int


def operator_cases(operation: Measured) -> OperatorCases:
    """Create the implementations of an operation on its device; some may raise when they run."""
    if isinstance(operation, Normalization):
        return _normalization(operation)
    if isinstance(operation, SelfAttention):
        return _attention(operation.spec)
    return _convolution(operation)


def norm_arithmetic(spec: NormSpec) -> int:
    """Count the floating-point operations of a normalisation.

    For each element: 4 for mean and variance (x - m, its square, two sums), 4 for the result
    (x - m, times 1 / s, times w, plus b), 4 for SiLU, 1 for each added term, 2 for the modulation.
    """
    each = 8 + 4 * spec.silu + spec.vector + spec.residual + 2 * spec.modulation
    channels = spec.in_channels + spec.in_channels2
    return each * spec.batch * channels * spec.height * spec.width


def _case(name: str, spec: Any, run: Call, baseline: bool = False) -> Case:
    return Case(name, lambda: Prepared(run), spec.dtype, baseline=baseline)


def _backends(device: torch.device) -> list[str]:
    """List the available backends with compiled kernels."""
    names = ["cpu"] if device.type == "cpu" else ["cuda", "triton"]
    return [name for name in names if unavailable_reason(name, device) is None]


def _normal(spec: Any, channels: int, seed: int, size: tuple[int, int] | None = None) -> Tensor:
    """Return normal random numbers [batch, channels, height, width], channels_last."""
    generator = torch.Generator(spec.device).manual_seed(seed)
    height, width = size or (spec.height, spec.width)
    shape = (spec.batch, height, width, channels)
    values = torch.randn(shape, dtype=spec.dtype, device=spec.device, generator=generator)
    return values.permute(0, 3, 1, 2)


def _first(tensor: Any) -> Any:
    """Return the first sample in float64; None for None."""
    return None if tensor is None else tensor[:1].double()


def _double(tensor: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Round to `dtype` and return float64; None for None."""
    return None if tensor is None else tensor.to(dtype).double()


def _laid_out(tensor: Any, layout: torch.memory_format) -> Any:
    """Return a tensor in a memory layout; None for None."""
    return None if tensor is None else tensor.contiguous(memory_format=layout)


def _normalization(operation: Normalization) -> OperatorCases:
    spec = operation.spec
    channels = spec.in_channels + spec.in_channels2
    wide = checks.compute_dtype(spec.dtype)
    x = _normal(spec, spec.in_channels, 0)
    x2 = _normal(spec, spec.in_channels2, 1) if spec.in_channels2 else None
    residual = _normal(spec, spec.in_channels, 2) if spec.residual else None
    vector = modulation = row = None
    if spec.vector:
        vector = torch.randn(_ROWS, channels, dtype=wide, device=spec.device)
    if spec.modulation:
        modulation = torch.randn(_ROWS, 2 * channels, dtype=wide, device=spec.device)
    if spec.vector or spec.modulation:
        row = torch.full((spec.batch,), _ROWS // 2, device=spec.device)
    weight, bias = operation.weight.to(wide), operation.bias.to(wide)
    out = _normal(spec, channels, 3)
    total = torch.empty_like(x) if spec.total else None
    tables = (vector, row)

    def fused(backend: str) -> Call:
        operator = get_backend(backend, spec.device, spec.dtype).group_norm_
        options = (weight, bias, modulation, spec.groups, spec.eps, spec.silu)

        def run() -> Tensor:
            operator(out, x, x2, *tables, residual, total, *options)
            return out

        return run

    def plain(layout: torch.memory_format) -> Call:
        source, second, added = (_laid_out(t, layout) for t in (x, x2, residual))
        affine = (weight.to(spec.dtype), bias.to(spec.dtype))
        picked = [
            None if t is None else t[row][:, :, None, None].to(spec.dtype)
            for t in (vector, modulation)
        ]
        return lambda: _norm_expression(spec, source, second, picked[0], added, *affine, picked[1])

    exact = torch.empty(out[:1].shape, dtype=torch.float64, device=spec.device)
    reference.group_norm_(
        exact,
        _first(x),
        _first(x2),
        _double(vector),
        None if row is None else row[:1],
        _first(residual),
        None if total is None else torch.empty_like(exact),
        weight.double(),
        bias.double(),
        _double(modulation),
        spec.groups,
        spec.eps,
        spec.silu,
    )
    found = [_case(name, spec, fused(name)) for name in _backends(spec.device)]
    found += [_case(f"torch, {n}", spec, plain(f), True) for n, f in _LAYOUTS.items()]
    return OperatorCases("group_norm", found, exact, norm_arithmetic(spec))


def _norm_expression(
    spec: NormSpec,
    x: Tensor,
    x2: Tensor | None,
    vector: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
) -> Tensor:
    """Compute `group_norm_` as a network in plain PyTorch does."""
    h = x if x2 is None else torch.cat((x, x2), 1)
    if vector is not None:
        h = h + vector
    if residual is not None:
        h = h + residual
    h = F.group_norm(h, spec.groups, weight, bias, spec.eps)
    if modulation is not None:
        scale, shift = modulation.chunk(2, 1)
        h = h * (1 + scale) + shift
    return F.silu(h) if spec.silu else h


def _convolution(operation: Convolution) -> OperatorCases:
    spec, weight, bias = operation.spec, operation.weight, operation.bias
    x = _normal(spec, spec.in_channels, 0)
    x2 = _normal(spec, spec.in_channels2, 1) if spec.in_channels2 else None
    residual = _normal(spec, spec.out_channels, 2, spec.out_size) if spec.residual else None
    out = _normal(spec, spec.out_channels, 3, spec.out_size)

    def fused(variant: Variant) -> Call:
        call = with_workspace(variant, spec.device)

        def run() -> Tensor:
            call(out, x, x2, residual)
            return out

        return run

    def plain(layout: torch.memory_format) -> Call:
        source, second, added = (_laid_out(t, layout) for t in (x, x2, residual))
        kernel = _laid_out(weight.to(spec.dtype), layout)
        shift = None if bias is None else bias.to(spec.dtype)
        return lambda: _conv_expression(spec, source, second, kernel, shift, added)

    affine = (_double(weight, spec.dtype), _double(bias, spec.dtype))
    expected = _conv_expression(spec, _first(x), _first(x2), *affine, _first(residual))
    found = [_case(v.name, spec, fused(v)) for v in candidates(spec, weight, bias)]
    found += [_case(f"torch, {n}", spec, plain(f), True) for n, f in _LAYOUTS.items()]
    return OperatorCases(f"conv {spec.kernel}x{spec.kernel}", found, expected, spec.flops)


def _conv_expression(
    spec: ConvSpec,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Compute `conv_` as a network in plain PyTorch does."""
    h = x if x2 is None else torch.cat((x, x2), 1)
    if spec.upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    left, right, top, bottom = spec.padding
    if left != right or top != bottom:
        h, left, top = F.pad(h, spec.padding), 0, 0
    h = F.conv2d(h, weight, bias, spec.stride, (top, left))
    return h if residual is None else h + residual


def _attention(spec: AttentionSpec) -> OperatorCases:
    width = spec.heads * spec.head_dim
    shape = (spec.batch, spec.tokens, 3 * width)
    qkv = torch.randn(shape, dtype=spec.dtype, device=spec.device)
    out = qkv.new_empty(spec.batch, spec.tokens, width)
    scale = spec.head_dim**-0.5

    def call(operator: Callable[[Tensor, Tensor, int, float], None]) -> Call:
        def run() -> Tensor:
            operator(out, qkv, spec.heads, scale)
            return out

        return run

    exact = torch.empty(out[:1].shape, dtype=torch.float64, device=spec.device)
    reference.attention_(exact, qkv[:1].double(), spec.heads, scale)
    found = [
        _case(name, spec, call(get_backend(name, spec.device, spec.dtype).attention_))
        for name in _backends(spec.device)
    ]
    found += [_case(f"sdpa.{name}", spec, call(sdpa(name)), True) for name in SDPA]
    return OperatorCases("attention", found, exact, spec.flops)
