"""What a network predicts, told as another prediction: epsilon, x0, v and the score.

All four say the same of x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon: v = sqrt(abar) epsilon -
sqrt(1 - abar) x_0 (Salimans & Ho 2022), score = -epsilon / sqrt(1 - abar) (Eq. 9, Khungurn 2022).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_output import model_tensor
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import capture_key
from ddpm_fast.utils.immutable import ImmutableTables


def convert_prediction(
    out: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    source: Prediction,
    target: Prediction,
) -> Tensor:
    """A network's output, a prediction of kind ``source``, as one of kind ``target``.

    out, x_t: [N, ...] of one shape, float; t: int64 [N] or an int, in [0, T), clamped on a GPU.
    Returns float32 (float64 where out or x_t is), like the arithmetic: an x0 made from a half
    overflows it. Differentiable in both.

    Raises TypeError or ValueError naming the argument; ValueError where alphas_cumprod ends at 0
    and epsilon or the score is converted from or to, of which x_t says nothing there.
    """
    x_t = checks.batch("x_t", x_t)
    out = checks.like("out", out, "x_t", x_t, checks.FLOATS)
    coefs = _Conversion(schedule, source, target)
    return coefs(out, x_t, checks.index("t", t, x_t, schedule.T))


class ConvertedModel:
    """A model of one kind as a model of another: ``model(x, t, *labels)``.

    model: returns a prediction of kind ``source``, of x's shape or, with a learned variance, of
    twice its channels, of which the second half passes as it is. It may return an object whose
    ``.sample`` is the tensor. What it returns is float32 (float64 where the model's is). device,
    dtype: the model's, where it has any.

    Raises as `convert_prediction`.
    """

    def __init__(
        self, model: Any, schedule: NoiseSchedule, source: Prediction, target: Prediction
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
        self.model = model
        self._convert = _Conversion(schedule, source, target)
        placed: Any = model
        if isinstance(model, torch.nn.Module):
            placed = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device, self.dtype = getattr(placed, "device", None), getattr(placed, "dtype", None)

    def __call__(self, x: Tensor, t: Tensor, *labels: Any, **options: Any) -> Tensor:
        """The converted prediction, of the shape of the model's output."""
        out = model_tensor(self.model(x, t, *labels, **options))
        channels = x.shape[1] if x.ndim > 1 else 0
        if channels and out.shape[1] == 2 * channels:
            mean, learned = out.split(channels, dim=1)
            mean = self._convert(mean, x, t)
            return torch.cat([mean, learned.to(mean.dtype)], dim=1)
        return self._convert(out, x, t)

    def captured_state(self) -> object:
        """What a CUDA graph of the model depends on (`Sampler`)."""
        return capture_key(self.model)


class _Conversion(ImmutableTables):
    """Factors of out and of x_t at each timestep, float64 [T, 2]."""

    def __init__(self, schedule: NoiseSchedule, source: str, target: str) -> None:
        checks.instance("schedule", schedule, NoiseSchedule)
        for name, kind in (("source", source), ("target", target)):
            checks.choice(name, kind, PREDICTIONS)
            ends_at_0 = float(schedule.alphas_cumprod[-1]) == 0 and source != target
            if ends_at_0 and kind in ("epsilon", "score"):
                raise ValueError(
                    f"{name} must be 'x0' or 'v' for a schedule of zero terminal SNR, where"
                    f" alphas_cumprod ends at 0; got {kind!r}"
                )
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        x_coef, out_coef = torch.zeros_like(signal), torch.ones_like(signal)
        if source != target:
            levels = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
            x0, epsilon = x0_factors(source, *levels), epsilon_factors(source, *levels)
            x_coef, out_coef = {
                "x0": x0,
                "epsilon": epsilon,
                "score": [-factor / noise for factor in epsilon],
                "v": [signal * e - noise * x for x, e in zip(x0, epsilon, strict=True)],
            }[target]
        factors = torch.stack([out_coef, x_coef], dim=1)
        self._freeze({"factors": factors}, ("factors",), source=source, target=target)

    def __call__(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        wide = torch.float64 in (out.dtype, x_t.dtype)
        arithmetic = torch.float64 if wide else torch.float32
        factors = self._on("factors", out.device, arithmetic)
        chosen = factors.index_select(0, t.clamp(0, len(factors) - 1))
        out_coef, x_coef = (chosen[:, i].view(-1, *[1] * (out.ndim - 1)) for i in (0, 1))
        return out_coef * out.to(arithmetic) + x_coef * x_t.to(arithmetic)


def tweedie(x_t: Tensor, score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """E[x_0 | x_t] = (x_t + (1 - abar_t) score) / sqrt(abar_t), Tweedie's formula for x_t.

    Theorem 3 of Khungurn 2022 with the forward process of Eq. 4, Ho et al. 2020. x_t, score:
    [N, ...] of one shape, dtype and device. t: int64 [N] or an int, in [0, T). Differentiable.

    Raises TypeError or ValueError naming the argument, also for a t with abar_t = 0 that is an int
    or on the CPU: that x_t says nothing about x_0.
    """
    x_t = checks.batch("x_t", x_t)
    score = checks.like("score", score, "x_t", x_t, (x_t.dtype,))
    signal, noise = _signal_and_noise(x_t, schedule, t)
    if schedule.alphas_cumprod[-1] == 0 and _reaches(t, schedule.T - 1):
        raise ValueError(
            f"t must be below {schedule.T - 1}, where alphas_cumprod is 0 and x_t holds nothing of"
            f" x_0; got {schedule.T - 1}"
        )
    return ((x_t.to(noise.dtype) + noise.square() * score) / signal).to(x_t.dtype)


def score_from_noise(epsilon: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The score -epsilon / sqrt(1 - abar_t) of a predicted noise (Eq. 9, Khungurn 2022).

    epsilon: [N, ...]. t: int64 [N] or an int, in [0, T). Differentiable.

    Raises TypeError or ValueError naming the argument.
    """
    epsilon = checks.batch("epsilon", epsilon)
    _, noise = _signal_and_noise(epsilon, schedule, t)
    return (-epsilon / noise).to(epsilon.dtype)


def noise_from_score(score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The noise -sqrt(1 - abar_t) score, the inverse of `score_from_noise`; errors are the same."""
    score = checks.batch("score", score)
    _, noise = _signal_and_noise(score, schedule, t)
    return (-noise * score).to(score.dtype)


def _signal_and_noise(
    like: Tensor, schedule: NoiseSchedule, t: Tensor | int
) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) of each sample, [N, 1, ...], where the arithmetic is."""
    T = checks.instance("schedule", schedule, NoiseSchedule).T
    index = checks.index("t", t, like, T).clamp(0, T - 1)
    table = schedule.q_sample_coefs(like.device, checks.compute_dtype(like.dtype))
    chosen = table.index_select(0, index).view(-1, 2, *[1] * (like.ndim - 1))
    return chosen[:, 0], chosen[:, 1]


def _reaches(t: Tensor | int, last: int) -> bool:
    """Whether a t that can be looked at without waiting has that value."""
    if not isinstance(t, Tensor):
        return t == last
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and bool((t == last).any())


Prediction = Literal["epsilon", "x0", "v", "score"]


PREDICTIONS = ("epsilon", "x0", "v", "score")


def check_prediction(prediction: str, schedule: NoiseSchedule) -> None:
    """That a network can predict this under a schedule: an x_t without signal tells no x_0."""
    checks.choice("prediction", prediction, PREDICTIONS)
    if schedule.zero_terminal_snr and prediction in ("epsilon", "score"):
        raise ValueError(
            "prediction must be 'x0' or 'v' for a schedule of zero terminal SNR, where "
            f"alphas_cumprod ends at 0; got {prediction!r}"
        )


def x0_factors(prediction: str, abar: Tensor, one_minus_abar: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q of x0 = P x_t + Q out, from abar and one_minus_abar = 1 - abar, all of one shape."""
    signal, noise, none = abar.sqrt(), one_minus_abar.sqrt(), torch.zeros_like(abar)
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "score":
        return 1 / signal, one_minus_abar / signal
    return (none, none + 1) if prediction == "x0" else (signal, -noise)


def epsilon_factors(prediction: str, abar: Tensor, one_minus_abar: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x_t and out in the epsilon that out stands for; arguments as of x0_factors."""
    signal, noise, none = abar.sqrt(), one_minus_abar.sqrt(), torch.zeros_like(abar)
    if prediction == "epsilon":
        return none, none + 1
    if prediction == "score":
        return none, -noise
    return (1 / noise, -signal / noise) if prediction == "x0" else (noise, signal)
