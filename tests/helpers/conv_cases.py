"""Convolutions that the tests of every provider share, and their expected results."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.engine.specs import ConvSpec
from ddpm_fast.ops import reference

CPU = torch.device("cpu")


def spec(in_channels, out_channels, size=6, **options):
    """A 3x3 convolution of square images on the CPU, by default with bias alone."""
    height, width = size if isinstance(size, tuple) else (size, size)
    kernel = options.get("kernel", 3)
    defaults = {
        "batch": 3,
        "in_channels2": 0,
        "kernel": 3,
        "stride": 1,
        "padding": (1, 1, 1, 1) if kernel == 3 else (0, 0, 0, 0),
        "upsample": False,
        "bias": True,
        "residual": False,
        "dtype": torch.float32,
        "device": CPU,
    }
    fixed = {
        "height": height,
        "width": width,
        "in_channels": in_channels,
        "out_channels": out_channels,
    }
    return ConvSpec(**fixed, **(defaults | options))


SPECS = [
    pytest.param(spec(16, 16), id="same"),
    pytest.param(spec(16, 24, residual=True), id="residual"),
    pytest.param(spec(16, 16, bias=False, residual=True), id="residual-no-bias"),
    pytest.param(spec(16, 16, bias=False), id="no-bias"),
    pytest.param(spec(16, 16, size=8, stride=2), id="halved-even-padding"),
    pytest.param(spec(16, 16, size=8, stride=2, padding=(0, 1, 0, 1)), id="halved-right-bottom"),
    pytest.param(spec(8, 8, size=(7, 9), stride=2, padding=(0, 1, 0, 1)), id="halved-odd-sides"),
    pytest.param(spec(8, 8, padding=(2, 0, 1, 3)), id="uneven-padding"),
    pytest.param(spec(16, 8, kernel=1, in_channels2=8), id="pixelwise-two-sources"),
    pytest.param(
        spec(16, 8, kernel=1, in_channels2=24, bias=False, residual=True),
        id="pixelwise-two-sources-residual",
    ),
    pytest.param(spec(8, 8, in_channels2=16, residual=True), id="two-sources"),
    pytest.param(spec(32, 96, size=4, kernel=1), id="qkv"),
    pytest.param(spec(8, 16, kernel=1, stride=2, size=8), id="pixelwise-halved"),
    pytest.param(spec(16, 16, upsample=True), id="doubled"),
    pytest.param(spec(8, 16, upsample=True, residual=True, size=(5, 3)), id="doubled-odd-residual"),
    pytest.param(spec(3, 16, size=(5, 9)), id="three-channels-in-odd-sides"),
    pytest.param(spec(16, 3, size=(9, 5)), id="three-channels-out"),
    pytest.param(spec(1, 1, size=1), id="one-of-everything"),
    pytest.param(spec(13, 7, batch=1, residual=True), id="odd-channels-one-image"),
]


def weights(spec, seed=0):
    """Weight and bias, float32, for outputs with an rms near 1."""
    generator = torch.Generator().manual_seed(seed)
    channels = spec.in_channels + spec.in_channels2
    shape = (spec.out_channels, channels, spec.kernel, spec.kernel)
    weight = torch.randn(shape, generator=generator) / (channels * spec.kernel**2) ** 0.5
    return weight, torch.randn(spec.out_channels, generator=generator) if spec.bias else None


def inputs(spec, seed=1):
    """x, x2 and residual of a spec: normal random numbers, channels_last."""
    generator = torch.Generator().manual_seed(seed)

    def image(channels, height, width):
        values = torch.randn((spec.batch, height, width, channels), generator=generator)
        return values.to(spec.device, spec.dtype).permute(0, 3, 1, 2)

    x = image(spec.in_channels, spec.height, spec.width)
    x2 = image(spec.in_channels2, spec.height, spec.width) if spec.in_channels2 else None
    return x, x2, image(spec.out_channels, *spec.out_size) if spec.residual else None


def output(spec, fill=float("nan")):
    """Output filled with one value."""
    height, width = spec.out_size
    shape = (spec.batch, height, width, spec.out_channels)
    return torch.full(shape, fill, dtype=spec.dtype, device=spec.device).permute(0, 3, 1, 2)


def expected(spec, weight, bias, x, x2, residual, dtype=torch.float64):
    """Result of plain PyTorch in `dtype`, with the upsampled input as a copy."""
    x, x2, residual, weight, bias = (
        None if t is None else t.to(dtype) for t in (x, x2, residual, weight, bias)
    )
    if spec.upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    out = output(replace(spec, dtype=dtype))
    if dtype == torch.float64:
        reference.conv_(out, x, x2, weight, bias, residual, spec.stride, spec.padding)
        return out
    joined = x if x2 is None else torch.cat([x, x2], 1)
    y = F.conv2d(F.pad(joined, spec.padding), weight, bias, spec.stride)
    return y if residual is None else y + residual


def error(got, want):
    """Root mean square of the difference, relative to that of `want`."""
    want = want.double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
