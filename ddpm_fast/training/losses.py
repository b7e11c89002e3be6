"""Training objectives of denoising diffusion models, one loss for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion.bound_terms import DECODERS, BoundTerms, Decoder
from ddpm_fast.diffusion.forward import q_sample, q_sample_philox
from ddpm_fast.diffusion.model_call import call_model
from ddpm_fast.diffusion.model_output import prediction_of
from ddpm_fast.diffusion.parameterization import Prediction, check_prediction, prediction_target
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.variance import LEARNED, VARIANCES, Variance
from ddpm_fast.ops.philox import STREAM_OFFSET, STREAM_TRAINING, philox_normal
from ddpm_fast.training.loss_weights import Weighting, error_weight
from ddpm_fast.utils import checks

Objective = Literal["simple", "full", "hybrid", "score"]
OBJECTIVES = ("simple", "full", "hybrid", "score")


class TrainingLosses(NamedTuple):
    """The losses of a batch, one for each sample, in the dtype of x0.

    Attributes:
        loss: The loss to minimise, [N].
        mse: Mean squared error of the prediction over a sample's elements, unweighted, [N].
        vb: Term of the variational bound at t in bits per dimension, [N]: L_{t-1}, or L_0 at index
            0. None if the objective has no such term.
        x_t: Input of the model, [N, C, ...].
        noise: Noise in `x_t`, offset included, [N, C, ...].
        pred: Prediction of the model without a learned variance, [N, C, ...].
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None
    x_t: Tensor
    noise: Tensor
    pred: Tensor


def training_losses(
    model: Callable[..., Any],
    x0: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    objective: Objective = "simple",
    variance: Variance = "posterior",
    weighting: Weighting = None,
    gamma: float = 5.0,
    vb_weight: float = 0.001,
    offset_noise: float = 0.0,
    noise: Tensor | None = None,
    seed: int | None = None,
    first_sample: int = 0,
    stream: int = STREAM_TRAINING,
    labels: Tensor | int | None = None,
    decoder: Decoder = "discretised",
    backend: str = "auto",
) -> TrainingLosses:
    """Noise x0 to x_t, run the model, and return the losses; `.loss.mean().backward()` follows.

    The objectives, with means over a sample's elements:

    - "simple": ||target - prediction||^2, unweighted; for epsilon L_simple (Eq. 14, Ho et al.
      2020).
    - "score": denoising score matching, (1 - abar_t) ||score - grad log q(x_t | x_0)||^2 =
      ||noise + sqrt(1 - abar_t) score||^2 (Eq. 8, Khungurn 2022), with the score that the
      prediction implies. It equals L_simple of the implied epsilon for every prediction.
    - "full": L_{t-1} of the variational bound (L_0 at index 0) in bits per dimension, through mean
      and variance; x_0 is not clipped. Its sum over t plus `prior_kl` is `variational_bound` with
      clip=None; for t uniform in [0, T), T times its mean is an estimate of the sum.
    - "hybrid": mse + vb_weight T L_{t-1}, with the prediction detached in L_{t-1}, so that it
      trains the variance alone (Eq. 16, Nichol & Dhariwal 2021). For learned variances.

    Differentiable with respect to the model's parameters, x0 and noise. The arithmetic is in the
    dtype of x0, also under autocast; NaN stays NaN. Nothing synchronises with a GPU, where a t
    outside the schedule is clamped. Works under torch.compile with fullgraph=True.

    Args:
        model: A callable `model(x_t, t)`, or `model(x_t, t, labels)` if labels are given. It gets
            x_t in the shape and dtype of x0 and t as int64 [N], and returns the prediction
            [N, C, ...] in any floating dtype, or an object with it as `.sample`; for a learned
            variance [N, 2C, ...], the prediction first. It must not write to x_t.
        x0: Data on the model's device, float32 or float64 [N, C, ...].
        t: Timesteps in [0, T), int64 [N] or an int. Index t is step t + 1 of the papers.
        schedule: The noise schedule.
        prediction: Target of the model: "epsilon", "x0", "v" or "score".
        objective: See above.
        variance: Variance of p(x_{t-1} | x_t), as in `model_variance` with log_variance "repeat".
            Used by "full" and "hybrid"; a learned variance always needs 2C output channels.
        weighting: Weight of the squared error. "min_snr" (Hang et al. 2023): min(SNR, gamma) for
            x_0, min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v and
            (1 - abar_t) min(SNR, gamma) / SNR for the score, for "simple" and "score" alike. A
            tensor [T] on the device of x0 multiplies the weights of the objective. Must be None
            for "full". The variance term of "hybrid" is not weighted.
        gamma: gamma of "min_snr", above 0.
        vb_weight: lambda of "hybrid", at least 0, for L_{t-1} in bits per dimension.
        offset_noise: Strength of a normal added to the noise, one for each sample and channel
            (Guttenberg 2023); the target is the sum. It is generated with `seed` in the stream
            `stream + 2^30`, so `stream` must be in [2^31, 2^31 + 2^30); with given noise and no
            seed, by torch's generator.
        noise: Noise of the shape and dtype of x0. None: generated by `q_sample_philox` from
            (seed, stream, first_sample), the same for a sample in whatever batch it is.
        seed: Seed of generated noise, in [0, 2^64).
        first_sample: Index of the batch's first sample, in [0, 2^63).
        stream: Stream of the noise, in [2^31, 2^32). Use another one for each step.
        labels: Labels for a conditional model: an int or a tensor [N, ...].
        decoder: Decoder of L_0, as in `variational_bound`; "discretised" is for x0 in [-1, 1].
        backend: Backend of the fused updates.

    Returns:
        The losses of the batch.

    Raises:
        TypeError: An argument or the model's output has the wrong type or dtype.
        ValueError: An argument or the model's output is not accepted; also epsilon or score on a
            schedule of zero terminal SNR, "hybrid" with a fixed variance, and "full" with a
            weighting.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
    checks.instance("schedule", schedule, NoiseSchedule)
    check_prediction(prediction, schedule)
    checks.choice("objective", objective, OBJECTIVES)
    checks.choice("variance", variance, VARIANCES)
    checks.choice("decoder", decoder, DECODERS)
    vb_weight = checks.real("vb_weight", vb_weight, 0, math.inf, "[)")
    learned = variance in LEARNED
    if objective == "hybrid" and not learned:
        raise ValueError(
            f"variance must be one of {', '.join(LEARNED)} for the objective 'hybrid';"
            f" got {variance!r}"
        )
    if objective == "full" and weighting is not None:
        raise ValueError("weighting must be None for the objective 'full', which has its own")
    x0 = checks.batch("x0", x0, (torch.float32, torch.float64))
    if x0.ndim < 2:
        raise ValueError(f"x0 must be [N, C, ...]; got {checks.shape_text(x0)}")
    t = checks.index("t", t, x0, schedule.T)
    labels = checks.sample_labels(labels, len(x0), x0.device)
    inside = t.clamp(0, schedule.T - 1)
    weight = error_weight(objective, weighting, gamma, prediction, inside, schedule, x0.dtype)
    x_t, noise = _add_noise(
        x0, t, schedule, noise, seed, stream, first_sample, offset_noise, backend
    )
    output = call_model(model, x_t, t, *(() if labels is None else (labels,)))
    pred, learned_output = prediction_of(output, x0, learned)
    mse = _mean((pred - prediction_target(prediction, x0, noise, inside, schedule)).square())
    loss, vb = mse if weight is None else weight * mse, None
    if objective in ("full", "hybrid"):
        terms = BoundTerms(schedule, prediction, variance, decoder, "repeat", x0.device, x0.dtype)
        mean = pred if objective == "full" else pred.detach()
        vb = _mean(_bound_term(terms, inside, x0, x_t, mean, learned_output)) / math.log(2)
        loss = vb if objective == "full" else loss + vb_weight * schedule.T * vb
    return TrainingLosses(loss, mse, vb, x_t, noise, pred)


def _bound_term(
    terms: BoundTerms,
    t: Tensor,
    x0: Tensor,
    x_t: Tensor,
    pred: Tensor,
    learned_output: Tensor | None,
) -> Tensor:
    """Return L_{t-1}, or L_0 where t is 0, of each element in nats."""
    row = terms.rows(t, x0.ndim)
    pred_x0, log_p = row.x0(x_t, pred), terms.log_variance(row, learned_output)
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    divergence = row.divergence(x0, pred_x0, log_p)
    can_read = t.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_read and not first.any():
        return divergence
    # Where t > 0 the decoder gets its own mean: far from it the gradient would be NaN, which
    # torch.where does not mask.
    decoded = terms.decode(x0, torch.where(first, pred_x0, x0), torch.where(first, log_p, 0.0))
    return torch.where(first, decoded, divergence)


def _mean(values: Tensor) -> Tensor:
    """Return the mean over the elements of each sample, [N]."""
    return values.flatten(1).mean(1)


def _add_noise(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | None,
    seed: int | None,
    stream: int,
    first_sample: int,
    offset_noise: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return x_t and the noise in it, offset included; the arguments of `training_losses`."""
    strength = checks.real("offset_noise", offset_noise, 0, inf, "[)")
    if noise is None:
        if seed is None:
            raise ValueError("seed must be an integer in [0, 2^64) if noise is None; got None")
        if strength == 0:
            return q_sample_philox(x0, t, schedule, seed, stream, first_sample, backend)
        noise = philox_normal(len(x0), x0.shape[1:], seed, stream, first_sample, x0.device, backend)
        noise = noise.to(x0.dtype)
    elif strength == 0:
        if seed is not None:
            raise ValueError(
                f"seed must be None if noise is given and offset_noise is 0; got {seed!r}"
            )
        return q_sample(x0, t, noise, schedule, backend), noise
    checks.like("noise", noise, "x0", x0, (x0.dtype,))
    shape = x0.shape[:2]
    if seed is None:
        offset = torch.randn(shape, dtype=x0.dtype, device=x0.device)
    else:
        stream = checks.integer("stream", stream, STREAM_TRAINING, STREAM_OFFSET)
        stream += STREAM_OFFSET - STREAM_TRAINING
        offset = philox_normal(shape[0], shape[1:], seed, stream, first_sample, x0.device, backend)
    offset = strength * offset.to(x0.dtype)
    noise = noise + offset.view(*shape, *[1] * (x0.ndim - 2))
    return q_sample(x0, t, noise, schedule, backend), noise
