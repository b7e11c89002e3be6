"""Residual block, self-attention and resampling of the U-Net, channels_last throughout.

Activations are [N, C, H, W] in channels_last memory. The time embedding `emb` is [N, E], or [1, E]
where the whole batch shares a timestep. Attribute names are the keys of diffusers' UNet2DModel
state dicts, in its order, which optimizer states go by. Sums and SiLUs overwrite their own fresh
operand: on a CPU the pages of a new tensor cost more than the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` in channels_last memory, which GroupNorm does not keep on CUDA in torch 2.11."""
    return norm(x).contiguous(memory_format=torch.channels_last)


def upsample_nearest(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], every pixel repeated 2 x 2.

    One strided copy: F.interpolate loses channels_last on 1 x 1 maps, and on CUDA it fills
    channels_last outputs of more than 2^31 elements with zeros (pytorch#141831).
    """
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(n, h, 2, w, 2, c)
    # The reshape of a 1 x 1 map is a view with strides of 0, which convolutions take for NCHW.
    return pixels.reshape(n, 2 * h, 2 * w, c).contiguous().permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; padding 0 pads the right and bottom edge by one zero."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H/2, W/2]; `emb` is not used."""
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]; `emb` is not used."""
        return self.conv(upsample_nearest(x))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, dropout, conv, plus a shortcut (Ho et al., App. B).

    The time embedding is added before the second norm ("default"), or scales and shifts its
    output ("scale_shift", Dhariwal and Nichol 2021). `resample` "down" averages 2 x 2 pixels
    and "up" repeats them, between the first SiLU and convolution and on the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        *,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale: float = 1.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, in, H, W] and [N or 1, E] -> [N, out, H', W']."""
        h = F.silu(group_norm(self.norm1, x), inplace=True)
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = upsample_nearest(x), upsample_nearest(h)
        h = self.conv1(h)
        time = self.time_emb_proj(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = group_norm(self.norm2, h) * (1 + scale) + shift
        else:
            h = group_norm(self.norm2, h.add_(time))
        h = self.conv2(self.dropout(F.silu(h, inplace=True)))
        h = h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.output_scale == 1 else h / self.output_scale


class Attention(nn.Module):
    """Self-attention over the H*W pixels with a residual connection.

    `head_dim` None is one head of all channels; otherwise channels // head_dim heads. `groups`
    None leaves the input unnormalised.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int | None,
        *,
        groups: int | None,
        eps: float,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or channels
        self.output_scale = output_scale
        inner = channels // self.head_dim * self.head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        n, c, height, width = x.shape
        h = x if self.group_norm is None else group_norm(self.group_norm, x)
        tokens = h.permute(0, 2, 3, 1).reshape(n, height * width, c)
        q, k, v = (
            proj(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.to_q, self.to_k, self.to_v)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out[0](heads.transpose(1, 2).flatten(-2))
        out = out.reshape(n, height, width, c).permute(0, 3, 1, 2).add_(x)
        return out if self.output_scale == 1 else out / self.output_scale


class DownBlock(nn.Module):
    """Residual blocks, each with attention where there is any, then an optional halving."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[Attention],
        downsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The outputs of every residual step and of the halving, all skip inputs; last is x'."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
            outputs.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, emb)
            outputs.append(x)
        return outputs


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block at the smallest size."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Attention]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Residual blocks over the concatenated skips, attention where any, optional doubling."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[Attention],
        upsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Takes one skip off the end of `skips` for each residual block."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb)
        return x
