"""Variational bound on the negative log-likelihood, term by term, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_fast.diffusion.bound_terms import DECODERS, BoundTerms, Decoder
from ddpm_fast.diffusion.forward import q_sample_philox
from ddpm_fast.diffusion.gaussian import gaussian_kl
from ddpm_fast.diffusion.model_call import call_model, check_eval_mode
from ddpm_fast.diffusion.model_output import prediction_of
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import (
    Clip,
    clip_bound,
    dynamic_threshold,
    threshold_from_clip,
)
from ddpm_fast.diffusion.variance import LEARNED, FirstLogVariance, Variance
from ddpm_fast.ops.philox import STREAM_TRAINING
from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import micro_batches
from ddpm_fast.utils.run_scope import run_scope


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """Terms of the bound of each data item, float64, in bits per dimension.

    Names and column order are those of OpenAI's calc_bpd_loop: one column for each timestep, the
    highest first.

    Attributes:
        timesteps: int64 [steps] on the CPU, descending.
        prior_bpd: L_T [N]: the divergence of q(x_T | x_0) from N(0, I), which no model changes.
        vb: L_{t-1} [N, steps]: the divergence of q(x_{t-1} | x_t, x_0) from p(x_{t-1} | x_t) at one
            sample of x_t for each t; in the last column L_0 = -log p(x_0 | x_1).
        xstart_mse: Mean squared error of the predicted x_0, after clipping, [N, steps].
        mse: Mean squared error of the epsilon of that x_0, [N, steps].
        dimensions: Number of elements of a data item.
        decoder: Kind of L_0: "discretised", a probability, or "gaussian", a density, which may
            exceed 1 and make L_0 negative. The units differ: a density times the width of a bin is
            a probability, so for 256 values it adds log2(255/2) = 6.99 bits per dimension.
    """

    timesteps: Tensor
    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor
    dimensions: int
    decoder: str

    @property
    def total_bpd(self) -> Tensor:
        """The bound [N]: the sum of L_T, all L_{t-1} and L_0."""
        return self.prior_bpd + self.vb.sum(1)

    @property
    def decoder_bpd(self) -> Tensor:
        """L_0 of each item, [N]."""
        return self.vb[:, -1]

    def in_nats(self, bpd: Tensor) -> Tensor:
        """Convert bits per dimension, such as any of the above, into nats per data item."""
        return bpd * (self.dimensions * math.log(2))


@torch.no_grad()
def variational_bound(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: Clip = 1.0,
    decoder: Decoder = "discretised",
    steps: int | None = None,
    spacing: str | Sequence[int] = "linspace",
    log_variance: FirstLogVariance = "repeat",
    seed: int = 0,
    first_sample: int = 0,
    micro_batch: int = 64,
    pad: bool = True,
    labels: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> VariationalBound:
    """Estimate an upper bound on -log p(x_0) of each data item (Eq. 5, Ho et al. 2020).

    -log p(x_0) <= E[L_T + sum of L_{t-1} + L_0]. The estimate is unbiased: it samples one x_t for
    every timestep, at the cost of a forward pass for each item and timestep.

    Args:
        model: Callable `model(x_t, t)`, or `model(x_t, t, labels)` with labels: x_t [B, ...] in
            the dtype of `x0`, t int64 [B]. Returns the prediction, or an object whose `sample` is
            it, in any floating dtype, with twice the channels for a learned variance (the
            prediction first). It must not write to x_t.
        schedule: Noise schedule of T timesteps.
        x0: Data, float32 or float64 [N, ...], on the device of the model; for the discretised
            decoder 256 values evenly spaced over [-1, 1], such as `pixels / 127.5 - 1`.
        prediction: Kind of the model output: "epsilon", "x0", "v" or "score".
        variance: Variance of p(x_{t-1} | x_t), as for `model_variance`.
        clip: The predicted x_0 is clipped to [-clip, clip]. None: not clipped.
            `DynamicThreshold`: thresholded.
        decoder: L_0. "discretised": probability of the bin of x_0 (Eq. 13, Ho et al. 2020), with
            the variance at index 0. "gaussian": density of x_0 with its constant (Section 3.2.4,
            Khungurn 2022), with beta_1 for the fixed variances.
        steps: Number of timesteps, with betas as by `respace`. None: all T.
        spacing: As for `timesteps`.
        log_variance: As for `model_variance`.
        seed: Seed of the noise in [0, 2^64).
        first_sample: Item k gets the noise of sample first_sample + k in stream STREAM_TRAINING +
            t, whatever the batch, device or steps.
        micro_batch: Number of items in a forward pass.
        pad: Pad micro-batches, so that an item always has the same slot and its terms the same
            bits. False: fewer forward passes.
        labels: Labels [N, ...] of a conditional model.
        model_kwargs: Further keyword arguments of the model. Tensors [N, ...] are divided like
            `x0`.
        backend: As for `q_sample`.
        progress: Show a progress bar, which does not synchronise with the GPU.

    Returns:
        The terms of the bound.

    Raises:
        TypeError: An argument or the model's return value has another type or dtype.
        ValueError: An argument or the model's return value has another shape or device, or is out
            of range.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
    check_eval_mode(model)
    checks.choice("decoder", decoder, DECODERS)
    x0 = _checked_data(x0, decoder)
    respaced, model_timesteps = respace(schedule, steps, spacing)
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape[:1] != x0.shape[:1]):
        got = checks.shape_text(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor [{len(x0)}, ...]; got {got}")
    num, size = len(x0), checks.integer("micro_batch", micro_batch, 1, 1 << 31)
    checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END - num)
    tables = BoundTerms(respaced, prediction, variance, decoder, log_variance, x0.device, x0.dtype)
    terms = _Terms(tables, variance in LEARNED, clip)
    vb, xstart_mse = (
        torch.empty(num, respaced.T, dtype=torch.float64, device=x0.device) for _ in range(2)
    )
    batches = list(micro_batches(num, first_sample, size, pad))
    total = len(batches) * respaced.T
    with run_scope(), tqdm(total=total, desc="bound", unit="step", disable=not progress) as bar:
        for batch in batches:
            items = batch.take(x0, num)
            arguments = () if labels is None else (batch.take(labels, num),)
            keywords = {
                name: batch.take(value, num)
                if isinstance(value, Tensor) and value.ndim > 0 and len(value) == num
                else value
                for name, value in (model_kwargs or {}).items()
            }
            for column, t in enumerate(reversed(model_timesteps)):
                index, stream = respaced.T - 1 - column, STREAM_TRAINING + t
                x_t, _ = q_sample_philox(
                    items, index, respaced, seed, stream, batch.first_sample, backend
                )
                model_t = torch.full((len(items),), t, dtype=torch.int64, device=x0.device)
                output = call_model(model, x_t, model_t, *arguments, **keywords)
                vb[batch.samples, column], xstart_mse[batch.samples, column] = (
                    values[batch.slots] for values in terms.at(index, items, x_t, output)
                )
                bar.update()
    return VariationalBound(
        timesteps=torch.tensor(model_timesteps[::-1], dtype=torch.int64, device="cpu"),
        prior_bpd=_bits(prior_kl(x0, respaced)),
        vb=vb,
        xstart_mse=xstart_mse,
        # x_t is the same in both, so the error of epsilon is a multiple of that of x_0.
        mse=xstart_mse * respaced.snr.flip(0).to(x0.device),
        dimensions=math.prod(x0.shape[1:]),
        decoder=decoder,
    )


def prior_kl(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return L_T = D_KL(q(x_T | x_0) || N(0, I)) of each element, in nats.

    Args:
        x0: Data, a floating-point tensor.
        schedule: Noise schedule.

    Returns:
        The divergence, float64 of the shape of `x0`.

    Raises:
        TypeError: An argument has another type.
    """
    checks.instance("schedule", schedule, NoiseSchedule)
    values = checks.floating("x0", x0).double()
    abar, one_minus_abar = (
        float(table[-1]) for table in (schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod)
    )
    # log1p keeps the digits of 1 - abar when abar is small, as it is at the end of a chain.
    log_one_minus_abar = math.log1p(-abar) if abar < 0.5 else math.log(one_minus_abar)
    return gaussian_kl(math.sqrt(abar) * values, log_one_minus_abar, 0.0, 0.0)


class _Terms:
    """Terms of the bound from model outputs."""

    def __init__(self, terms: BoundTerms, learned: bool, clip: Clip) -> None:
        self._terms, self._learned = terms, learned
        self._clip, self._threshold = clip_bound(clip), threshold_from_clip(clip)

    def at(self, index: int, x0: Tensor, x_t: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        """Return L_{t-1} in bits per dimension and the mean squared error of x_0, float64 [B]."""
        row = self._terms.row(index)
        out, learned_output = prediction_of(output, x0, self._learned)
        pred_x0 = row.x0(x_t, out)
        if self._threshold is not None:
            bound = dynamic_threshold(self._threshold, pred_x0)
            bound = bound.view(-1, *[1] * (x0.ndim - 1))
            pred_x0 = pred_x0.clamp(-bound, bound) / bound
        else:
            pred_x0 = pred_x0.clamp(-self._clip, self._clip)
        log_p = self._terms.log_variance(row, learned_output)
        if index > 0:
            term = row.divergence(x0, pred_x0, log_p)
        else:
            term = self._terms.decode(x0, pred_x0, log_p)
        return _bits(term), _mean((pred_x0 - x0).square())


def _checked_data(x0: Any, decoder: str) -> Tensor:
    hint = "; take pixels / 127.5 - 1 of 8-bit values" if decoder == "discretised" else ""
    if isinstance(x0, Tensor) and not x0.is_floating_point():
        raise TypeError(f"x0 must be float32 or float64; got {checks.dtype_name(x0.dtype)}{hint}")
    x0 = checks.batch("x0", x0, (torch.float32, torch.float64))
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(
            f"x0 must be [N, C, ...] with no empty dimension; got {checks.shape_text(x0)}"
        )
    low, high = (float(value) for value in x0.aminmax())
    if not math.isfinite(low + high):
        raise ValueError("x0 must be finite; got NaN or infinity")
    if decoder == "discretised" and (low < -1 or high > 1):
        raise ValueError(f"x0 must be in [-1, 1]; got values from {low:g} to {high:g}{hint}")
    return x0


def _mean(values: Tensor) -> Tensor:
    """Return the mean of each item, float64 [N]."""
    return values.flatten(1).mean(1, dtype=torch.float64)


def _bits(nats: Tensor) -> Tensor:
    """Return the mean of each item, converted from nats to bits."""
    return _mean(nats) / math.log(2)
