"""Triton backend of the updates and of the noise: kernels and launchers.

The launchers expect checked arguments; `ddpm_fast.ops.registry` registers them as
`torch.ops.ddpm_fast.triton_*`. `tiles` has the order in which they access tensors.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.row import ROW_FIELDS, ROW_WIDTH, RowFlag, check_functional
from ddpm_fast.ops.triton import arithmetic as core
from ddpm_fast.ops.triton import tiles
from ddpm_fast.ops.triton.tiles import Lookup, View, Walk

# The columns and flags of a step table's row, for kernels.
_Row = namedtuple("_Row", [*ROW_FIELDS, *RowFlag.__members__, "WIDTH"])  # type: ignore[misc]
_ROW = _Row._make([*range(len(ROW_FIELDS)), *map(int, RowFlag), ROW_WIDTH])
_PAST = RowFlag.H1 | RowFlag.H2 | RowFlag.H3 | RowFlag.PUSH


class Coefs(NamedTuple):
    """Row of the step table of each sample, and the mask of samples in the table."""

    row: tl.tensor
    runs: tl.tensor


class Ring(NamedTuple):
    """Ring of past values: slot 0, the stride between slots, the next slot of each sample."""

    first: View
    stride: tl.tensor
    slot: tl.tensor  # unsigned


class StepTensors(NamedTuple):
    """Tensors of a reverse step, in the order of the kernel."""

    x: Tensor
    model_output: Tensor
    noise: Tensor | None = None
    model_input: Tensor | None = None
    pred_x0: Tensor | None = None
    model_output2: Tensor | None = None
    log_variance: Tensor | None = None
    second: Tensor | None = None
    history: Tensor | None = None
    source: Tensor | None = None


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
    tile = tiles.tile_of(walk, samples, SHAPE)
    start = tiles.load(x0, tile)
    if rng is None:
        z = tiles.load(noise, tile)
    else:
        # x_t uses the noise as it is returned: rounded to its dtype.
        rounded = tiles.normals(rng, 0, tile, SHAPE).to(noise.data.type.element_ty)
        tiles.store(noise, tile, tile.mask, rounded)
        z = rounded.to(tl.float32)
    row = tiles.clamped_row(lookup, tile, 2)
    signal_scale = tl.load(row, mask=tile.sample_mask)
    noise_scale = tl.load(row + 1, mask=tile.sample_mask)
    tiles.store(x_t, tile, tile.mask, core.q_sample(start, z, signal_scale, noise_scale))


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
    tile = tiles.tile_of(walk, samples, SHAPE)
    start = tiles.load(x0, tile)
    x = tiles.load(x_t, tile)
    row = tiles.clamped_row(lookup, tile, 4)
    coef_x0 = tl.load(row, mask=tile.sample_mask)
    coef_x_t = tl.load(row + 1, mask=tile.sample_mask)
    tiles.store(mean, tile, tile.mask, core.q_posterior_mean(start, x, coef_x0, coef_x_t))
    once = tile.sample_mask & (tile.first == 0)
    tl.store(variance + tile.sample, tl.load(row + 2, mask=once), mask=once)
    tl.store(log_variance + tile.sample, tl.load(row + 3, mask=once), mask=once)


@triton.jit
def _coef(coefs: Coefs, COLUMN: tl.constexpr) -> tl.tensor:
    return tl.load(coefs.row + COLUMN, mask=coefs.runs)


@triton.jit
def _past(ring: Ring, K: tl.constexpr, DEPTH: tl.constexpr) -> View:
    """Return the address of h_k, and of h0 for k = 0; inside the ring for every slot of a row."""
    slot = (ring.slot + (DEPTH - K)) % DEPTH
    data = ring.first.data + slot.to(tl.int64) * ring.stride
    return View(data, ring.first.sample_stride, ring.first.strides)


@triton.jit
def _add_past(
    sum: tl.tensor,
    h1: tl.tensor | None,
    h2: tl.tensor | None,
    h3: tl.tensor | None,
    coefs: Coefs,
    FIRST: tl.constexpr,
) -> tl.tensor:
    """Add the terms of the past values that are not None; FIRST: the column of h1."""
    if h1 is not None:
        sum = core.add_term(sum, h1, _coef(coefs, FIRST))
    if h2 is not None:
        sum = core.add_term(sum, h2, _coef(coefs, FIRST + 1))
    if h3 is not None:
        sum = core.add_term(sum, h3, _coef(coefs, FIRST + 2))
    return sum


@triton.jit(do_not_specialize=["lookup", "samples"])
def _reverse_step_kernel(
    x: View,
    model_output: View,
    noise: View | None,
    model_input: View | None,
    pred_x0: View | None,
    model_output2: View | None,
    log_variance: View | None,
    second: View | None,
    history: View | None,
    source: View | None,
    slot_stride: tl.tensor | None,
    threshold: View | None,
    rng: tl.tensor | None,
    lookup: Lookup,
    FLAGS: tl.constexpr,
    DEPTH: tl.constexpr,
    walk: Walk,
    samples: tl.tensor,
    SHAPE: tl.constexpr,
    ROW: tl.constexpr = _ROW,
) -> None:
    tile = tiles.tile_of(walk, samples, SHAPE)
    # Loads that do not depend on the step are issued first.
    state = tiles.load(x if source is None else source, tile)
    out = tiles.load(model_output, tile)
    if noise is not None:
        z = tiles.load(noise, tile)
    if model_output2 is not None:
        out2 = tiles.load(model_output2, tile)
    if log_variance is not None:
        v = tiles.load(log_variance, tile)
    if second is not None:
        y = tiles.load(second, tile)
    index = tiles.index_of(lookup, tile)
    runs = (index >= 0) & (index < lookup.rows)
    mask = tile.mask & runs
    coefs = Coefs(lookup.table + index * ROW.WIDTH, runs)
    if history is not None:
        slot = _coef(coefs, ROW.slot).to(tl.int32).to(tl.uint32, bitcast=True)
        ring = Ring(history, slot_stride, slot)
        h1 = tiles.load(_past(ring, 1, DEPTH), tile) if FLAGS & ROW.H1 else None
        h2 = tiles.load(_past(ring, 2, DEPTH), tile) if FLAGS & ROW.H2 else None
        h3 = tiles.load(_past(ring, 3, DEPTH), tile) if FLAGS & ROW.H3 else None
    if rng is not None:
        z = tiles.normals(rng, index, tile, SHAPE)

    if model_output2 is not None:
        out = core.guide(out, out2, _coef(coefs, ROW.G0), _coef(coefs, ROW.G1))
    x0 = core.predict_x0(
        state, out, _coef(coefs, ROW.P), _coef(coefs, ROW.Q), _coef(coefs, ROW.ratio)
    )
    if threshold is not None:
        bound = threshold.data + tile.sample * threshold.sample_stride
        x0 = core.threshold(x0, tl.load(bound, mask=runs))
    elif FLAGS & ROW.CLIP:
        x0 = core.clip(x0, _coef(coefs, ROW.clip))
    if source is not None:
        # A sample outside the table has no state to keep: its result is NaN.
        mask = tile.mask
        x0 = tl.where(runs, x0, float("nan"))
    if pred_x0 is not None:
        tiles.store(pred_x0, tile, mask, x0)

    Xo = _coef(coefs, ROW.Xo) if FLAGS & ROW.RAW_OUT else None
    next = core.step_mean(state, x0, out, _coef(coefs, ROW.Xx), _coef(coefs, ROW.Xx0), Xo)
    if second is not None:
        next = core.add_term(next, y, _coef(coefs, ROW.Xy))
    if history is not None:
        next = _add_past(next, h1, h2, h3, coefs, ROW.Xh1)
    if rng is not None or noise is not None:
        if log_variance is not None:
            z = core.learned_noise(z, v, _coef(coefs, ROW.Lmin), _coef(coefs, ROW.Lmax))
        next = core.add_noise(next, z, _coef(coefs, ROW.S))
    if second is not None:
        Yx, Yx0 = _coef(coefs, ROW.Yx), _coef(coefs, ROW.Yx0)
        y = core.add_term(core.step_mean(state, x0, out, Yx, Yx0, None), y, _coef(coefs, ROW.Yy))
        if history is not None:
            y = _add_past(y, h1, h2, h3, coefs, ROW.Yh1)
        tiles.store(second, tile, mask, y)
    if FLAGS & ROW.PUSH:
        Ho = _coef(coefs, ROW.Ho) if FLAGS & ROW.PUSH_OUT else None
        pushed = core.step_mean(state, x0, out, _coef(coefs, ROW.Hx), _coef(coefs, ROW.Hv), Ho)
        pushes = tile.mask & (runs & (_coef(coefs, ROW.push) != 0))
        tiles.store(_past(ring, 0, DEPTH), tile, pushes, pushed)
    if source is not None:
        next = tl.where(runs, next, float("nan"))
    tiles.store(x, tile, mask, next)
    if model_input is not None:
        if FLAGS & ROW.SCALE_IN:
            next = _coef(coefs, ROW.Cin) * next
        tiles.store(model_input, tile, mask, next)


@triton.jit(do_not_specialize=["samples"])
def _philox_normal_kernel(
    out: View, rng: tl.tensor, walk: Walk, samples: tl.tensor, SHAPE: tl.constexpr
) -> None:
    tile = tiles.tile_of(walk, samples, SHAPE)
    tiles.store(out, tile, tile.mask, tiles.normals(rng, 0, tile, SHAPE))


def _q_sample(
    x_t: Tensor, x0: Tensor, noise: Tensor, rng: Tensor | None, t: Tensor, coefs: Tensor
) -> None:
    if x_t.numel() == 0:
        return
    strides = (x_t.stride(), x0.stride(), noise.stride())
    plan = tiles.plan_of(x0.shape, strides, rng is not None, x0.element_size())
    lookup = Lookup(t, t.stride(0), coefs, coefs.shape[0])
    tiles.launch(_q_sample_kernel, plan, (x_t, x0, noise), rng, lookup)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, coefs: Tensor) -> Tensor:
    """Run `reference.q_sample` in float32.

    x0 and noise have one dtype, float32, float16 or bfloat16; coefs is contiguous.
    """
    x_t = torch.empty_like(x0)
    _q_sample(x_t, x0, noise, None, t, coefs)
    return x_t


def q_sample_philox(x0: Tensor, t: Tensor, coefs: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    """Run `q_sample` with generated noise; return x_t and the noise, both like x0."""
    x_t, noise = torch.empty_like(x0), torch.empty_like(x0)
    _q_sample(x_t, x0, noise, rng, t, coefs)
    return x_t, noise


def q_posterior(x0: Tensor, x_t: Tensor, t: Tensor, coefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run `reference.q_posterior`; return the mean like x_t and two float32 [N, 1, ...]."""
    mean = torch.empty_like(x_t)
    per_sample = (x_t.shape[0],) + (1,) * (x_t.ndim - 1)
    variance, log_variance = coefs.new_empty(per_sample), coefs.new_empty(per_sample)
    if x_t.shape[0] > 0:
        strides = (mean.stride(), x0.stride(), x_t.stride())
        plan = tiles.plan_of(x_t.shape, strides, False, x_t.element_size())
        lookup = Lookup(t, t.stride(0), coefs, coefs.shape[0])
        tiles.launch(_q_posterior_kernel, plan, (mean, x0, x_t), variance, log_variance, lookup)
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
    """Run `reference.reverse_step_`; only the tensors of the terms in `flags` are read.

    x, noise, pred_x0, second and history are float32; model_output, model_input, model_output2 and
    log_variance float32, float16 or bfloat16; rows is contiguous.
    """
    if x.numel() == 0:
        return

    def flagged(tensor: Tensor | None, by: RowFlag) -> Tensor | None:
        return tensor if flags & by else None

    threshold, history = flagged(threshold, RowFlag.THRESHOLD), flagged(history, _PAST)
    tensors = StepTensors(
        *(x, model_output, noise, model_input, pred_x0),
        flagged(model_output2, RowFlag.GUIDE),
        flagged(log_variance, RowFlag.LEARNED),
        flagged(second, RowFlag.SECOND),
        history,
    )
    _reverse_step(tensors, rows, step, rng, flags, threshold)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: Tensor,
    noise: Tensor | None,
    flags: int,
    log_variance: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `reference.reverse_step` for x of float32, float16 or bfloat16.

    Raises:
        ValueError: a flag is not in FUNCTIONAL_FLAGS.
    """
    check_functional(flags)
    next, pred_x0 = torch.empty_like(x), torch.empty_like(x)
    if x.numel() > 0:
        v = log_variance if flags & RowFlag.LEARNED else None
        bounds = threshold if flags & RowFlag.THRESHOLD else None
        tensors = StepTensors(next, model_output, noise, pred_x0=pred_x0, log_variance=v, source=x)
        _reverse_step(tensors, rows, step, None, flags, bounds)
    return next, pred_x0


def _reverse_step(
    tensors: StepTensors,
    rows: Tensor,
    step: Tensor,
    rng: Tensor | None,
    flags: int,
    threshold: Tensor | None,
) -> None:
    shape, history = tensors.x.shape, tensors.history
    present = [tensor for tensor in tensors if tensor is not None]
    # Strides of a slot of the history.
    strides = tuple(tensor.stride()[-len(shape) :] for tensor in present)
    itemsize = max(tensor.element_size() for tensor in present)
    plan = tiles.plan_of(shape, strides, rng is not None, itemsize)
    depth, slot_stride = (0, None) if history is None else (history.shape[0], history.stride(0))
    bounds = None if threshold is None else View(threshold, threshold.stride(0), ())
    lookup = Lookup(step, step.stride(0), rows, rows.shape[0])
    args = (slot_stride, bounds, rng, lookup, int(flags), depth)
    tiles.launch(_reverse_step_kernel, plan, tensors, *args)


def philox_normal_(out: Tensor, rng: Tensor) -> None:
    """Run `reference.philox_normal_` for out of float32, float16 or bfloat16."""
    if out.numel() > 0:
        plan = tiles.plan_of(out.shape, (out.stride(),), True, out.element_size())
        tiles.launch(_philox_normal_kernel, plan, (out,), rng)
