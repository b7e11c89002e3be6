"""Blocks of the U-Net: residual block, self-attention and resampling.

Activations are [N, C, H, W] in channels_last memory. The time embedding `emb` is [N, E], or [1, E]
where all images share a timestep. Names and order of the attributes are those of the state dict of
UNet2DModel of diffusers; optimizer states depend on the order. Sums and SiLUs are computed in place
on temporary tensors: on a CPU, allocating a tensor takes longer than the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Return `norm(x)` in channels_last memory, which GroupNorm loses on CUDA in torch 2.11."""
    return norm(x).contiguous(memory_format=torch.channels_last)


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat every pixel 2 x 2: [N, C, H, W] to [N, C, 2H, 2W].

    This is one strided copy: F.interpolate loses channels_last on 1 x 1 maps, and on CUDA it fills
    channels_last outputs of more than 2^31 elements with zeros (pytorch#141831).
    """
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(n, h, 2, w, 2, c)
    # The reshape of a 1 x 1 map is a view with strides of 0, which convolutions treat as NCHW.
    return pixels.reshape(n, 2 * h, 2 * w, c).contiguous().permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """3x3 convolution of stride 2; padding 0 pads one zero at the right and the bottom."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H/2, W/2]; `emb` is not used."""
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, 2H, 2W]; `emb` is not used."""
        return self.conv(upsample_nearest(x))


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU, conv, time, norm, SiLU, dropout, conv (Ho et al. 2020, App. B).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_channels: Width of the time embedding.
        groups: Groups of both normalisations.
        eps: Epsilon of both normalisations.
        dropout: Dropout probability.
        scale_shift: Scale and shift the second normalisation by the time embedding (Dhariwal and
            Nichol 2021), instead of adding it before.
        output_scale: The sum of block and shortcut is divided by it.
        resample: "down" averages 2 x 2 pixels and "up" repeats them, after the first SiLU and on
            the shortcut. None: neither.
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
        """Map [N, in_channels, H, W] and embeddings [N or 1, E] to [N, out_channels, H', W']."""
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
    """Self-attention over the H * W pixels, with a residual connection.

    Args:
        channels: Channels of input and output.
        head_dim: Width of a head; there are channels // head_dim. None: one head of all channels.
        groups: Groups of the normalisation. None: no normalisation.
        eps: Epsilon of the normalisation.
        output_scale: The sum of attention and input is divided by it.
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
        """Map [N, C, H, W] to [N, C, H, W]."""
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
    """Level of the encoder: residual blocks, each with optional attention, and downsampling."""

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
        """Return the outputs that the decoder reads: of all residual steps and of downsampling."""
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
    """Middle block: residual block, optional attention, residual block."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Attention]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H, W]."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Level of the decoder: residual blocks, each with optional attention, and upsampling."""

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
        """Map `x` and outputs of the encoder, of which each residual block pops the last."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb)
        return x
