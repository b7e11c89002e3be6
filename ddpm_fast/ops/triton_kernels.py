"""The Triton backend: the kernels of the fused updates and of the noise, and their launchers.

The launchers take checked arguments; ddpm_fast.ops registers them as torch.ops.ddpm_fast.triton_*.
How their tensors are walked is in triton_tiles.
"""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops import triton_math as core
from ddpm_fast.ops import triton_tiles as tiles
from ddpm_fast.ops.triton_tiles import Lookup, View, Walk
from ddpm_fast.row import ROW_WIDTH, RowFlag, column

# The columns and flags of a step table's row that kernels use.
_Row = namedtuple("_Row", "P Q clip Xx Xx0 Xo S Cin CLIP RAW_OUT SCALE_IN WIDTH")
_ROW = _Row._make(
    [*map(column, _Row._fields[:8]), *(int(RowFlag[f]) for f in _Row._fields[8:11]), ROW_WIDTH]
)


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
        # x_t is made from the noise as it is returned: rounded to its type.
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
    tile = tiles.tile_of(walk, samples, SHAPE)
    # What the step does not depend on is asked for first.
    state = tiles.load(x, tile)
    out = tiles.load(model_output, tile)
    if noise is not None:
        z = tiles.load(noise, tile)
    index = tiles.index_of(lookup, tile)
    runs = (index >= 0) & (index < lookup.rows)
    mask = tile.mask & runs
    row = lookup.table + index * ROW.WIDTH
    if rng is not None:
        z = tiles.normals(rng, index, tile, SHAPE)

    P = tl.load(row + ROW.P, mask=runs)
    Q = tl.load(row + ROW.Q, mask=runs)
    x0 = core.predict_x0(state, out, P, Q)
    if FLAGS & ROW.CLIP:
        x0 = core.clip(x0, tl.load(row + ROW.clip, mask=runs))
    if pred_x0 is not None:
        tiles.store(pred_x0, tile, mask, x0)
    Xx = tl.load(row + ROW.Xx, mask=runs)
    Xx0 = tl.load(row + ROW.Xx0, mask=runs)
    Xo = tl.load(row + ROW.Xo, mask=runs) if FLAGS & ROW.RAW_OUT else None
    state = core.step_mean(state, x0, out, Xx, Xx0, Xo)
    if rng is not None or noise is not None:
        state = core.add_noise(state, z, tl.load(row + ROW.S, mask=runs))
    tiles.store(x, tile, mask, state)
    if model_input is not None:
        if FLAGS & ROW.SCALE_IN:
            state = tl.load(row + ROW.Cin, mask=runs) * state
        tiles.store(model_input, tile, mask, state)


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
    plan = tiles.plan_of(x.shape, strides, rng is not None, x.element_size())
    lookup = Lookup(step, step.stride(0), rows, rows.shape[0])
    tiles.launch(_reverse_step_kernel, plan, tensors, rng, lookup, int(flags))


def philox_normal_(out: Tensor, rng: Tensor) -> None:
    """Fill out with standard normals, made in float32.

    out: [N, ...], float32, float16 or bfloat16, numbered channels-last whatever the strides. rng:
    as for q_sample_philox.
    """
    if out.numel() > 0:
        plan = tiles.plan_of(out.shape, (out.stride(),), True, out.element_size())
        tiles.launch(_philox_normal_kernel, plan, (out,), rng)
