"""The training objectives of denoising diffusion models, a loss for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion.bound_terms import DECODERS, BoundTerms, Decoder
from ddpm_fast.diffusion.model_output import prediction_of
from ddpm_fast.diffusion.parameterization import Prediction, check_prediction, prediction_target
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.variance import LEARNED, VARIANCES, Variance
from ddpm_fast.ops.philox import STREAM_TRAINING
from ddpm_fast.training.noising import noised
from ddpm_fast.training.weights import Weighting, error_weight
from ddpm_fast.utils import checks

Objective = Literal["simple", "full", "hybrid", "score"]
OBJECTIVES = ("simple", "full", "hybrid", "score")


class TrainingLosses(NamedTuple):
    """What a batch costs, sample by sample, in the dtype of x0; the caller reduces it.

    loss: [N]: what is minimised.
    mse: [N]: squared error of the prediction in its own target, mean over dimensions, unweighted.
    vb: [N]: the term of the variational bound at t in bits per dimension (L_{t-1}; L_0 at index 0),
        or None where the objective has none.
    x_t, noise, pred: [N, C, ...]: what the model saw, the noise in it with its offset, and the
        model's prediction (without what a learned variance is made from).
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
    """Noise x0 to t, run the model, and take its loss: `.loss.mean().backward()` is left to do.

    model: any callable ``model(x_t, t)``, or ``model(x_t, t, labels)`` where labels are given: x_t
    of the shape and dtype of x0, t int64 [N]; returns the prediction in any floating dtype, or an
    object whose ``.sample`` is it, [N, C, ...], with 2C channels for a learned variance (the
    prediction first). It must not write to x_t.
    x0: data, float32 or float64 [N, C, ...], on the model's device. t: int64 [N] or an int, in
    [0, T); index t is step t + 1 of the papers.
    prediction: what the model returns, and is trained for: "epsilon", "x0", "v" or "score".

    objective, with means over a sample's dimensions:

    - "simple": ||target - prediction||^2, unweighted, in whatever is predicted; for an epsilon
      L_simple (Eq. 14, Ho et al. 2020).
    - "score": denoising score matching, (1 - abar_t) ||score - grad log q(x_t | x_0)||^2, which is
      ||noise + sqrt(1 - abar_t) score||^2 (Eq. 8, Khungurn 2022), with the score that the
      prediction stands for. Whatever is predicted, that is L_simple of its epsilon, the weighting
      that `objective_weights` calls simple.
    - "full": L_{t-1} of the variational bound (L_0 at index 0) in bits per dimension, through mean
      and variance; x_0 is not clipped. Its sum over t and `prior_kl` is what `variational_bound`
      with clip=None measures; for t uniform in [0, T), T times its mean is an estimate of the sum.
    - "hybrid": mse + vb_weight T L_{t-1}, with the prediction detached in L_{t-1}, so that it
      teaches the variance alone (Eq. 16, Nichol & Dhariwal 2021). T L_{t-1} is what a single t
      says of L_vlb; vb_weight is the paper's lambda, in the units of its code: bits per dimension.
      For learned variances.

    variance: of p(x_{t-1} | x_t), as in `model_variance` with log_variance "repeat"; decoder: L_0,
    as in `variational_bound`, whose discretised one is for x0 in [-1, 1]. Both matter to full and
    hybrid alone, but that a learned variance needs 2C channels.
    weighting: of the squared error. "min_snr" (Hang et al. 2023): min(SNR, gamma) of an x_0's
    error, min(SNR, gamma) / SNR of an epsilon's, min(SNR, gamma) / (SNR + 1) of a v's, and
    (1 - abar_t) min(SNR, gamma) / SNR of a score's; the same for simple and score, which differ by
    a weight. A tensor [T] on the device of x0 multiplies what the objective has. Not for "full",
    whose weights are those of the bound. The learned variance's term in "hybrid" is left alone.
    noise: of the shape and dtype of x0; or None, and made by `q_sample_philox` with (seed, stream,
    first_sample) as it makes x_t: sample k of the batch is sample first_sample + k of the seed,
    whatever batch it is in. Take another stream in [2^31, 2^32) for each step.
    offset_noise: strength of a normal added to the noise, one for each sample and channel
    (Guttenberg 2023); the target is the sum. It is the normal of element c of the same sample in
    stream + 2^30, so that streams must lie in [2^31, 2^31 + 2^30); beside a noise of the caller's
    and no seed, torch's generator draws it.
    labels: an int or [N, ...].

    Differentiable in the model's parameters and in x0 and noise. The arithmetic is in x0's dtype,
    also under autocast; NaN stays NaN. Nothing waits for a GPU, where a t outside the schedule is
    clamped. Works under torch.compile with fullgraph=True.

    Raises TypeError or ValueError naming the argument, also for what the model returns; ValueError
    for epsilon or score on a schedule of zero terminal SNR, for "hybrid" with a fixed variance, and
    for "full" with a weighting.
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
    told = checks.sample_labels(labels, len(x0), x0.device)
    inside = t.clamp(0, schedule.T - 1)
    weight = error_weight(objective, weighting, gamma, prediction, inside, schedule, x0.dtype)
    x_t, noise = noised(x0, t, schedule, noise, seed, stream, first_sample, offset_noise, backend)
    output = model(x_t, t) if told is None else model(x_t, t, told)
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
    """L_{t-1}, where t is 0 L_0, of each element in nats."""
    row = terms.rows(t, x0.ndim)
    pred_x0, log_p = row.x0(x_t, pred), terms.log_variance(row, learned_output)
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    divergence = row.divergence(x0, pred_x0, log_p)
    looked_at = t.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not first.any():
        return divergence
    # The decoder gets harmless values where it is not taken: far from its mean it has no digits
    # left, and would give back a gradient of NaN.
    decoded = terms.decode(x0, torch.where(first, pred_x0, x0), torch.where(first, log_p, 0.0))
    return torch.where(first, decoded, divergence)


def _mean(values: Tensor) -> Tensor:
    """The mean of each sample [N]."""
    return values.flatten(1).mean(1)
