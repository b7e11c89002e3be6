"""Reference backend of the updates, in plain PyTorch, written from the equations.

It runs on any device, and in float64, in which the kernels are checked against it. It allocates
memory and is slow. Signatures are those of `torch.ops.ddpm_fast.*`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.ops.registry import per_sample
from ddpm_fast.ops.row import RowFlag, check_functional, column

_WORD = 0xFFFFFFFF


def _gather(coefs: Tensor, t: Tensor, like: Tensor) -> list[Tensor]:
    """Return the columns of the coefficients of each sample, to broadcast over `like`."""
    chosen = coefs.index_select(0, t.clamp(0, coefs.shape[0] - 1))
    return [per_sample(chosen[:, i], like) for i in range(coefs.shape[1])]


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Return the value in the dtype and with the strides of `like`."""
    return torch.empty_like(like).copy_(value)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, coefs: Tensor) -> Tensor:
    """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, Eq. 4).

    Args:
        x0: [N, ...].
        t: Timesteps, int64 [N], clamped to the table.
        noise: Standard normals, shape of x0.
        coefs: [T, 2]: sqrt(abar) and sqrt(1 - abar), in the dtype of the arithmetic.
    """
    signal_scale, noise_scale = _gather(coefs, t, x0)
    x_t = signal_scale * x0.to(coefs.dtype) + noise_scale * noise.to(coefs.dtype)
    return _like(x_t, x0)


def q_sample_philox(x0: Tensor, t: Tensor, coefs: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    """Return `q_sample` with generated noise, and the noise in the dtype of x0.

    Args:
        x0: See `q_sample`.
        t: See `q_sample`.
        coefs: See `q_sample`.
        rng: int64 [3]: seed, stream, first sample.
    """
    noise = torch.empty_like(x0, requires_grad=False)
    philox_normal_(noise, rng)
    return q_sample(x0, t, noise, coefs), noise


def q_posterior(x0: Tensor, x_t: Tensor, t: Tensor, coefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7).

    Args:
        x0: [N, ...].
        x_t: Shape of x0.
        t: Timesteps, int64 [N], clamped to the table.
        coefs: [T, 4]: factors of x0 and x_t, variance, log-variance.

    Returns:
        The mean like x_t, and two tensors [N, 1, ...] with its number of dimensions.
    """
    coef_x0, coef_x_t, variance, log_variance = _gather(coefs, t, x_t)
    mean = coef_x0 * x0.to(coefs.dtype) + coef_x_t * x_t.to(coefs.dtype)
    return _like(mean, x_t), variance, log_variance


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
    """Apply a row of a step table to the state in place; `ddpm_fast.ops.row` has the equation.

    Args:
        x: State [N, ...], in the dtype of the arithmetic; overwritten.
        model_output: Output of the network, shape of x.
        rows: Step table [steps, ROW_WIDTH].
        step: Row of each sample, int64 [N]. Samples with a row outside the table are not written.
        noise: Standard normals, shape of x. None: generated from rng, or absent.
        rng: int64 [3]: seed, stream, first sample; row i uses stream + i.
        model_input: Next input of the network, shape of x; written.
        pred_x0: The predicted x0, shape of x; written.
        flags: RowFlag.
        model_output2: Second output of classifier-free guidance, shape of x.
        log_variance: Learned variance, shape of x.
        threshold: Threshold of each sample, [N].
        second: Second state, shape of x; overwritten.
        history: Ring of past values [depth, N, ...]; one slot may be overwritten.
    """
    active, index, row = _chosen(rows, step, x)

    def coef(name: str) -> Tensor:
        return per_sample(row[:, column(name)], x)

    out, x0 = predicted_x0(row, x, model_output, model_output2)
    x0 = _bounded(x0, row, flags, threshold)
    past = _past_values(history, row, x, flags)
    mean = _mean(row, x, x0, out, flags)
    if second is not None:
        mean = mean + coef("Xy") * second
    for k, value in past.items():
        mean = mean + coef(f"Xh{k}") * value
    if rng is not None:
        seed, stream, first = rng.unbind()
        noise = normals(x, seed, stream + index, first)
    if noise is not None:
        mean = mean + _scaled_noise(row, noise, log_variance)

    if second is not None:
        next_second = coef("Yx") * x + coef("Yx0") * x0 + coef("Yy") * second
        for k, value in past.items():
            next_second = next_second + coef(f"Yh{k}") * value
        second.copy_(torch.where(active, next_second, second))
    if history is not None:
        pushed = coef("Hx") * x + coef("Hv") * x0
        if flags & RowFlag.PUSH_OUT:
            pushed = pushed + coef("Ho") * out
        slot = row[:, column("slot")]
        for i, target in enumerate(history.unbind()):
            chosen = active & per_sample(slot == i, x) & (coef("push") != 0)
            target.copy_(torch.where(chosen, pushed, target))
    x.copy_(torch.where(active, mean, x))
    if pred_x0 is not None:
        pred_x0.copy_(torch.where(active, x0, pred_x0))
    if model_input is not None:
        scaled = coef("Cin") * x if flags & RowFlag.SCALE_IN else x
        model_input.copy_(torch.where(active, scaled.to(model_input.dtype), model_input))


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
    """Apply a row of a step table; return x' and x0 with the dtype and strides of x.

    The only backend that is differentiable by autograd.

    Args:
        x: State [N, ...].
        model_output: Output of the network, shape of x.
        rows: Step table [steps, ROW_WIDTH], in the dtype of the arithmetic.
        step: Row of each sample, int64 [N]. A sample whose row is outside the table is NaN.
        noise: Standard normals, shape of x, or None.
        flags: RowFlag, among FUNCTIONAL_FLAGS.
        log_variance: Learned variance, shape of x, or None.
        threshold: Threshold of each sample, [N] in the dtype of rows, or None.

    Raises:
        ValueError: a flag is not in FUNCTIONAL_FLAGS.
    """
    check_functional(flags)
    active, _, row = _chosen(rows, step, x)
    state = x.to(rows.dtype)
    out, x0 = predicted_x0(row, state, model_output, None)
    x0 = _bounded(x0, row, flags, threshold)
    mean = _mean(row, state, x0, out, flags)
    if noise is not None:
        mean = mean + _scaled_noise(row, noise.to(rows.dtype), log_variance)
    return _like(mean.where(active, math.nan), x), _like(x0.where(active, math.nan), x)


def _chosen(rows: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a mask of the samples in the table, the nearest index, and the row of each sample."""
    active = per_sample((step >= 0) & (step < rows.shape[0]), like)
    index = step.clamp(0, rows.shape[0] - 1)
    return active, index, rows.index_select(0, index)


def _bounded(x0: Tensor, row: Tensor, flags: int, threshold: Tensor | None) -> Tensor:
    if threshold is not None:
        bound = per_sample(threshold, x0)
        return torch.clamp(x0, -bound, bound) / bound
    if flags & RowFlag.CLIP:
        clip = per_sample(row[:, column("clip")], x0)
        return torch.clamp(x0, -clip, clip)
    return x0


def _mean(row: Tensor, x: Tensor, x0: Tensor, out: Tensor, flags: int) -> Tensor:
    """Return the terms of x' that every solver has, and that of the network's output."""

    def coef(name: str) -> Tensor:
        return per_sample(row[:, column(name)], x)

    mean = coef("Xx") * x + coef("Xx0") * x0
    return mean + coef("Xo") * out if flags & RowFlag.RAW_OUT else mean


def _scaled_noise(row: Tensor, noise: Tensor, log_variance: Tensor | None) -> Tensor:
    """Return S e z; e is 1 if the variance is not learned."""

    def coef(name: str) -> Tensor:
        return per_sample(row[:, column(name)], noise)

    if log_variance is not None:
        v = log_variance.to(noise.dtype)
        noise = torch.exp((coef("Lmin") + v * (coef("Lmax") - coef("Lmin"))) / 2) * noise
    return coef("S") * noise


def predicted_x0(
    row: Tensor, x: Tensor, model_output: Tensor, model_output2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the guided output in the dtype of x, and x0 before clipping; `row` of each sample."""

    def coef(name: str) -> Tensor:
        return per_sample(row[:, column(name)], x)

    out = model_output.to(x.dtype)
    if model_output2 is not None:
        out = coef("G0") * out + coef("G1") * model_output2.to(x.dtype)
    x0 = torch.where(coef("P") == 0, coef("Q") * out, coef("P") * (x + coef("ratio") * out))
    return out, x0


def _past_values(
    history: Tensor | None, row: Tensor, like: Tensor, flags: int
) -> dict[int, Tensor]:
    """Return each past value h_k that a table uses, from its slot for the row of each sample."""
    if history is None:
        return {}
    depth, samples = history.shape[0], torch.arange(like.shape[0], device=like.device)
    slot = row[:, column("slot")].long()
    return {
        k: history[(slot - k) % depth, samples]
        for k in range(1, depth + 1)
        if flags & RowFlag[f"H{k}"]
    }


def philox_normal_(out: Tensor, rng: Tensor) -> None:
    """Fill a tensor with standard normals.

    Args:
        out: [N, ...]; written.
        rng: int64 [3]: seed, stream, first sample.
    """
    seed, stream, first = rng.unbind()
    out.copy_(normals(out, seed, stream.expand(out.shape[0]), first))


def normals(like: Tensor, seed: Tensor, stream: Tensor, first_sample: Tensor) -> Tensor:
    """Return float32 normals of the shape of `like` [N, C, ...]; `stream` is int64 [N].

    Word r, rounded to float32, becomes u = r 2^-32 + 2^-33, rounded again. The transform of Box and
    Muller (1958) is evaluated in float64 and rounded once. Element (c, s) of a sample, s its
    position in space, has number s C + c, and is lane number % 4 of block number // 4.
    """
    samples, device = like.shape[0], like.device
    channels = like.shape[1] if like.ndim > 1 else 1
    elements = math.prod(like.shape[1:])
    blocks = torch.arange(-(-elements // 4), device=device).expand(samples, -1)
    sample = (first_sample + torch.arange(samples, device=device))[:, None].expand_as(blocks)
    words = philox4x32_10(
        (blocks, stream[:, None].expand_as(blocks), sample, sample >> 32),
        (seed, seed >> 32),
    )
    u = [(word.float().double() * 2.0**-32 + 2.0**-33).float().double() for word in words]
    lanes = []
    for radial, angular in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2 * torch.log(radial))
        lanes += [
            radius * torch.cos(2 * math.pi * angular),
            radius * torch.sin(2 * math.pi * angular),
        ]
    flat = torch.stack(lanes, dim=-1).flatten(1)[:, :elements].float()
    spatial = flat.reshape(samples, *like.shape[2:], channels).movedim(-1, 1)
    return spatial.reshape(like.shape)


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 (Salmon et al. 2011) of int64 tensors, whose low 32 bits are used."""
    c0, c1, c2, c3 = (c & _WORD for c in counter)
    k0, k1 = (k & _WORD for k in key)
    for _ in range(10):
        # The product may overflow int64; its low 64 bits are correct.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
