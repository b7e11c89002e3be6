"""Triton backend of `group_norm_`.

A program processes a slab of channels of one sample, which consists of whole groups. Sums are taken
over each channel, and then over the channels of a group by a membership matrix: a group may have
any size and channels of both sources.

A map whose slab fits into registers is read once, by one kernel. For a larger map, a first kernel
writes mean and squared deviation of each group over shares of the pixels. A second kernel combines
them (Chan et al. 1979) and reads the map again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.triton.group_norm_plan import plan_of
from ddpm_fast.ops.triton.launch import Map, after_previous, is_linear, launch, map_of, wide


class Table(NamedTuple):
    """Table float32 [rows, ...] with the stride of its rows."""

    data: Any
    stride: int
    rows: int


class Terms(NamedTuple):
    """Inputs of h = cat(x, x2) + vector[row] + residual, and their sizes."""

    x: Map
    x2: Map | None
    residual: Map | None
    vector: Table | None
    row: Any
    row_stride: int
    channels: int
    first_channels: int
    pixels: int
    width: int


class Affine(NamedTuple):
    """Operations after the normalization."""

    weight: Any
    bias: Any
    modulation: Table | None
    eps: float
    silu: int | None  # None: no SiLU


class Tile(NamedTuple):
    """Pixels and channels of a sample that a program processes, with their masks."""

    sample: tl.tensor
    pixel: tl.tensor
    channel: tl.tensor
    known: tl.tensor
    mask: tl.tensor


@triton.jit
def _tile(
    sample: tl.tensor,
    slab: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    terms: Terms,
    SLAB: tl.constexpr,
) -> Tile:
    """Return the pixels from `first` to `end` of a slab of channels."""
    local = tl.arange(0, SLAB.channels)
    channel = slab * SLAB.valid + local
    known = (local < SLAB.valid) & (channel < terms.channels)
    pixel = first + tl.arange(0, SLAB.pixels)
    if SLAB.wide:
        pixel, channel = pixel.to(tl.int64), channel.to(tl.int64)
    mask = (pixel < end)[:, None] & known[None, :]
    return Tile(sample.to(tl.int64), pixel, channel, known, mask)


@triton.jit
def _pointers(
    view: Map, tile: Tile, channel: tl.tensor, width: tl.tensor, SLAB: tl.constexpr
) -> tl.tensor:
    if SLAB.linear:
        pixel = tile.pixel * view.pixel
    else:
        pixel = tile.pixel // width * view.row + tile.pixel % width * view.pixel
    start = view.data + tile.sample * view.sample
    return start + pixel[:, None] + (channel * view.channel)[None, :]


@triton.jit
def _load(
    view: Map,
    tile: Tile,
    channel: tl.tensor,
    mask: tl.tensor,
    terms: Terms,
    SLAB: tl.constexpr,
) -> tl.tensor:
    pointers = _pointers(view, tile, channel, terms.width, SLAB)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(view: Map, tile: Tile, value: tl.tensor, terms: Terms, SLAB: tl.constexpr) -> None:
    pointers = _pointers(view, tile, tile.channel, terms.width, SLAB)
    tl.store(pointers, value.to(view.data.type.element_ty), mask=tile.mask)


@triton.jit
def _from_row(table: Table, terms: Terms, tile: Tile, first: tl.tensor) -> tl.tensor:
    """Load table[row[sample], first + channel]; NaN for a row outside the table."""
    pointers = table.data + first + tile.channel
    inside = tile.known
    if terms.row is not None:
        index = tl.load(terms.row + tile.sample * terms.row_stride)
        inside = inside & (index >= 0) & (index < table.rows)
        pointers += index * table.stride
    return tl.load(pointers, mask=inside, other=float("nan"))


@triton.jit
def _sum(terms: Terms, tile: Tile, SLAB: tl.constexpr) -> tl.tensor:
    """Return h of a tile in float32; values outside the mask are arbitrary."""
    if terms.x2 is None:
        h = _load(terms.x, tile, tile.channel, tile.mask, terms, SLAB)
    else:
        second_channel = tile.channel - terms.first_channels
        h = _load(
            terms.x, tile, tile.channel, tile.mask & (second_channel < 0)[None, :], terms, SLAB
        )
        h += _load(
            terms.x2, tile, second_channel, tile.mask & (second_channel >= 0)[None, :], terms, SLAB
        )
    if terms.vector is not None:
        h += _from_row(terms.vector, terms, tile, 0)[None, :]
    if terms.residual is not None:
        h += _load(terms.residual, tile, tile.channel, tile.mask, terms, SLAB)
    return h


@triton.jit
def _store_total(
    total: Map | None, tile: Tile, h: tl.tensor, terms: Terms, SLAB: tl.constexpr
) -> None:
    if total is not None:
        tl.debug_barrier()  # total may be a tensor that other threads still read
        _store(total, tile, h, terms, SLAB)


@triton.jit
def _member(tile: Tile, SLAB: tl.constexpr) -> tl.tensor:
    """Return the membership matrix [channels, groups] of the slab."""
    group = tl.arange(0, SLAB.channels) // SLAB.group_size
    return (group[:, None] == tl.arange(0, SLAB.groups)[None, :]) & tile.known[:, None]


@triton.jit
def _gathered(values: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Sum [channels] over groups; a NaN stays in its group."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _spread(values: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Broadcast [groups] to [channels]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _finish(
    out: Map,
    terms: Terms,
    affine: Affine,
    tile: Tile,
    centred: tl.tensor,
    variance: tl.tensor,
    SLAB: tl.constexpr,
) -> None:
    scale = tl.load(affine.weight + tile.channel, mask=tile.known, other=0.0).to(tl.float32)
    shift = tl.load(affine.bias + tile.channel, mask=tile.known, other=0.0).to(tl.float32)
    scale = scale / tl.sqrt(variance + affine.eps)
    y = centred * scale[None, :] + shift[None, :]
    if affine.modulation is not None:
        more = _from_row(affine.modulation, terms, tile, 0)
        shift = _from_row(affine.modulation, terms, tile, terms.channels)
        y = y * (1.0 + more)[None, :] + shift[None, :]
    if affine.silu is not None:
        y = y / (1.0 + tl.exp(-y))
    _store(out, tile, y, terms, SLAB)


@triton.jit(do_not_specialize=["slabs"])
def _held_kernel(
    out: Map,
    total: Map | None,
    terms: Terms,
    affine: Affine,
    slabs: tl.tensor,
    SLAB: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    tile = _tile(program // slabs, program % slabs, 0, terms.pixels, terms, SLAB)
    after_previous(OVERLAP)
    h = _sum(terms, tile, SLAB)
    _store_total(total, tile, h, terms, SLAB)
    member = _member(tile, SLAB)
    count = 1.0 * terms.pixels * SLAB.group_size
    mean = _gathered(tl.sum(tl.where(tile.mask, h, 0.0), 0), member) / count
    centred = tl.where(tile.mask, h - _spread(mean, member)[None, :], 0.0)
    # The rounding error of the mean, which matters if the mean is far from 0.
    correction = _gathered(tl.sum(centred, 0), member) / count
    variance = _gathered(tl.sum(centred * centred, 0), member) / count - correction * correction
    centred -= _spread(correction, member)[None, :]
    _finish(out, terms, affine, tile, centred, _spread(variance, member), SLAB)


@triton.jit(do_not_specialize=["slabs", "shares", "share"])
def _share_kernel(
    partial: tl.tensor,
    terms: Terms,
    slabs: tl.tensor,
    shares: tl.tensor,
    share: tl.tensor,
    SLAB: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Write mean and squared deviation over a share of pixels to partial.

    partial: [N, slabs, shares, 2, groups]. Deviations are taken from the mean of the first tile, so
    that they are of the size of the data.
    """
    program = tl.program_id(0)
    slab = program // shares % slabs
    sample = program // shares // slabs
    begin = program % shares * share
    end = tl.minimum(begin + share, terms.pixels)
    after_previous(OVERLAP)

    tile = _tile(sample, slab, begin, end, terms, SLAB)
    h = _sum(terms, tile, SLAB)
    start = tl.sum(tl.where(tile.mask, h, 0.0), 0) / tl.minimum(end - begin, SLAB.pixels)
    sums = tl.where(tile.mask, h - start[None, :], 0.0)
    squares = sums * sums
    for first in range(begin + SLAB.pixels, end, SLAB.pixels):
        tile = _tile(sample, slab, first, end, terms, SLAB)
        deviation = tl.where(tile.mask, _sum(terms, tile, SLAB) - start[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    pixels = end - begin
    total = tl.sum(sums, 0)
    of_channel = total / pixels
    deviations = tl.sum(squares, 0) - total * of_channel
    of_channel += start

    member = _member(tile, SLAB)
    mean = _gathered(of_channel, member) / SLAB.group_size
    between = tl.where(tile.known, of_channel - _spread(mean, member), 0.0)
    deviations = _gathered(deviations + between * between * pixels, member)
    group = tl.arange(0, SLAB.groups)
    tl.store(partial + program.to(tl.int64) * 2 * SLAB.groups + group, mean)
    tl.store(partial + (program.to(tl.int64) * 2 + 1) * SLAB.groups + group, deviations)


@triton.jit(do_not_specialize=["slabs", "shares", "share"])
def _apply_kernel(
    out: Map,
    total: Map | None,
    partial: tl.tensor,
    terms: Terms,
    affine: Affine,
    slabs: tl.tensor,
    shares: tl.tensor,
    share: tl.tensor,
    SLAB: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    slab = program // shares % slabs
    sample = program // shares // slabs
    begin = program % shares * share
    end = tl.minimum(begin + share, terms.pixels)
    after_previous(OVERLAP)

    index = tl.arange(0, SHARES)
    there = (index < shares)[:, None]
    weight = tl.where(index < shares, tl.minimum(terms.pixels - index * share, share), 0)
    weight = weight.to(tl.float32)[:, None] * SLAB.group_size
    means = partial + (program // shares).to(tl.int64) * shares * 2 * SLAB.groups
    means += index[:, None] * 2 * SLAB.groups + tl.arange(0, SLAB.groups)[None, :]
    of_share = tl.load(means, mask=there, other=0.0)
    deviations = tl.load(means + SLAB.groups, mask=there, other=0.0)
    count = 1.0 * terms.pixels * SLAB.group_size
    mean = tl.sum(of_share * weight, 0) / count
    between = tl.where(there, of_share - mean[None, :], 0.0)
    correction = tl.sum(between * weight, 0) / count
    variance = tl.sum(deviations + between * between * weight, 0) / count - correction * correction

    member = _member(_tile(sample, slab, begin, end, terms, SLAB), SLAB)
    mean, correction = _spread(mean, member)[None, :], _spread(correction, member)[None, :]
    variance = _spread(variance, member)
    for first in range(begin, end, SLAB.pixels):
        tile = _tile(sample, slab, first, end, terms, SLAB)
        h = _sum(terms, tile, SLAB)
        _store_total(total, tile, h, terms, SLAB)
        _finish(out, terms, affine, tile, h - mean - correction, variance, SLAB)


def _table(table: Tensor | None) -> Table | None:
    if table is not None and table.shape[0] == 0:
        raise ValueError("vector and modulation must have at least one row; got none")
    return None if table is None else Table(table, table.stride(0), table.shape[0])


def group_norm_(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    vector: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    """Apply GroupNorm to a sum; `reference.group_norm_` has the equation and the arguments.

    out, x, x2, residual and total have one dtype (float32, float16 or bfloat16) and any strides;
    channels-last is fastest. weight and bias are contiguous. vector and modulation are float32 with
    stride(1) == 1. total may be x or residual. Statistics are float32.
    """
    if out.numel() == 0:
        return
    samples, channels, height, width = out.shape
    tensors = (out, total, x, x2, residual)
    maps = [None if tensor is None else map_of(tensor) for tensor in tensors]
    linear = all(is_linear(view) for view in maps if view is not None)
    sizes = (samples, channels, height * width, groups, x.element_size())
    plan = plan_of(*sizes, linear, wide(*tensors, first=1))
    row_stride = 0 if row is None else row.stride(0)
    of_row = (_table(vector), row, row_stride, channels, x.shape[1], height * width, width)
    terms = Terms(*maps[2:], *of_row)  # type: ignore[arg-type,call-arg]
    affine = Affine(weight, bias, _table(modulation), float(eps), 1 if silu else None)
    warps = {"num_warps": plan.num_warps}
    if plan.shares == 0:
        grid = (samples * plan.slabs,)
        launch(_held_kernel, grid, out, *maps[:2], terms, affine, plan.slabs, plan.slab, **warps)
        return
    size = (samples, plan.slabs, plan.shares, 2, plan.slab.groups)
    partial = out.new_empty(size, dtype=torch.float32)
    counts = (plan.slabs, plan.shares, plan.share, plan.slab)
    grid = (samples * plan.slabs * plan.shares,)
    launch(_share_kernel, grid, out, partial, terms, *counts, **warps)
    padded = triton.next_power_of_2(plan.shares)
    launch(_apply_kernel, grid, out, *maps[:2], partial, terms, affine, *counts, padded, **warps)
