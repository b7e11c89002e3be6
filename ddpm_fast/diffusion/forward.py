"""The forward process q: one fused kernel for each function.

Each is one kernel in the backends cpu, triton and cuda, and plain PyTorch in reference. Inputs may
be contiguous, channels-last, sliced or expanded, with any number of dimensions. Arithmetic is in
float32 (float64 for float64 inputs). Index t is step t + 1 of the papers. A timestep out of range
raises ValueError on the CPU; on a GPU it is clamped, because a check would synchronise.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.philox import STREAM_TRAINING, philox_rng
from ddpm_fast.utils import checks


def q_sample(
    x0: Tensor, t: Tensor | int, noise: Tensor, schedule: NoiseSchedule, backend: str = "auto"
) -> Tensor:
    """Sample x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Eq. 4, Ho et al. 2020).

    Differentiable in `x0` and `noise`.

    Args:
        x0: Data [N, ...], float32, float16 or bfloat16 (float64 in reference and cpu).
        t: Timesteps in [0, T), int64 [N], or one int.
        noise: Noise, with the shape, dtype and device of `x0`.
        schedule: Noise schedule of T timesteps.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        x_t, with the dtype and strides of `x0`.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is out of range.
        RuntimeError: The backend cannot run.
    """
    x0 = checks.batch("x0", x0)
    noise = checks.like("noise", noise, "x0", x0, (x0.dtype,))
    t = checks.index("t", t, x0, checks.instance("schedule", schedule, NoiseSchedule).T)
    run = get_backend(backend, x0.device, x0.dtype)
    coefs = schedule.q_sample_coefs(x0.device, checks.compute_dtype(x0.dtype))
    return run.q_sample(x0, t, noise, coefs)


def q_sample_philox(
    x0: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    seed: int,
    stream: int = STREAM_TRAINING,
    first_sample: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample x_t with noise generated in the same kernel.

    The noise is `philox_normal(N, x0.shape[1:], seed, stream, first_sample)`, rounded to the dtype
    of `x0`. x_t is computed from the rounded noise, which is the training target. Differentiable in
    `x0`.

    Args:
        x0: Data [N, ...], as for `q_sample`.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32). Training uses streams from 2^31 on, the sampler those below.
        first_sample: Index of the first sample, in [0, 2^63).
        backend: As for `q_sample`.

    Returns:
        x_t and the noise, with the dtype of `x0`.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is out of range.
        RuntimeError: The backend cannot run.
    """
    x0 = checks.batch("x0", x0)
    t = checks.index("t", t, x0, checks.instance("schedule", schedule, NoiseSchedule).T)
    run = get_backend(backend, x0.device, x0.dtype)
    coefs = schedule.q_sample_coefs(x0.device, checks.compute_dtype(x0.dtype))
    return run.q_sample_philox(x0, t, coefs, philox_rng(seed, stream, first_sample, x0.device))


def q_posterior(
    x0: Tensor, x_t: Tensor, t: Tensor | int, schedule: NoiseSchedule, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (Eq. 6-7, Ho et al. 2020).

    The mean is differentiable in `x0` and `x_t`.

    Args:
        x0: Data [N, ...], with the shape, dtype and device of `x_t`.
        x_t: State [N, ...], as x0 of `q_sample`.
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.
        backend: As for `q_sample`.

    Returns:
        The mean, with the dtype and strides of `x_t`; variance and log-variance, float32 (float64
        for float64) [N, 1, ...]. At index 0 the variance is 0, and its logarithm that of 1e-20.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is out of range.
        RuntimeError: The backend cannot run.
    """
    x_t = checks.batch("x_t", x_t)
    x0 = checks.like("x0", x0, "x_t", x_t, (x_t.dtype,))
    t = checks.index("t", t, x_t, checks.instance("schedule", schedule, NoiseSchedule).T)
    run = get_backend(backend, x_t.device, x_t.dtype)
    coefs = schedule.q_posterior_coefs(x_t.device, checks.compute_dtype(x_t.dtype))
    return run.q_posterior(x0, x_t, t, coefs)
