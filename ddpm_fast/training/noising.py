"""The noise of a training batch and the x_t made from it, counter-based or the caller's."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ddpm_fast.diffusion.forward import q_sample, q_sample_philox
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.ops.philox import STREAM_OFFSET, STREAM_TRAINING, philox_normal
from ddpm_fast.utils import checks


def noised(
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
    """x_t and the noise in it, its offset included; the arguments are those of training_losses."""
    strength = checks.real("offset_noise", offset_noise, 0, inf, "[)")
    place = (x0.device, backend)
    if noise is None:
        if seed is None:
            raise ValueError("seed must be given where noise is None, to make it; got None")
        if strength == 0:
            return q_sample_philox(x0, t, schedule, seed, stream, first_sample, backend)
        noise = philox_normal(len(x0), x0.shape[1:], seed, stream, first_sample, *place)
        noise = noise.to(x0.dtype)
    elif strength == 0:
        if seed is not None:
            raise ValueError(
                "seed must be None beside a noise, unless offset_noise is drawn with it; got"
                f" {seed!r} with an offset_noise of 0"
            )
        return q_sample(x0, t, noise, schedule, backend), noise
    checks.like("noise", noise, "x0", x0, (x0.dtype,))
    shape = x0.shape[:2]
    if seed is None:
        offset = torch.randn(shape, dtype=x0.dtype, device=x0.device)
    else:
        stream = checks.integer("stream", stream, STREAM_TRAINING, STREAM_OFFSET)
        stream += STREAM_OFFSET - STREAM_TRAINING
        offset = philox_normal(shape[0], shape[1:], seed, stream, first_sample, *place)
    offset = strength * offset.to(x0.dtype)
    noise = noise + offset.view(*shape, *[1] * (x0.ndim - 2))
    return q_sample(x0, t, noise, schedule, backend), noise
