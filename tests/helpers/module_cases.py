"""Small networks with the combinations of GroupNorm and SiLU, and their expected fusion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import backends
from ddpm_fast.engine.fuse_modules import modules as fused_modules

# Triton's interpreter runs the operator in its own tests; here it would take minutes.
ON = pytest.mark.parametrize(
    "on", [b for b in backends() if b.name != "triton" or b.device == "cuda"], ids=str
)


class Net(nn.Module):
    """Convolution, norm, and a use of its output that subclasses define."""

    def __init__(self, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8, **kwargs)
        self.act = nn.SiLU()
        self.flag = False

    def forward(self, x):
        return self.after(self.norm(self.conv(x)))

    def after(self, h):
        return self.act(h)


class InPlace(Net):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def after(self, h):
        self.act(h)
        return h * 2


class Functional(Net):
    def after(self, h):
        assert h.shape[1] == 8
        return F.silu(h.contiguous() if h.dim() != 4 else h)


class Other(Net):
    def after(self, h):
        return F.gelu(h)


class TwoUsers(Net):
    def after(self, h):
        return self.act(h) + h


class TwiceActivated(Net):
    def after(self, h):
        return self.act(h) + self.act(h)


class Returned(Net):
    def after(self, h):
        return {"activated": self.act(h), "norm": [h]}


class Stored(Net):
    def after(self, h):
        self.stored = h
        return self.act(h)


class Unused(Net):
    def forward(self, x):
        return self.act(F.group_norm(self.conv(x), 4, self.norm.weight, self.norm.bias))


class Flagged(Net):
    """Network with another path if the flag is set."""

    def after(self, h):
        return self.act(h + 1) if self.flag else self.act(h)


class Shared(Net):
    """One norm and one SiLU in two places."""

    def __init__(self):
        super().__init__()
        self.again = nn.ModuleList([self.norm, self.act])

    def after(self, h):
        return self.act(self.again[0](self.act(h)))


class SharedOnce(Shared):
    """One norm in two places, and a SiLU after one of them."""

    def after(self, h):
        return self.again[0](self.act(h))


class Indexed(nn.Module):
    """Network that indexes its Sequential, to modulate between norm and SiLU."""

    def __init__(self):
        super().__init__()
        self.layers = sequential()

    def forward(self, x):
        h = self.layers[1](self.layers[0](x))
        return self.layers[2:](h * 2)


class Block(nn.Module):
    """Two norms, one nn.SiLU for both, a time embedding and dropout, as in diffusers."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.time, self.dropout = nn.Linear(4, 8), nn.Dropout(0.5)
        self.nonlinearity = nn.SiLU()

    def forward(self, x, t):
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time(self.nonlinearity(t))[:, :, None, None]
        return x + self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)
    )


def scrambled(module, device="cpu", dtype=torch.float32):
    """Set evaluation mode and change the initial parameters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval().to(device, dtype)


def image(device="cpu", channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 6, 5, generator=generator).to(device, dtype)


def spy(monkeypatch):
    """Return a list that gets one entry for each run of the fused operator: True with SiLU."""
    entries = []
    find = fused_modules._kernel

    def spying(*key):
        kernel = find(*key)

        def run(*args):
            entries.append(args[-1])
            kernel(*args)

        return kernel and run

    monkeypatch.setattr(fused_modules, "_kernel", spying)
    return entries
