"""The Triton backend: the fused updates and the noise, their kernels and how they are launched.

The launchers take checked arguments; ddpm_fast.ops registers them as torch.ops.ddpm_fast.triton_*.
An operation walks the elements of a sample in one order for all its tensors: channels-last where it
makes noise (that is how noise is numbered), else as the tensor that is written lies in memory. A
tensor that is a straight line in that order needs no index arithmetic; the others share one walk.

A program works on a tile: consecutive elements of one sample or, where samples are shorter than a
tile, several samples (rows) with all their elements (columns).
"""

from __future__ import annotations

from collections import namedtuple
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops import triton_math as core
from ddpm_fast.row import ROW_WIDTH, RowFlag, column

Ints = tuple[int, ...]

# 128 threads with 8 elements each: two vectors of float32, one of float16, two Philox blocks.
TILE_ELEMENTS = 1024
NUM_WARPS = 4
VECTOR_BYTES = 16

_QUAD = 4  # the normals of a Philox block
_MAX_NARROW = 2**31 - TILE_ELEMENTS  # elements of a sample that 32-bit indices reach

# The columns and flags of a step table's row that kernels use.
_Row = namedtuple("_Row", "P Q clip Xx Xx0 Xo S Cin CLIP RAW_OUT SCALE_IN WIDTH")
_ROW = _Row._make(
    [*map(column, _Row._fields[:8]), *(int(RowFlag[f]) for f in _Row._fields[8:11]), ROW_WIDTH]
)


class View(NamedTuple):
    """One tensor [samples, ...]; strides are empty where element e of a sample lies at e."""

    data: Any
    sample_stride: int
    strides: Ints


class Walk(NamedTuple):
    """A sample: the dimensions, outermost first, that tensors with strides share; its extent."""

    sizes: Ints
    elements: int
    tiles: int


class Lookup(NamedTuple):
    """The row of a table that each sample n uses: row[n * stride], of rows."""

    row: Any
    stride: int
    table: Any
    rows: int


class Shape(NamedTuple):
    """The shape of a tile, and what its kernel is specialised on besides."""

    rows: int
    columns: int
    vector: int  # neighbouring elements that one thread moves at once
    wide: bool  # elements of a sample are counted in 64 bits


class Tile(NamedTuple):
    """What a program works on; sample and its mask are scalars where it is one, else [rows, 1]."""

    sample: tl.tensor
    first: tl.tensor  # the first element, a scalar
    element: tl.tensor
    sizes: tl.tuple
    sample_mask: tl.tensor
    mask: tl.tensor


@triton.jit
def _tile(walk: Walk, samples: tl.tensor, SHAPE: tl.constexpr) -> Tile:
    program = tl.program_id(0)
    sample = (program // walk.tiles).to(tl.int64)
    first = program % walk.tiles
    if SHAPE.wide:
        first = first.to(tl.int64)
    first = first * SHAPE.columns
    # One vector width for tensors of every dtype: nothing is exchanged between threads.
    VECTOR: tl.constexpr = SHAPE.vector
    element = first + tl.max_contiguous(tl.arange(0, SHAPE.columns), VECTOR)
    if SHAPE.rows > 1:
        sample = (sample * SHAPE.rows + tl.arange(0, SHAPE.rows))[:, None]
        element = element[None, :]
    sample_mask = sample < samples
    mask = sample_mask & (element < walk.elements)
    return Tile(sample, first, element, walk.sizes, sample_mask, mask)


@triton.jit
def _pointers(view: View, tile: Tile) -> tl.tensor:
    pointers = view.data + tile.sample * view.sample_stride
    rest = tile.element
    for i in tl.static_range(1, len(view.strides)):
        size = tile.sizes[len(view.strides) - i]
        pointers = pointers + (rest % size).to(tl.int64) * view.strides[len(view.strides) - i]
        rest = rest // size
    if len(view.strides) > 0:
        rest = rest.to(tl.int64) * view.strides[0]
    return pointers + rest


@triton.jit
def _load(view: View, tile: Tile) -> tl.tensor:
    return tl.load(_pointers(view, tile), mask=tile.mask).to(tl.float32)


@triton.jit
def _store(view: View, tile: Tile, mask: tl.tensor, value: tl.tensor) -> None:
    tl.store(_pointers(view, tile), value.to(view.data.type.element_ty), mask=mask)


@triton.jit
def _index(lookup: Lookup, tile: Tile) -> tl.tensor:
    return tl.load(lookup.row + tile.sample * lookup.stride, mask=tile.sample_mask, other=-1)


@triton.jit
def _clamped_row(lookup: Lookup, tile: Tile, WIDTH: tl.constexpr) -> tl.tensor:
    index = tl.minimum(tl.maximum(_index(lookup, tile), 0), lookup.rows - 1)
    return lookup.table + index * WIDTH


@triton.jit
def _normals(rng: tl.tensor, row: tl.tensor, tile: Tile, SHAPE: tl.constexpr) -> tl.tensor:
    """The noise of a tile, of stream rng[1] + row."""
    block = (tile.first // 4).to(tl.uint32) + tl.arange(0, SHAPE.columns // 4).to(tl.uint32)
    if SHAPE.rows > 1:
        block = block[None, :]
    stream = (tl.load(rng + 1) + row).to(tl.uint32)
    sample = (tl.load(rng + 2) + tile.sample).to(tl.uint64)
    return core.normal4(block, stream, sample, tl.load(rng).to(tl.uint64))


@triton.jit(do_not_specialize=["lookup", "samples"])
def _q_sample_kernel(
    x_t: View,
    x0: View,
    noise: View,
    rng: tl.tensor | None,
    lookup: Lookup,
    walk: Walk,
    samples: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:
    tile = _tile(walk, samples, SHAPE)
    start = _load(x0, tile)
    if rng is None:
        z = _load(noise, tile)
    else:
        # x_t is made from the noise as it is returned: rounded to its type.
        rounded = _normals(rng, 0, tile, SHAPE).to(noise.data.type.element_ty)
        _store(noise, tile, tile.mask, rounded)
        z = rounded.to(tl.float32)
    row = _clamped_row(lookup, tile, 2)
    signal_scale = tl.load(row, mask=tile.sample_mask)
    noise_scale = tl.load(row + 1, mask=tile.sample_mask)
    _store(x_t, tile, tile.mask, core.q_sample(start, z, signal_scale, noise_scale))


@triton.jit(do_not_specialize=["lookup", "samples"])
def _q_posterior_kernel(
    mean: View,
    x0: View,
    x_t: View,
    variance: tl.tensor,
    log_variance: tl.tensor,
    lookup: Lookup,
    walk: Walk,
    samples: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:
    tile = _tile(walk, samples, SHAPE)
    start = _load(x0, tile)
    x = _load(x_t, tile)
    row = _clamped_row(lookup, tile, 4)
    coef_x0 = tl.load(row, mask=tile.sample_mask)
    coef_x_t = tl.load(row + 1, mask=tile.sample_mask)
    _store(mean, tile, tile.mask, core.q_posterior_mean(start, x, coef_x0, coef_x_t))
    once = tile.sample_mask & (tile.first == 0)
    tl.store(variance + tile.sample, tl.load(row + 2, mask=once), mask=once)
    tl.store(log_variance + tile.sample, tl.load(row + 3, mask=once), mask=once)


@triton.jit(do_not_specialize=["lookup", "samples"])
def _reverse_step_kernel(
    x: View,
    model_output: View,
    noise: View | None,
    model_input: View | None,
    pred_x0: View | None,
    rng: tl.tensor | None,
    lookup: Lookup,
    FLAGS: tl.constexpr,
    walk: Walk,
    samples: tl.tensor,
    SHAPE: tl.constexpr,
    ROW: tl.constexpr = _ROW,
) -> None:
    tile = _tile(walk, samples, SHAPE)
    # What the step does not depend on is asked for first.
    state = _load(x, tile)
    out = _load(model_output, tile)
    if noise is not None:
        z = _load(noise, tile)
    index = _index(lookup, tile)
    runs = (index >= 0) & (index < lookup.rows)
    mask = tile.mask & runs
    row = lookup.table + index * ROW.WIDTH
    if rng is not None:
        z = _normals(rng, index, tile, SHAPE)

    P = tl.load(row + ROW.P, mask=runs)
    Q = tl.load(row + ROW.Q, mask=runs)
    x0 = core.predict_x0(state, out, P, Q)
    if FLAGS & ROW.CLIP:
        x0 = core.clip(x0, tl.load(row + ROW.clip, mask=runs))
    if pred_x0 is not None:
        _store(pred_x0, tile, mask, x0)
    Xx = tl.load(row + ROW.Xx, mask=runs)
    Xx0 = tl.load(row + ROW.Xx0, mask=runs)
    Xo = tl.load(row + ROW.Xo, mask=runs) if FLAGS & ROW.RAW_OUT else None
    state = core.step_mean(state, x0, out, Xx, Xx0, Xo)
    if rng is not None or noise is not None:
        state = core.add_noise(state, z, tl.load(row + ROW.S, mask=runs))
    _store(x, tile, mask, state)
    if model_input is not None:
        if FLAGS & ROW.SCALE_IN:
            state = tl.load(row + ROW.Cin, mask=runs) * state
        _store(model_input, tile, mask, state)


@triton.jit(do_not_specialize=["samples"])
def _philox_normal_kernel(
    out: View, rng: tl.tensor, walk: Walk, samples: tl.tensor, SHAPE: tl.constexpr
) -> None:
    tile = _tile(walk, samples, SHAPE)
    _store(out, tile, tile.mask, _normals(rng, 0, tile, SHAPE))


class _Plan(NamedTuple):
    """How an operation runs; layouts are the (sample_stride, strides) of its tensors."""

    layouts: tuple[tuple[int, Ints], ...]
    grid: tuple[int]
    walk: Walk
    samples: int
    tile: Shape


def _merged(sizes: Ints, *strides: Ints) -> list[Ints]:
    """(size, stride of each tensor) by dimension, two merged where one stride of each serves."""
    merged: list[Ints] = []
    for size, *steps in zip(sizes, *strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == tuple(size * step for step in steps):
            size *= merged.pop()[0]
        merged.append((size, *steps))
    return merged


@lru_cache(maxsize=4096)
def _plan(shape: Ints, strides: tuple[Ints, ...], made_noise: bool, itemsize: int) -> _Plan:
    """The plan for tensors of one shape, the widest of them of `itemsize` bytes.

    Where noise is made the order is channels-last, else that of the first tensor.
    """
    samples, elements = shape[0], prod(shape[1:])
    dims = range(1, len(shape)) if elements else range(0)
    order = [*dims[1:], *dims[:1]] if made_noise else sorted(dims, key=lambda d: -strides[0][d])
    sizes = tuple(shape[d] for d in order)
    steps = [tuple(s[d] for d in order) for s in strides]
    strided = [s for s in dict.fromkeys(steps) if _merged(sizes, s) not in ([], [(elements, 1)])]
    shared, *merged = zip(*_merged(sizes, *strided), strict=True) if strided else [()]
    of_steps = dict(zip(strided, merged, strict=True))
    layouts = tuple((s[0], of_steps.get(t, ())) for s, t in zip(strides, steps, strict=True))

    columns = max(_QUAD, min(TILE_ELEMENTS, triton.next_power_of_2(elements)))
    rows = min(TILE_ELEMENTS // columns, triton.next_power_of_2(samples))
    tiles = max(1, triton.cdiv(elements, columns))
    grid = (triton.cdiv(samples, rows) * tiles,)
    vector = _QUAD if made_noise else min(columns, VECTOR_BYTES // itemsize)
    tile = Shape(rows, columns, vector, elements > _MAX_NARROW)
    return _Plan(layouts, grid, Walk(shared, elements, tiles), samples, tile)


def _launch(kernel: Any, plan: _Plan, tensors: tuple[Tensor | None, ...], *args: object) -> None:
    layouts = iter(plan.layouts)
    views = [None if tensor is None else View(tensor, *next(layouts)) for tensor in tensors]
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(tensors[0]):
        kernel[plan.grid](*views, *args, plan.walk, plan.samples, plan.tile, **options)


def _q_sample(
    x_t: Tensor, x0: Tensor, noise: Tensor, rng: Tensor | None, t: Tensor, coefs: Tensor
) -> None:
    if x_t.numel() == 0:
        return
    strides = (x_t.stride(), x0.stride(), noise.stride())
    plan = _plan(x0.shape, strides, rng is not None, x0.element_size())
    lookup = Lookup(t, t.stride(0), coefs, coefs.shape[0])
    _launch(_q_sample_kernel, plan, (x_t, x0, noise), rng, lookup)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, coefs: Tensor) -> Tensor:
    """x_t = coefs[t, 0] * x0 + coefs[t, 1] * noise, computed in float32. Eq. 4, Ho et al. 2020.

    x0, noise: [N, ...], both float32, float16 or bfloat16. t: int64 [N], clamped to the table.
    coefs: float32 [T, 2], contiguous. Returns x_t like x0.
    """
    x_t = torch.empty_like(x0)
    _q_sample(x_t, x0, noise, None, t, coefs)
    return x_t


def q_sample_philox(x0: Tensor, t: Tensor, coefs: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    """As q_sample, with noise made in the kernel: (x_t, noise), noise rounded to x0's dtype.

    rng: int64 [3] on the device: seed, stream, first sample.
    """
    x_t, noise = torch.empty_like(x0), torch.empty_like(x0)
    _q_sample(x_t, x0, noise, rng, t, coefs)
    return x_t, noise


def q_posterior(x0: Tensor, x_t: Tensor, t: Tensor, coefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0). Eq. 7, Ho et al. 2020.

    x0, x_t and t as for q_sample. coefs: float32 [T, 4], contiguous: the factors of x0 and x_t,
    variance, log-variance. Returns the mean like x_t and two float32 [N, 1, ...] of its ndim.
    """
    mean = torch.empty_like(x_t)
    per_sample = (x_t.shape[0],) + (1,) * (x_t.ndim - 1)
    variance, log_variance = coefs.new_empty(per_sample), coefs.new_empty(per_sample)
    if x_t.shape[0] > 0:
        strides = (mean.stride(), x0.stride(), x_t.stride())
        plan = _plan(x_t.shape, strides, False, x_t.element_size())
        lookup = Lookup(t, t.stride(0), coefs, coefs.shape[0])
        _launch(_q_posterior_kernel, plan, (mean, x0, x_t), variance, log_variance, lookup)
    return mean, variance, log_variance


def reverse_step_(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    model_input: Tensor | None,
    pred_x0: Tensor | None,
    flags: int,
    model_output2: Tensor | None = None,
    log_variance: Tensor | None = None,
    threshold: Tensor | None = None,
    second: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """One step of any solver, in place on x; ddpm_fast/row.py has the equation.

    x, noise, pred_x0: float32 [N, ...]. model_output, model_input: of that shape, float32, float16
    or bfloat16. rows: float32 [steps, ROW_WIDTH], contiguous. step: int64 [N], the row of each
    sample; where it lies outside the table nothing is written. Noise is given, or made from rng, as
    for q_sample_philox (row i uses stream rng[1] + i), or absent. model_input receives the model's
    next input, pred_x0 the x0. flags: RowFlag.
    """
    if x.numel() == 0:
        return
    tensors = (x, model_output, noise, model_input, pred_x0)
    strides = tuple(tensor.stride() for tensor in tensors if tensor is not None)
    plan = _plan(x.shape, strides, rng is not None, x.element_size())
    lookup = Lookup(step, step.stride(0), rows, rows.shape[0])
    _launch(_reverse_step_kernel, plan, tensors, rng, lookup, int(flags))


def philox_normal_(out: Tensor, rng: Tensor) -> None:
    """Fill out with standard normals, made in float32.

    out: [N, ...], float32, float16 or bfloat16, numbered channels-last whatever the strides. rng:
    as for q_sample_philox.
    """
    if out.numel() > 0:
        plan = _plan(out.shape, (out.stride(),), True, out.element_size())
        _launch(_philox_normal_kernel, plan, (out,), rng)
