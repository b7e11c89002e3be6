"""A small ThesisUNet, its inputs, and the listing in the thesis as a function of a state dict."""

import torch
import torch.nn.functional as F

from ddpm_fast import ThesisUNet
from unet_cases import scramble

TINY = {"sequence_channels": (8, 16), "sample_size": 8}
DEEPER = {"sequence_channels": (8, 12, 20), "img_channels": 2, "sample_size": None}


def thesis(seed=0, **options):
    torch.manual_seed(seed)
    return scramble(ThesisUNet(**TINY | options), seed).eval()


def inputs(config, num=3, size=None):
    generator = torch.Generator().manual_seed(1)
    side = config.size_multiple
    height, width = size or (2 * side, 3 * side)
    x = torch.randn(num, config.img_channels, height, width, generator=generator)
    t = torch.randint(0, 1000, (num,), generator=generator)
    labels = None
    if config.num_classes is not None:
        labels = torch.arange(num) % config.num_classes
    return x, t, labels


def listing(config, state, x, t, labels=None):
    """Compute section 4.1 line by line, with the block of `ThesisUNet`, in the dtype of x."""

    def norm(name, h):
        if config.norm is None:
            return h
        groups = config.norm_num_groups
        return F.group_norm(h, groups, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, h, padding):
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def block(name, h, down):
        h = F.relu(norm(f"{name}.norm1", conv(f"{name}.conv1", h, 1)))
        at = F.relu(F.linear(encoding, state[f"{name}.time.weight"], state[f"{name}.time.bias"]))
        h = h + at[:, :, None, None]
        if labels is not None:
            h = h + state[f"{name}.label.weight"][labels][:, :, None, None]
        h = F.relu(norm(f"{name}.norm2", conv(f"{name}.conv2", h, 1)))
        last = state[f"{name}.resample.weight"], state[f"{name}.resample.bias"]
        resample = F.conv2d if down else F.conv_transpose2d
        return resample(h, *last, stride=2, padding=1)

    half = config.time_embedding_dims // 2
    frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    angles = t.double()[:, None] * frequencies
    encoding = torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)
    levels = len(config.sequence_channels) - 1
    residuals = []
    o = conv("conv1", x, 1)
    for i in range(levels):
        o = block(f"downsampling.{i}", o, True)
        residuals.append(o)
    for i, res in zip(range(levels), reversed(residuals), strict=True):
        o = block(f"upsampling.{i}", torch.cat((o, res), dim=1), False)
    return conv("conv2", o, 0)
