"""Operators of the U-Net that are useful by themselves: GroupNorm with its neighbours, attention.

Each is one kernel in the backends cpu, triton and cuda (attention: torch's kernel in cpu and cuda),
and PyTorch code in the backend reference. They are for inference and have no gradient. Arithmetic
is in float32 (float64 for float64 inputs) for every dtype of the tensors.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ddpm_fast.ops import get_backend
from ddpm_fast.utils import checks, in_place


@overload
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    silu: bool = ...,
    x2: Tensor | None = ...,
    vector: Tensor | None = ...,
    row: Tensor | int | None = ...,
    residual: Tensor | None = ...,
    return_sum: Literal[False] = ...,
    modulation: Tensor | None = ...,
    out: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    silu: bool = ...,
    x2: Tensor | None = ...,
    vector: Tensor | None = ...,
    row: Tensor | int | None = ...,
    residual: Tensor | None = ...,
    return_sum: Literal[True],
    modulation: Tensor | None = ...,
    out: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    x2: Tensor | None = None,
    vector: Tensor | None = None,
    row: Tensor | int | None = None,
    residual: Tensor | None = None,
    return_sum: bool = False,
    modulation: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply GroupNorm (Wu and He 2018) to a sum, with what surrounds it in a U-Net, in one pass.

        h   = cat(x, x2) + vector[row] + residual
        y   = (h - mean) / sqrt(variance + eps) * weight + bias      (over each group of channels)
        y   = y * (1 + scale) + shift,  (scale, shift) = modulation[row]
        out = y / (1 + exp(-y)) if silu, else y

    Terms that are not passed are left out. The variance is the biased one; h is not rounded. NaN
    and infinities propagate as in torch's group_norm.

    Args:
        x: [N, C1, H, W], float32, float16 or bfloat16 (float64 in reference and cpu), of any
            strides; channels-last is fastest.
        groups: Number of groups; divides C = C1 + C2.
        weight: [C], of x's dtype or float32. None: 1.
        bias: [C], of the dtype of weight. None: 0.
        eps: At least 0.
        silu: Apply SiLU at the end.
        x2: [N, C2, H, W], concatenated behind x.
        vector: Table [R, C] in float32 (float64 for float64 x), added by channel.
        row: Row of vector and modulation, an int or integers [N] in [0, R). None: row 0. On a GPU,
            where the values are not checked, a row out of range makes its sample NaN.
        residual: Shape of x; not together with x2.
        return_sum: Return h as well; not together with x2.
        modulation: Table [R, 2 C] of C scales and C shifts, in the dtype of vector.
        out: [N, C, H, W], written and returned. None: a new channels-last tensor.
        backend: Name of a backend, or "auto".

    Returns:
        out, or (out, h) with h rounded to the dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or requires grad while
            gradients are recorded.
        RuntimeError: the backend cannot run.
    """
    x = checks.images("x", x)
    if x2 is not None:
        x2 = _second_source("x2", x2, x)
        if residual is not None or return_sum:
            name = "residual" if residual is not None else "return_sum"
            raise ValueError(f"{name} must not be passed together with x2; got both")
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    groups = checks.integer("groups", groups, 1, 1 << 31)
    if channels == 0 or channels % groups:
        raise ValueError(f"groups must divide the number of channels, {channels}; got {groups}")
    eps = checks.real("eps", eps, 0, math.inf, "[)")
    if residual is not None:
        residual = checks.like("residual", residual, "x", x, (x.dtype,))
    weight, bias = _affine(weight, bias, channels, x)
    vector = _table("vector", vector, channels, x)
    modulation = _table("modulation", modulation, 2 * channels, x)
    chosen = _row(row, vector, modulation, x)
    shape = (x.shape[0], channels, *x.shape[2:])
    _no_gradient("group_norm", x=x, x2=x2, weight=weight, bias=bias, vector=vector)
    _no_gradient("group_norm", residual=residual, modulation=modulation)
    if out is None:
        out = _channels_last(shape, x)
    else:
        out = _output(out, shape, x)
        x, weight, bias = (
            _without_overlap(x, out),
            _without_overlap(weight, out),
            _without_overlap(bias, out),
        )
        x2, residual = _without_overlap(x2, out), _without_overlap(residual, out)
        vector, modulation = _without_overlap(vector, out), _without_overlap(modulation, out)
    total = _channels_last(shape, x) if return_sum else None
    run = get_backend(backend, x.device, x.dtype)
    run.group_norm_(
        out,
        x,
        x2,
        vector,
        chosen,
        residual,
        total,
        weight,
        bias,
        modulation,
        groups,
        eps,
        bool(silu),
    )
    in_place.mark_written(out)
    return out if total is None else (out, total)


def attention(
    qkv: Tensor,
    heads: int,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply self-attention (Vaswani et al. 2017): softmax(scale q k^T) v in each head.

    Args:
        qkv: [N, T, 3 * heads * D], float32, float16 or bfloat16 (float64 in reference and cpu):
            the queries of all heads, then the keys, then the values.
        heads: Number of heads.
        scale: Factor of the scores. None: 1 / sqrt(D).
        out: [N, T, heads * D], dense in its last dimension, written and returned. None: a new
            tensor.
        backend: Name of a backend, or "auto".

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or requires grad while
            gradients are recorded.
        RuntimeError: the backend cannot run.
    """
    qkv = checks.batch("qkv", qkv)
    heads = checks.integer("heads", heads, 1, 1 << 31)
    if qkv.ndim != 3 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"qkv must be [N, T, 3 * heads * D] with {heads} heads; got {checks.shape_text(qkv)}"
        )
    width = qkv.shape[2] // 3
    scale = 1 / math.sqrt(width // heads) if scale is None else checks.real("scale", scale)
    _no_gradient("attention", qkv=qkv)
    shape = (*qkv.shape[:2], width)
    if out is None:
        out = qkv.new_empty(shape)
    else:
        out = _output(out, shape, qkv, "qkv")
        if out.stride(2) != 1:
            raise ValueError(f"out must be dense in its last dimension; got strides {out.stride()}")
        qkv = _without_overlap(qkv, out)
    run = get_backend(backend, qkv.device, qkv.dtype)
    if out.numel() > 0:
        run.attention_(out, qkv if qkv.stride(2) == 1 else qkv.contiguous(), heads, scale)
        in_place.mark_written(out)
    return out


def _second_source(name: str, value: Any, x: Tensor) -> Tensor:
    """Return `value` if it can be concatenated with x along the channels."""
    n, _, height, width = x.shape
    value = checks.batch(name, value, (x.dtype,), (n, "C2", height, width))
    return checks.same_device(name, value, "x", x)


def _affine(
    weight: Tensor | None, bias: Tensor | None, channels: int, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return weight and bias, [C] of one dtype; 1 and 0 for None."""
    wide = checks.compute_dtype(x.dtype)
    passed = {"weight": weight, "bias": bias}
    checked = {}
    for name, value in passed.items():
        if value is None:
            continue
        checks.batch(name, value, tuple(dict.fromkeys((x.dtype, wide))), (channels,))
        checked[name] = checks.same_device(name, value, "x", x).contiguous()
    dtype = next((value.dtype for value in checked.values()), x.dtype)
    ones, zeros = (
        checked[name] if name in checked else x.new_full((channels,), fill, dtype=dtype)
        for name, fill in (("weight", 1.0), ("bias", 0.0))
    )
    if zeros.dtype != ones.dtype:
        raise TypeError(
            f"bias must have the dtype of weight, {checks.dtype_name(ones.dtype)};"
            f" got {checks.dtype_name(zeros.dtype)}"
        )
    return ones, zeros


def _table(name: str, value: Any, columns: int, x: Tensor) -> Tensor | None:
    """Return `value` as a table [R, columns] in the dtype of the arithmetic, with dense rows."""
    if value is None:
        return None
    wide = checks.compute_dtype(x.dtype)
    value = checks.batch(name, value, (wide,))
    if value.ndim != 2 or value.shape[1] != columns or value.shape[0] == 0:
        raise ValueError(
            f"{name} must be [R, {columns}] with at least one row; got {checks.shape_text(value)}"
        )
    value = checks.same_device(name, value, "x", x)
    return value if value.stride(1) == 1 else value.contiguous()


def _row(row: Any, vector: Tensor | None, modulation: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the row of each sample, int64 [N]; None if all use row 0."""
    table = vector if vector is not None else modulation
    if vector is not None and modulation is not None and len(vector) != len(modulation):
        raise ValueError(
            f"modulation must have as many rows as vector, {len(vector)}; got {len(modulation)}"
        )
    if row is None:
        return None
    if table is None:
        raise ValueError("row must be None without vector and modulation; got a row")
    return checks.index("row", row, x, len(table)).contiguous()


def _no_gradient(function: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise ValueError(
                f"{name} requires grad, and {function} has no gradient; call it under"
                f" torch.no_grad() or pass {name}.detach()"
            )


def _channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _output(out: Any, shape: tuple[int, ...], x: Tensor, of: str = "x") -> Tensor:
    """Return `out` if it has a shape and can be written."""
    out = in_place.writable("out", checks.batch("out", out, (x.dtype,), shape))
    return checks.same_device("out", out, of, x)


@overload
def _without_overlap(value: Tensor, out: Tensor) -> Tensor: ...


@overload
def _without_overlap(value: None, out: Tensor) -> None: ...


def _without_overlap(value: Tensor | None, out: Tensor) -> Tensor | None:
    """Return `value`, or a copy if it shares memory with `out`."""
    if value is None or torch.compiler.is_compiling() or value.numel() == 0:
        return value
    if value.device.type != "meta" and value.data_ptr() == out.data_ptr():
        return value.clone()
    return in_place.without_overlap(value, out)
