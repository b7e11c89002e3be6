"""The variational bound on the negative log-likelihood, term by term, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_fast.diffusion import model_output as outputs
from ddpm_fast.diffusion.bound_terms import DECODERS, BoundTerms, Decoder
from ddpm_fast.diffusion.forward import q_sample_philox
from ddpm_fast.diffusion.gaussian import gaussian_kl
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import (
    Clip,
    clip_bound,
    dynamic_threshold,
    threshold_from_clip,
)
from ddpm_fast.diffusion.variance import LEARNED, First, Variance
from ddpm_fast.ops.philox import STREAM_TRAINING
from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import micro_batches


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """The terms of the bound of each data item, float64, in bits per dimension.

    The names are those of OpenAI's calc_bpd_loop, and so is the order of its columns: a column for
    each timestep that is kept, the last one of the chain first.

    timesteps: int64 [steps] on the CPU, descending.
    prior_bpd: [N]: L_T, the divergence of q(x_T | x_0) from N(0, I). No model changes it.
    vb: [N, steps]: L_{t-1}, the divergence of q(x_{t-1} | x_t, x_0) from p(x_{t-1} | x_t), at an
        x_t drawn once for each t; in the last column L_0 = -log p(x_0 | x_1).
    xstart_mse: [N, steps]: mean squared error of the x_0 that the model predicts, after clipping.
    mse: [N, steps]: mean squared error of the epsilon that this x_0 stands for.
    dimensions: how many numbers a data item has.
    decoder: the L_0: "discretised", a probability, or "gaussian", a density, which may exceed 1
        and make L_0 negative. The two are in different units: a density becomes the probability of
        a bin only times the bin's width, so that of 256 values takes log2(255/2) = 6.99 bits per
        dimension more.
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
        """[N]: the bound, L_T plus every L_{t-1} plus L_0."""
        return self.prior_bpd + self.vb.sum(1)

    @property
    def decoder_bpd(self) -> Tensor:
        """[N]: L_0."""
        return self.vb[:, -1]

    def in_nats(self, bpd: Tensor) -> Tensor:
        """Bits per dimension, any of the above, as nats of the whole data item."""
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
    log_variance: First = "repeat",
    seed: int = 0,
    first_sample: int = 0,
    micro_batch: int = 64,
    pad: bool = True,
    labels: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> VariationalBound:
    """An upper bound on -log p(x_0) of each data item (Eq. 5, Ho et al. 2020).

    -log p(x_0) <= E[L_T + sum of L_{t-1} + L_0], of which this is an unbiased estimate: every t is
    visited, with one x_t each. A forward pass of the model for each item and each timestep kept.

    model: any callable ``model(x_t, t)``, or ``model(x_t, t, labels)`` where labels are given: x_t
    [B, ...] in the dtype of x0, t int64 [B]; returns the prediction in any floating dtype, or an
    object whose ``.sample`` is it, with twice the channels for a learned variance (the prediction
    first). It must not write to x_t.
    x0: data, float32 or float64 [N, ...], on the model's device; for the discretised decoder one of
    256 values evenly spaced over [-1, 1], as ``pixels / 127.5 - 1`` gives them.
    prediction: what the model returns: "epsilon", "x0", "v" or "score". clip: the x_0 it stands for
    is clipped to [-clip, clip]; None leaves it, a `DynamicThreshold` thresholds it.
    variance, log_variance: of p(x_{t-1} | x_t) (`model_variance`).
    decoder: L_0. "discretised": the probability of x_0's bin (Eq. 13, Ho et al. 2020), with the
    variance of index 0. "gaussian": the density of x_0 with its constant (Section 3.2.4, Khungurn
    2022); the fixed variances take beta_1 there, as the notes do, the learned ones are the model's.
    steps, spacing: the timesteps kept, with betas rebuilt (`respace`); None takes all.
    seed, first_sample: item k gets the noise of sample first_sample + k of the seed, in stream
    STREAM_TRAINING + t: the same whatever the batch, device or steps.
    micro_batch, pad: how many items go through the model together. Padded, an item keeps its slot
    and with it the last bits of its terms whatever items are beside it; False saves the forwards.
    labels: [N, ...], for a conditional model, passed as `Sampler.sample` passes them. model_kwargs:
    further keywords of the model; a tensor [N, ...] is cut as x0 is, all else is passed on.
    progress: shows a bar, which never waits for the GPU.

    Raises TypeError or ValueError naming the argument, also for what the model returns.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
    checks.choice("decoder", decoder, DECODERS)
    x0 = _checked_data(x0, decoder)
    chain, kept = respace(schedule, steps, spacing)
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape[:1] != x0.shape[:1]):
        got = checks.shape_text(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor [{len(x0)}, ...]; got {got}")
    num, size = len(x0), checks.integer("micro_batch", micro_batch, 1, 1 << 31)
    checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END - num)
    rows = BoundTerms(chain, prediction, variance, decoder, log_variance, x0.device, x0.dtype)
    terms = _Terms(rows, variance in LEARNED, clip)
    vb, xstart_mse = (
        torch.empty(num, chain.T, dtype=torch.float64, device=x0.device) for _ in range(2)
    )
    batches = list(micro_batches(num, first_sample, size, pad))
    with tqdm(total=len(batches) * chain.T, desc="bound", unit="step", disable=not progress) as bar:
        for batch in batches:
            items = batch.take(x0, num)
            told_labels = () if labels is None else (batch.take(labels, num),)
            given = {
                name: batch.take(value, num)
                if isinstance(value, Tensor) and value.ndim > 0 and len(value) == num
                else value
                for name, value in (model_kwargs or {}).items()
            }
            for column, t in enumerate(reversed(kept)):
                index = chain.T - 1 - column
                x_t, _ = q_sample_philox(
                    items, index, chain, seed, STREAM_TRAINING + t, batch.first_sample, backend
                )
                told = torch.full((len(items),), t, dtype=torch.int64, device=x0.device)
                found = terms.at(index, items, x_t, model(x_t, told, *told_labels, **given))
                vb[batch.samples, column], xstart_mse[batch.samples, column] = (
                    values[batch.slots] for values in found
                )
                bar.update()
    return VariationalBound(
        timesteps=torch.tensor(kept[::-1], dtype=torch.int64, device="cpu"),
        prior_bpd=_bits(prior_kl(x0, chain)),
        vb=vb,
        xstart_mse=xstart_mse,
        # x_t is the same in both, so epsilon's error is a multiple of that of x_0.
        mse=xstart_mse * chain.snr.flip(0).to(x0.device),
        dimensions=math.prod(x0.shape[1:]),
        decoder=decoder,
    )


def prior_kl(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """L_T: D_KL(q(x_T | x_0) || N(0, I)) of each element in nats, float64 of the shape of x0.

    x0: a floating-point tensor. Raises TypeError for other arguments.
    """
    checks.instance("schedule", schedule, NoiseSchedule)
    values = checks.floating("x0", x0).double()
    abar, one_minus_abar = (
        float(table[-1]) for table in (schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod)
    )
    # The logarithm of 1 - abar keeps its digits where abar is small, as it is at a chain's end.
    log_one_minus_abar = math.log1p(-abar) if abar < 0.5 else math.log(one_minus_abar)
    return gaussian_kl(math.sqrt(abar) * values, log_one_minus_abar, 0.0, 0.0)


class _Terms:
    """What turns a model's output at a timestep into L_{t-1}, or L_0, of each item."""

    def __init__(self, terms: BoundTerms, learned: bool, clip: Clip) -> None:
        self._terms, self._learned = terms, learned
        self._clip, self._threshold = clip_bound(clip), threshold_from_clip(clip)

    def at(self, index: int, x0: Tensor, x_t: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        """L_{t-1} in bits per dimension and the mean squared error of x_0, float64 [B]."""
        row = self._terms.row(index)
        out, learned_output = outputs.prediction_of(output, x0, self._learned)
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
        raise ValueError(f"x0 must be [N, C, ...], none empty; got {checks.shape_text(x0)}")
    low, high = (float(value) for value in x0.aminmax())
    if not math.isfinite(low + high):
        raise ValueError("x0 must be finite; it holds NaN or infinities")
    if decoder == "discretised" and (low < -1 or high > 1):
        raise ValueError(f"x0 must lie in [-1, 1]; got values from {low:g} to {high:g}{hint}")
    return x0


def _mean(values: Tensor) -> Tensor:
    """The mean of each item, float64 [N]."""
    return values.flatten(1).mean(1, dtype=torch.float64)


def _bits(nats: Tensor) -> Tensor:
    """The mean of each item, from nats to bits."""
    return _mean(nats) / math.log(2)
