"""Models in closed form and chains of public steps, for the tests of the sampler."""

from __future__ import annotations

from functools import cache

import torch

from cases import F32, SCHEDULE
from ddpm_fast import Sampler, StepTable, philox_normal, reverse_step_

SHAPE = (3, 6, 5)
SEED = (1 << 63) + 5
DDPM = StepTable.ddpm(SCHEDULE, 5)
DDIM = StepTable.ddim(SCHEDULE, 5)
RANDOM = StepTable.ddpm(SCHEDULE, 5, start="random")


class Net(torch.nn.Module):
    """Two convolutions and the timestep: the last bits depend on slot and batch size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.outer = torch.nn.Conv2d(8, 3, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x, t):
        phase = (t.to(x.dtype) / 100).view(-1, 1, 1, 1)
        return self.outer(torch.sin(self.inner(x) + phase))


@cache
def alphas_cumprod(device):
    return SCHEDULE.alphas_cumprod.to(device)


def smooth(x, t):
    """Return the epsilon of data N(0.2, 0.25) in closed form (Eq. 15, Ho et al. 2020)."""
    abar = alphas_cumprod(x.device)[t].view(-1, *[1] * (x.ndim - 1))
    off = x.double() - 0.2 * abar.sqrt()
    return ((1 - abar).sqrt() * off / (0.25 * abar + 1 - abar)).to(x.dtype)


def sampler(model=smooth, table=DDPM, micro_batch=4, on=None, **options):
    where = {"device": "cpu"} if on is None else {"device": on.device, "backend": on.name}
    if isinstance(model, torch.nn.Module):
        model = model.to(where["device"])
    return Sampler(model, table, SHAPE, micro_batch, **where, **options)


def draw(sampler, num=10, seed=SEED, **options):
    return sampler.sample(num, seed, progress=False, **options)


def chain(model, table, x, noise_of, dtype=F32, backend="auto"):
    """Return the states of a reverse chain, by the public reverse step alone."""
    states, model_input = [x.clone()], x.to(dtype)
    x = x.clone()
    for row, t in enumerate(table.timesteps.tolist()):
        out = model(model_input, torch.full(x.shape[:1], t, device=x.device))
        noise = noise_of(row) if table.uses_noise else None
        reverse_step_(x, out, table, row, noise=noise, model_input=model_input, backend=backend)
        states.append(x.clone())
    return torch.stack(states)


def philox_noise(num, first=0, on=None, dtype=F32):
    where = ("cpu", "auto") if on is None else (on.device, on.name)
    return lambda row: philox_normal(num, SHAPE, SEED, 1 + row, first, *where).to(dtype)
