"""Triton backend of `conv_`: an implicit GEMM, whose rows are gathered.

A row is an output pixel, a column an output channel. The sum runs over blocks of input channels
and, within each, over the taps: first of one source, then of the other. A weight of four phases is
four products over the same input, each writing every other pixel of the output, in one launch.

If there are few tiles, the sum is split among programs (split-K). Each writes its part to a
workspace and increments the lock of the tile. The last one adds the parts in the order of the sum,
so that the bits do not depend on the order of the programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.triton.launch import Map, after_previous, launch, map_of, wide

MULTIPROCESSORS = 132  # of an H100, for which launches are planned on every device
_LEAST = 16  # smallest rows, columns and depth of a product on tensor cores
_GROUP = 8  # tiles of rows that share weights in the L2 cache


class Config(NamedTuple):
    """Configuration of the kernel. The sizes of a tile are powers of two, at least 16."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    split: int = 1


class Spec(NamedTuple):
    """Sizes by which a configuration is selected."""

    pixels: int  # of the output, of one phase: N * H * W
    outputs: int
    channels: int  # of the first source
    channels2: int  # of the second
    taps: int
    phases: int
    itemsize: int


class Weight(NamedTuple):
    """Weight [phases, O, C, K, K] with its strides."""

    data: Any
    phase: int
    output: int
    channel: int
    row: int
    column: int


class Problem(NamedTuple):
    """Sizes of the input and of one phase of the output, and its first row and column."""

    channels: int
    channels2: int
    height: int
    width: int
    outputs: int
    pixels: int
    out_height: int
    out_width: int
    left: int
    top: int
    row_tiles: int
    column_tiles: int


class Kind(NamedTuple):
    """Compile-time properties of a convolution besides its configuration."""

    kernel: int  # taps in a row
    stride: int
    doubling: bool
    whole: bool  # the channels of both sources are multiples of the depth
    wide: bool


class Rows(NamedTuple):
    """Output pixels of a tile; y and x are the position of their first tap on the input."""

    sample: tl.tensor
    out_y: tl.tensor
    out_x: tl.tensor
    y: tl.tensor
    x: tl.tensor
    mask: tl.tensor


@triton.jit
def _accumulate(
    total: tl.tensor,
    source: Map,
    channels: tl.tensor,
    weights: tl.tensor,
    weight: Weight,
    begin: tl.tensor,
    end: tl.tensor,
    rows: Rows,
    column_mask: tl.tensor,
    of: Problem,
    KIND: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """Add steps `begin` to `end` of the sum over one source; weights: of its tap 0."""
    start = rows.sample * source.sample + rows.y * source.row + rows.x * source.pixel
    for step in range(begin, end):
        tap = step % (KIND.kernel * KIND.kernel)
        tap_y, tap_x = tap // KIND.kernel, tap % KIND.kernel
        depth = step // (KIND.kernel * KIND.kernel) * CONFIG.depth + tl.arange(0, CONFIG.depth)
        y, x = rows.y + tap_y, rows.x + tap_x
        mask = (rows.mask & (y >= 0) & (y < of.height) & (x >= 0) & (x < of.width))[:, None]
        at = start + tap_y * source.row + tap_x * source.pixel
        at = at[:, None] + (depth * source.channel)[None, :]
        weight_at = weights + tap_y * weight.row + tap_x * weight.column
        weight_at = weight_at + (depth * weight.channel)[:, None]
        weight_mask = column_mask[None, :]
        if not KIND.whole:
            mask = mask & (depth < channels)[None, :]
            weight_mask = weight_mask & (depth < channels)[:, None]
        inputs = tl.load(source.data + at, mask=mask, other=0.0)
        factors = tl.load(weight_at, mask=weight_mask, other=0.0)
        total = tl.dot(inputs, factors, total, input_precision="ieee")
    return total


@triton.jit
def _store(
    out: Map,
    bias: tl.tensor | None,
    residual: Map | None,
    total: tl.tensor,
    rows: Rows,
    column: tl.tensor,
    column_mask: tl.tensor,
) -> None:
    mask = rows.mask[:, None] & column_mask[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = rows.sample * residual.sample + rows.out_y * residual.row
        at = (at + rows.out_x * residual.pixel)[:, None] + (column * residual.channel)[None, :]
        total += tl.load(residual.data + at, mask=mask, other=0.0).to(tl.float32)
    at = rows.sample * out.sample + rows.out_y * out.row + rows.out_x * out.pixel
    at = at[:, None] + (column * out.channel)[None, :]
    tl.store(out.data + at, total.to(out.data.type.element_ty), mask=mask)


@triton.jit
def _conv_kernel(
    out: Map,
    x: Map,
    x2: Map | None,
    weight: Weight,
    bias: tl.tensor | None,
    residual: Map | None,
    parts: tl.tensor | None,
    split_k_locks: tl.tensor | None,
    of: Problem,
    KIND: tl.constexpr,
    CONFIG: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    # Tiles in groups of rows: those that run concurrently share inputs and weights in L2.
    group = tile // (GROUP * of.column_tiles)
    size = tl.minimum(of.row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * of.column_tiles)
    row_tile = group * GROUP + within % size
    column_tile = within // size

    column_first = column_tile * CONFIG.columns
    phase_y, phase_x, phase = 0, 0, 0
    if KIND.doubling:
        tiles_of_phase = of.column_tiles // 4
        phase = column_tile // tiles_of_phase
        column_first = column_tile % tiles_of_phase * CONFIG.columns
        phase_y, phase_x = phase // 2, phase % 2
    column = column_first + tl.arange(0, CONFIG.columns)
    column_mask = column < of.outputs

    row = row_tile.to(tl.int64) * CONFIG.rows if KIND.wide else row_tile * CONFIG.rows
    row = row + tl.arange(0, CONFIG.rows)
    out_x = row % of.out_width
    out_y = row // of.out_width % of.out_height
    sample = row // of.out_width // of.out_height
    first_y = out_y * KIND.stride - of.top + phase_y
    first_x = out_x * KIND.stride - of.left + phase_x
    if KIND.doubling:
        out_y, out_x = out_y * 2 + phase_y, out_x * 2 + phase_x
    rows = Rows(sample, out_y, out_x, first_y, first_x, row < of.pixels)
    if KIND.wide:
        column = column.to(tl.int64)

    ROWS: tl.constexpr = CONFIG.rows  # Triton 3.6 accepts no shape from a tuple
    COLUMNS: tl.constexpr = CONFIG.columns
    TAPS: tl.constexpr = KIND.kernel * KIND.kernel
    steps = tl.cdiv(of.channels, CONFIG.depth) * TAPS
    all_steps = steps
    if x2 is not None:
        all_steps += tl.cdiv(of.channels2, CONFIG.depth) * TAPS
    part = tl.program_id(1)
    begin = all_steps * part // CONFIG.split
    end = all_steps * (part + 1) // CONFIG.split

    weights = weight.data + phase * weight.phase + (column * weight.output)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    after_previous(OVERLAP)
    total = _accumulate(
        *(total, x, of.channels, weights, weight, tl.minimum(begin, steps), tl.minimum(end, steps)),
        *(rows, column_mask, of, KIND, CONFIG),
    )
    if x2 is not None:
        begin, end = tl.maximum(begin - steps, 0), tl.maximum(end - steps, 0)
        total = _accumulate(
            *(total, x2, of.channels2, weights + of.channels * weight.channel, weight, begin, end),
            *(rows, column_mask, of, KIND, CONFIG),
        )

    if CONFIG.split == 1:
        _store(out, bias, residual, total, rows, column, column_mask)
    else:
        tiles = tl.num_programs(0)
        at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :] + parts
        size_of_part: tl.constexpr = ROWS * COLUMNS
        tl.store(at + (part * tiles + tile).to(tl.int64) * size_of_part, total)
        tl.debug_barrier()  # all threads have written their part before the lock is incremented
        if tl.atomic_add(split_k_locks + tile, 1, sem="acq_rel") == CONFIG.split - 1:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in range(CONFIG.split):
                # Bypass the L1 cache, which other multiprocessors do not write.
                there = at + (i * tiles + tile).to(tl.int64) * size_of_part
                total += tl.load(there, cache_modifier=".cg")
            _store(out, bias, residual, total, rows, column, column_mask)
            tl.store(split_k_locks + tile, 0)


def spec_of(out: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor) -> Spec:
    """Return the Spec of the arguments of a convolution."""
    phases = 4 if weight.dim() == 5 else 1
    pixels = out.shape[0] * out.shape[2] * out.shape[3] // phases
    channels2 = 0 if x2 is None else x2.shape[1]
    taps = weight.shape[-1] * weight.shape[-2]
    sizes = (pixels, out.shape[1], x.shape[1], channels2, taps, phases)
    return Spec(*sizes, x.element_size())


def _power(size: int, most: int) -> int:
    return min(most, max(_LEAST, triton.next_power_of_2(size)))


def _depth(spec: Spec, most: int) -> int:
    """Return the largest power of two <= `most` that divides the channels, or covers them."""
    least = min(c for c in (spec.channels, spec.channels2) if c)
    depth = _power(least, most)
    while depth > _LEAST and (spec.channels % depth or spec.channels2 % depth):
        depth //= 2
    whole = spec.channels % depth == 0 and spec.channels2 % depth == 0
    return depth if whole else _power(least, min(most, 32))


def _split(spec: Spec, rows: int, columns: int, depth: int) -> int:
    """Return the parts of the sum: a program a multiprocessor, at least four steps a program."""
    tiles = triton.cdiv(spec.pixels, rows) * triton.cdiv(spec.outputs, columns) * spec.phases
    blocks = triton.cdiv(spec.channels, depth) + triton.cdiv(spec.channels2, depth)
    return max(1, min(MULTIPROCESSORS // tiles, blocks * spec.taps // 4, 16))


def configurations(spec: Spec) -> list[Config]:
    """Return the configurations to time for a shape; `conv_` uses the first.

    They are not tuned on a GPU yet.
    """
    if spec.itemsize == 4:  # without tensor cores: operands are in registers
        rows, columns = _power(spec.pixels, 64), _power(spec.outputs, 32)
        depth = _depth(spec, 16)
        return [Config(rows, columns, depth, 4, 2, _split(spec, rows, columns, depth))]
    deep = _depth(spec, 64)
    tiles = [(128, 128, 8, 4), (128, 256, 8, 3), (64, 128, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4)]
    if spec.pixels * spec.phases * spec.outputs < MULTIPROCESSORS * 128 * 128:
        tiles = [tiles[3], tiles[2], (64, 32, 4, 5), (16, 64, 4, 5), *tiles[:2]]
    found = []
    for rows, columns, num_warps, num_stages in tiles:
        columns = _power(spec.outputs, columns)
        for split in {_split(spec, rows, columns, deep): None, 1: None}:
            found.append(Config(rows, columns, deep, num_warps, num_stages, split))
    return list(dict.fromkeys(found))


def _weight(weight: Tensor) -> Weight:
    phase = weight.stride(0) if weight.dim() == 5 else 0
    return Weight(weight, phase, *weight.stride()[-4:])


def conv(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    config: Config | None = None,
    split_k_locks: Tensor | None = None,
) -> None:
    """Run `conv_` with a configuration.

    The arguments up to padding are those of `reference.conv_`. config is by default the first of
    `configurations`. split_k_locks are int32 zeros, one for each tile, and zero again at the end.
    They are used if config.split > 1, and allocated if None. Concurrent calls must not share them.
    """
    if out.numel() == 0:
        return
    doubling = weight.dim() == 5
    spec = spec_of(out, x, x2, weight)
    if config is None:
        config = configurations(spec)[0]
    scale = 2 if doubling else 1
    out_height, out_width = out.shape[2] // scale, out.shape[3] // scale
    row_tiles = triton.cdiv(spec.pixels, config.rows)
    column_tiles = triton.cdiv(spec.outputs, config.columns) * spec.phases
    left, _, top, _ = padding
    of = Problem(
        *(spec.channels, spec.channels2, x.shape[2], x.shape[3], spec.outputs, spec.pixels),
        *(out_height, out_width, left, top, row_tiles, column_tiles),
    )
    whole = spec.channels % config.depth == 0 and spec.channels2 % config.depth == 0
    needs_wide = wide(out, x, x2, residual) or wide(weight)
    kind = Kind(weight.shape[-1], stride, doubling, whole, needs_wide)
    maps = [None if t is None else map_of(t) for t in (out, x, x2, residual)]
    tiles, parts = row_tiles * column_tiles, None
    if config.split > 1:
        size = config.split * tiles * config.rows * config.columns
        parts = torch.empty(size, dtype=torch.float32, device=out.device)
        if split_k_locks is None:
            split_k_locks = torch.zeros(tiles, dtype=torch.int32, device=out.device)
    else:
        split_k_locks = None
    arguments = (*maps[:3], _weight(weight), bias, maps[3], parts, split_k_locks, of, kind, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_conv_kernel, (tiles, config.split), out, *arguments, _GROUP, **options)


def conv_(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
) -> None:
    """Convolve one or two sources; `reference.conv_` has the equation and the arguments.

    The tensors have one dtype, float32, float16 or bfloat16, and any strides; channels-last is
    fastest. Sums are float32 (float32 factors are not rounded to TF32), rounded once.
    """
    conv(out, x, x2, weight, bias, residual, stride, padding)
