"""Checks of the U-Net's operators against the float64 reference.

These operators sum hundreds of terms in an order that depends on the backend. The bound on their
error is therefore measured: twice the error of PyTorch's operators in the same dtype, plus a few
roundings of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.ops import Backend, reference
from ddpm_fast.ops.reference.network import doubling_weight
from ddpm_fast.utils import checks

NETWORK_LAYOUTS = ("channels_last", "odd", "sliced", "empty")
TIMES_TORCH = 2
ROUNDINGS = 8  # of float32, relative to the rms of the result


class NetworkCheck(NamedTuple):
    """Error of an operator on one layout.

    Attributes:
        op: Name of the check.
        layout: One of NETWORK_LAYOUTS.
        error: Largest absolute error.
        ratio: Root mean square of the error over its bound.
    """

    op: str
    layout: str
    error: float
    ratio: float


class _Case(NamedTuple):
    run: Backend
    device: torch.device
    dtype: torch.dtype
    layout: str

    def image(self, seed: int, channels: int, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Return standard normals [N, channels, H, W], channels-last; sliced in their channels."""
        batch, height, width = shape or self.shape
        extra = 8 if self.layout == "sliced" else 0
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(batch, height, width, channels + extra, generator=generator)
        return values.to(self.device, self.dtype).permute(0, 3, 1, 2)[:, extra // 2 :][:, :channels]

    @property
    def shape(self) -> tuple[int, int, int]:
        odd = (3, 7, 5)
        return {"odd": odd, "empty": (0, 4, 4)}.get(self.layout, (2, 8, 8))

    @property
    def channels(self) -> int:
        return 30 if self.layout == "odd" else 48

    def parameter(self, seed: int, *shape: int) -> Tensor:
        """Return standard normals in the dtype of the case."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)


# The output of the operator, the float64 reference, and the result of PyTorch's operators.
_Results = tuple[Tensor, Tensor, Tensor]


def _group_norm(options: str) -> Callable[[_Case], _Results]:
    """Return the check of group_norm_: "plain", with two "sources", or with "everything" else."""

    def operate(case: _Case) -> _Results:
        channels, groups = case.channels, 6
        batch = case.shape[0]
        x = case.image(0, channels)
        # Groups of 8 or 13 channels; one group has channels of both sources.
        extra = {"sources": 18 if case.layout == "odd" else 30}.get(options, 0)
        x2 = case.image(1, extra) if extra else None
        total = channels + extra
        wide = checks.compute_dtype(case.dtype)
        weight, bias = case.parameter(2, total), case.parameter(3, total)
        vector = modulation = row = residual = None
        if options != "plain":
            vector, row = case.parameter(4, 5, total).to(wide), torch.arange(batch) % 5
            row = row.to(case.device)
        if options == "everything":
            residual = case.image(5, channels)
            modulation = case.parameter(6, 5, 2 * total).to(wide)
        out = case.image(7, total).fill_(float("nan"))
        parameters = (weight, bias, modulation, groups, 1e-5, True)
        case.run.group_norm_(out, x, x2, vector, row, residual, None, *parameters)

        exact = torch.empty(out.shape, dtype=torch.float64)
        arguments: list[Any] = [exact, *map(_exact_input, (x, x2, vector))]
        arguments += [None if row is None else row.cpu(), _exact_input(residual), None]
        arguments += [*map(_exact_input, (weight, bias, modulation)), groups, 1e-5, True]
        reference.group_norm_(*arguments)
        h = x if x2 is None else torch.cat([x, x2], 1)
        if vector is not None:
            h = h + vector.to(h.dtype)[row][:, :, None, None]
        h = h if residual is None else h + residual
        if h.numel():
            h = F.group_norm(h, groups, weight, bias)
        if modulation is not None:
            scale, shift = modulation.to(h.dtype)[row][:, :, None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return out, exact, F.silu(h)

    return operate


def _attention(heads: int) -> Callable[[_Case], _Results]:
    def operate(case: _Case) -> _Results:
        batch = case.shape[0]
        inner = case.channels // heads * heads
        wide = case.image(0, 3 * inner)
        qkv = wide.permute(0, 2, 3, 1).flatten(1, 2)
        out = torch.full_like(qkv[..., :inner], float("nan"))
        scale = (inner // heads) ** -0.5
        case.run.attention_(out, qkv, heads, scale)
        exact = torch.empty(out.shape, dtype=torch.float64)
        reference.attention_(exact, qkv.double().cpu(), heads, scale)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
        by_torch = F.scaled_dot_product_attention(q, k, v, scale=scale) if batch else q
        return out, exact, by_torch.transpose(1, 2).flatten(2)

    return operate


def _conv(kind: str) -> Callable[[_Case], _Results]:
    """Return the check of conv_: "3x3", "halving", "1x1" of two sources, or "doubling"."""

    def operate(case: _Case) -> _Results:
        batch, height, width = case.shape
        stride, padding = 1, [1, 1, 1, 1]
        x, x2, size = case.image(0, 24), None, (batch, height, width)
        kernel, sources = 3, 24
        if kind == "halving":
            stride, padding = 2, [0, 1, 0, 1]
            size = (batch, (height - 2) // 2 + 1, (width - 2) // 2 + 1)
        elif kind == "1x1":
            x2, kernel, sources, padding = case.image(1, 16), 1, 40, [0, 0, 0, 0]
        elif kind == "doubling":
            size = (batch, 2 * height, 2 * width)
        weight = case.parameter(2, 20, sources, kernel, kernel) * (sources * kernel**2) ** -0.5
        weight = weight.to(memory_format=torch.channels_last)
        bias = case.parameter(3, 20)
        residual = None if kind == "doubling" else case.image(4, 20, size)
        out = case.image(5, 20, size).fill_(float("nan"))
        phases = doubling_weight(weight.float()).to(case.dtype) if kind == "doubling" else weight
        case.run.conv_(out, x, x2, phases, bias, residual, stride, padding)

        exact = torch.empty(size[0], 20, *size[1:], dtype=torch.float64)
        arguments: list[Any] = [exact, *map(_exact_input, (x, x2, phases, bias, residual))]
        arguments += [stride, padding]
        reference.conv_(*arguments)
        h = x if x2 is None else torch.cat([x, x2], 1)
        h = F.interpolate(h, scale_factor=2) if kind == "doubling" and batch else h
        if not batch:
            return out, exact, out
        by_torch = F.conv2d(F.pad(h, padding), weight, bias, stride)
        return out, exact, by_torch if residual is None else by_torch + residual

    return operate


_OPERATORS: dict[str, Callable[[_Case], _Results]] = {
    "group_norm": _group_norm("plain"),
    "group_norm of two sources": _group_norm("sources"),
    "group_norm with every term": _group_norm("everything"),
    "attention, one head": _attention(1),
    "attention, three heads": _attention(3),
    "conv 3x3": _conv("3x3"),
    "conv 3x3 halving": _conv("halving"),
    "conv 1x1 of two sources": _conv("1x1"),
    "conv 3x3 after doubling": _conv("doubling"),
}


def network_checks(
    run: Backend, device: torch.device, dtype: torch.dtype
) -> Iterator[NetworkCheck]:
    """Check every operator of the U-Net on every layout.

    Args:
        run: The backend.
        device: Device of the tensors.
        dtype: Dtype of the tensors.

    Returns:
        An iterator over the checks.
    """
    for op, operate in _OPERATORS.items():
        for layout in NETWORK_LAYOUTS:
            # The convolutions do not accept slices of channels.
            if layout == "sliced" and op.startswith("conv"):
                continue
            out, exact, by_torch = operate(_Case(run, device, dtype, layout))
            if out.numel() == 0:
                yield NetworkCheck(op, layout, 0.0, 0.0)
                continue
            miss = (out.double().cpu() - exact).abs()
            torch_miss = (by_torch.double().cpu() - exact).abs()
            arithmetic = checks.compute_dtype(dtype)
            floor = ROUNDINGS * torch.finfo(arithmetic).eps * _rms(exact)
            ratio = _rms(miss) / (TIMES_TORCH * _rms(torch_miss) + floor)
            yield NetworkCheck(op, layout, _finite(miss.max()), _finite(ratio))


def _exact_input(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double().cpu()


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _finite(value: Tensor) -> float:
    """Return the value, or infinity for NaN: a NaN is a miss."""
    return float(value.nan_to_num(nan=float("inf")))
