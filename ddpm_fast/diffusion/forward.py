"""The forward process: q_sample, q_sample_philox and q_posterior."""

from __future__ import annotations

from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.philox import STREAM_TRAINING, philox_rng
from ddpm_fast.utils import checks


def q_sample(
    x0: Tensor, t: Tensor | int, noise: Tensor, schedule: NoiseSchedule, backend: str = "auto"
) -> Tensor:
    """Noise x0 to step t: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Eq. 4, Ho et al. 2020).

    x0: [N, ...], float32, float16, bfloat16 (float64 in reference and cpu). t: int64 [N] or an
    int, in [0, T). noise: shape, dtype and device of x0. Returns x_t, the dtype and strides of x0.
    Differentiable in x0 and noise.

    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
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
    """`q_sample` with its noise made in the same kernel; returns (x_t, noise).

    The noise is that of `philox_normal(N, x0.shape[1:], seed, stream, first_sample)`, rounded to
    the dtype of x0; x_t is made from it as it is returned, because it is the training target.
    Streams from 2^31 on are for training; below, they are the sampler's. Differentiable in x0.

    Raises as `q_sample` and `philox_rng`.
    """
    x0 = checks.batch("x0", x0)
    t = checks.index("t", t, x0, checks.instance("schedule", schedule, NoiseSchedule).T)
    run = get_backend(backend, x0.device, x0.dtype)
    coefs = schedule.q_sample_coefs(x0.device, checks.compute_dtype(x0.dtype))
    return run.q_sample_philox(x0, t, coefs, philox_rng(seed, stream, first_sample, x0.device))


def q_posterior(
    x0: Tensor, x_t: Tensor, t: Tensor | int, schedule: NoiseSchedule, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (Eq. 6 and 7, Ho et al. 2020).

    x0, x_t: [N, ...] of one shape, dtype and device. t: int64 [N] or an int, in [0, T).
    Returns the mean with the dtype and strides of x_t, and variance and log-variance as float32
    (float64 for float64) [N, 1, ...]. At index 0 the variance is 0 and its logarithm that of
    1e-20. The mean is differentiable in x0 and x_t.

    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    x_t = checks.batch("x_t", x_t)
    x0 = checks.like("x0", x0, "x_t", x_t, (x_t.dtype,))
    t = checks.index("t", t, x_t, checks.instance("schedule", schedule, NoiseSchedule).T)
    run = get_backend(backend, x_t.device, x_t.dtype)
    coefs = schedule.q_posterior_coefs(x_t.device, checks.compute_dtype(x_t.dtype))
    return run.q_posterior(x0, x_t, t, coefs)
