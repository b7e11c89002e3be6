"""Parameterizations of a model: epsilon, x0, v and the score, and conversions between them.

With x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon: v = sqrt(abar) epsilon - sqrt(1 - abar) x_0
(Salimans & Ho 2022), and score = -epsilon / sqrt(1 - abar), the gradient of log q(x_t) in x_t
(Eq. 9, Khungurn 2022). Index t is step t + 1 of the papers. A timestep out of range raises
ValueError on the CPU; on a GPU it is clamped, because a check would synchronise.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_output import model_placement, model_tensor
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import capture_key
from ddpm_fast.utils.immutable import ImmutableTables

Prediction = Literal["epsilon", "x0", "v", "score"]
PREDICTIONS = ("epsilon", "x0", "v", "score")


def check_prediction(prediction: str, schedule: NoiseSchedule, name: str = "prediction") -> None:
    """Check that a model can predict this with a schedule.

    Args:
        prediction: Name of the prediction.
        schedule: Noise schedule.
        name: Name of the argument in messages.

    Raises:
        ValueError: The name is unknown, or alphas_cumprod ends at 0 and the prediction is epsilon
            or the score: x_T does not determine x_0 with them.
    """
    checks.choice(name, prediction, PREDICTIONS)
    if schedule.zero_terminal_snr and prediction in ("epsilon", "score"):
        raise ValueError(
            f"{name} must be 'x0' or 'v' for a schedule of zero terminal SNR, where"
            f" alphas_cumprod ends at 0; got {prediction!r}"
        )


def x0_factors(
    prediction: str, abar: Tensor, one_minus_abar: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return P and Q of x0 = P x_t + Q out (Eq. 15, Ho et al. 2020, for epsilon).

    Args:
        prediction: Kind of the model output.
        abar: alphas_cumprod, of any shape.
        one_minus_abar: 1 - abar.
        dtype: Dtype that the square roots are converted to. None: that of `abar`.

    Returns:
        P and Q, of the shape of `abar`.
    """
    signal, noise = (level.sqrt().to(dtype or level.dtype) for level in (abar, one_minus_abar))
    none = torch.zeros_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "score":
        return 1 / signal, one_minus_abar.to(signal.dtype) / signal
    return (none, none + 1) if prediction == "x0" else (signal, -noise)


def epsilon_factors(
    prediction: str, abar: Tensor, one_minus_abar: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the factors of x_t and out in epsilon; arguments as for `x0_factors`."""
    signal, noise = (level.sqrt().to(dtype or level.dtype) for level in (abar, one_minus_abar))
    none = torch.zeros_like(signal)
    if prediction == "epsilon":
        return none, none + 1
    if prediction == "score":
        return none, -noise
    return (1 / noise, -signal / noise) if prediction == "x0" else (noise, signal)


def x0_coefficients(
    schedule: NoiseSchedule, prediction: str, device: str | torch.device = "cpu"
) -> Tensor:
    """Return P and Q of x_0 = P x_t + Q out at each timestep, float64 [T, 2].

    Raises:
        ValueError: As `check_prediction`.
    """
    check_prediction(prediction, schedule)
    _, abar, one_minus_abar = schedule.levels(device, torch.float64).unbind(1)
    return torch.stack(x0_factors(prediction, abar, one_minus_abar), 1)


def prediction_target(
    prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Return the training target of a model.

    Args:
        prediction: Kind of the model output.
        x0: Data [N, ...].
        noise: Noise in x_t, of the shape of `x0`.
        t: Timesteps in [0, T), int64 [N].
        schedule: Noise schedule of T timesteps.

    Returns:
        The target, of the shape and dtype of `x0`.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    signal, sigma = _signal_and_noise(x0, t, schedule, x0.dtype)
    return signal * noise - sigma * x0 if prediction == "v" else -noise / sigma


def convert_prediction(
    out: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    source: Prediction,
    target: Prediction,
) -> Tensor:
    """Convert a prediction into one of another kind.

    Differentiable in `out` and `x_t`.

    Args:
        out: Prediction of kind `source`, floating-point [N, ...].
        x_t: Model input, of the shape of `out`.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.
        source: "epsilon", "x0", "v" or "score".
        target: "epsilon", "x0", "v" or "score".

    Returns:
        Prediction of kind `target`, float32 (float64 if `out` or `x_t` is): an x0 computed from
        half precision would overflow it.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or is out of range; or alphas_cumprod ends at 0,
            and epsilon or the score is converted.
    """
    x_t = checks.batch("x_t", x_t)
    out = checks.like("out", out, "x_t", x_t, checks.FLOATS)
    conversion = _Conversion(schedule, source, target)
    return conversion(out, x_t, checks.index("t", t, x_t, schedule.T))


class ConvertedModel:
    """A model with its prediction converted into one of another kind.

    Called as `model(x, t, *labels)`, it returns float32 (float64 if the model does).

    Args:
        model: Callable that returns a prediction of kind `source` with the shape of x, or with
            twice its channels, of which the second half, a learned variance, is passed through;
            or an object whose `sample` is that tensor.
        schedule: Noise schedule.
        source: "epsilon", "x0", "v" or "score".
        target: "epsilon", "x0", "v" or "score".

    Attributes:
        model: The model.
        device: Device of the model, or None.
        dtype: Dtype of the model, or None.

    Raises:
        TypeError: The model is not callable.
        ValueError: As `convert_prediction`.
    """

    def __init__(
        self, model: Any, schedule: NoiseSchedule, source: Prediction, target: Prediction
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
        self.model = model
        self._convert = _Conversion(schedule, source, target)
        self.device, self.dtype = model_placement(model)

    def __call__(self, x: Tensor, t: Tensor, *labels: Any, **options: Any) -> Tensor:
        """Return the converted prediction, of the shape of the model's output."""
        out = model_tensor(self.model(x, t, *labels, **options))
        channels = x.shape[1] if x.ndim > 1 else 0
        if channels and out.shape[1] == 2 * channels:
            mean, learned = out.split(channels, dim=1)
            mean = self._convert(mean, x, t)
            return torch.cat([mean, learned.to(mean.dtype)], dim=1)
        return self._convert(out, x, t)

    def captured_state(self) -> object:
        """Return the capture key of the model (`capture_key`)."""
        return capture_key(self.model)


class _Conversion(ImmutableTables):
    """Factors of out and x_t at each timestep, float64 [T, 2]."""

    def __init__(self, schedule: NoiseSchedule, source: str, target: str) -> None:
        checks.instance("schedule", schedule, NoiseSchedule)
        checks.choice("source", source, PREDICTIONS)
        checks.choice("target", target, PREDICTIONS)
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        x_coef, out_coef = torch.zeros_like(signal), torch.ones_like(signal)
        if source != target:
            check_prediction(source, schedule, "source")
            check_prediction(target, schedule, "target")
            levels = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
            x0, epsilon = x0_factors(source, *levels), epsilon_factors(source, *levels)
            x_coef, out_coef = {
                "x0": x0,
                "epsilon": epsilon,
                "score": [-factor / noise for factor in epsilon],
                "v": [signal * e - noise * x for x, e in zip(x0, epsilon, strict=True)],
            }[target]
        factors = torch.stack([out_coef, x_coef], dim=1)
        self._set_tables({"factors": factors}, ("factors",), source=source, target=target)

    def __call__(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        wide = torch.float64 in (out.dtype, x_t.dtype)
        dtype = torch.float64 if wide else torch.float32
        factors = self._on("factors", out.device, dtype)
        chosen = factors.index_select(0, t.clamp(0, len(factors) - 1))
        out_coef, x_coef = (chosen[:, i].view(-1, *[1] * (out.ndim - 1)) for i in (0, 1))
        return out_coef * out.to(dtype) + x_coef * x_t.to(dtype)


def tweedie(x_t: Tensor, score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """Return E[x_0 | x_t] = (x_t + (1 - abar_t) score) / sqrt(abar_t), by Tweedie's formula.

    Theorem 3, Khungurn 2022, with the forward process of Eq. 4, Ho et al. 2020. Differentiable.

    Args:
        x_t: State [N, ...], float32, float16, bfloat16 or float64.
        score: Score, with the shape, dtype and device of `x_t`.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.

    Returns:
        The mean, with the dtype of `x_t`; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device or is out of range; or abar_t is 0, if
            `t` is an int or on the CPU.
    """
    x_t = checks.batch("x_t", x_t)
    score = checks.like("score", score, "x_t", x_t, (x_t.dtype,))
    signal, noise = _checked_signal_and_noise(x_t, t, schedule)
    if schedule.zero_terminal_snr and _contains(t, schedule.T - 1):
        raise ValueError(
            f"t must be below {schedule.T - 1}, where alphas_cumprod is 0 and x_t does not depend"
            f" on x_0; got {schedule.T - 1}"
        )
    return ((x_t.to(noise.dtype) + noise.square() * score) / signal).to(x_t.dtype)


def score_from_noise(epsilon: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """Return the score -epsilon / sqrt(1 - abar_t) of a predicted noise (Eq. 9, Khungurn 2022).

    Differentiable.

    Args:
        epsilon: Predicted noise [N, ...], float32, float16, bfloat16 or float64.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.

    Returns:
        The score, with the dtype of `epsilon`; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is out of range.
    """
    epsilon = checks.batch("epsilon", epsilon)
    _, noise = _checked_signal_and_noise(epsilon, t, schedule)
    return (-epsilon / noise).to(epsilon.dtype)


def noise_from_score(score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """Return the noise -sqrt(1 - abar_t) score, the inverse of `score_from_noise`.

    Args:
        score: Score [N, ...], float32, float16, bfloat16 or float64.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.

    Returns:
        The noise, with the dtype of `score`; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is out of range.
    """
    score = checks.batch("score", score)
    _, noise = _checked_signal_and_noise(score, t, schedule)
    return (-noise * score).to(score.dtype)


def _checked_signal_and_noise(
    like: Tensor, t: Tensor | int, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    T = checks.instance("schedule", schedule, NoiseSchedule).T
    index = checks.index("t", t, like, T).clamp(0, T - 1)
    return _signal_and_noise(like, index, schedule, checks.compute_dtype(like.dtype))


def _signal_and_noise(
    like: Tensor, t: Tensor, schedule: NoiseSchedule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t) of each sample, [N, 1, ...]."""
    rows = schedule.q_sample_coefs(like.device, dtype).index_select(0, t)
    signal, noise = (row.view(-1, *[1] * (like.ndim - 1)) for row in rows.unbind(1))
    return signal, noise


def _contains(t: Tensor | int, value: int) -> bool:
    """Return True if `t` is known to contain a value without synchronising with a GPU."""
    if not isinstance(t, Tensor):
        return t == value
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and bool((t == value).any())
