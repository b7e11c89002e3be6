"""Methods add_noise and get_velocity of diffusers' schedulers, by the fused q_sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusers.fused_step import backend_for
from ddpm_fast.ops import get_backend
from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables


class ForwardScales(ImmutableTables):
    """Factors of image and noise at each timestep [T, 2].

    Args:
        alphas_cumprod: [T]. To equal diffusers, they have the dtype of the images: diffusers casts
            them before the square root, so that the first timesteps add no noise to float16 images.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        signal, noise = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
        scales = torch.stack([signal, noise], dim=1).double()
        velocity = torch.stack([scales[:, 0], -scales[:, 1]], dim=1)
        self._set_tables({"noisy": scales, "velocity": velocity}, ("noisy",))

    def prepare(self, device: torch.device | str | None) -> None:
        """Copy the factors to a device (None: the CPU) before their first use."""
        for table in ("noisy", "velocity"):
            self._on(table, device or "cpu", torch.float32)

    def noisy(self, images: Any, noise: Any, timesteps: Any) -> Tensor:
        """Return sqrt(abar) images + sqrt(1 - abar) noise (Eq. 4, Ho et al. 2020)."""
        return self._combined("noisy", "original_samples", images, "noise", noise, timesteps)

    def velocity(self, images: Any, noise: Any, timesteps: Any) -> Tensor:
        """Return sqrt(abar) noise - sqrt(1 - abar) images (Salimans & Ho 2022)."""
        return self._combined("velocity", "noise", noise, "sample", images, timesteps)

    def _combined(
        self, table: str, first: str, a: Any, second: str, b: Any, timesteps: Any
    ) -> Tensor:
        a, b = checks.batch(first, a), checks.batch(second, b)
        checks.same_device(second, b, first, a)
        if not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
            got = (
                checks.dtype_name(timesteps.dtype)
                if isinstance(timesteps, Tensor)
                else type(timesteps).__name__
            )
            raise TypeError(f"timesteps must be an integer tensor [N]; got {got}")
        t = timesteps.reshape(-1).to(a.device, torch.int64)
        a, b = _broadcast(first, a, second, b, len(t))
        t = checks.index("timesteps", t, a, len(self._tables[table]))
        coefs = self._on(table, a.device, checks.compute_dtype(a.dtype))
        backend = backend_for(a, b, backward=True)
        return get_backend(backend, a.device, a.dtype).q_sample(a, t, b, coefs)


def _broadcast(
    first: str, a: Tensor, second: str, b: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Broadcast two tensors to each other and to the timesteps, and promote their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape, (samples, *[1] * (a.ndim - 1)))
    except RuntimeError:
        raise ValueError(
            f"{first}, {second} and timesteps must broadcast; got {checks.shape_text(a)},"
            f" {checks.shape_text(b)} and {samples} timesteps"
        ) from None
    return a.expand(shape), b.expand(shape)
