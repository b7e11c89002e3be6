"""U-Net of Ho et al. 2020, App. B, with the options and state dict of UNet2DModel of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.models.inputs import (
    as_timesteps,
    check_images,
    check_label_range,
    check_labels,
    reject_labels,
)
from ddpm_fast.models.unet_blocks import (
    Attention,
    DownBlock,
    Downsample,
    MidBlock,
    ResnetBlock,
    UpBlock,
    Upsample,
    group_norm,
)
from ddpm_fast.models.unet_config import UNetConfig


def _frequencies(half: int, shift: int, device: torch.device) -> Tensor:
    """Return 10000^(-i / (half - shift)), float32 [half], computed on the CPU for equal bits."""
    index = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000) * index / (half - shift)).to(device)


class Sinusoid(nn.Module):
    """Sinusoidal encoding of a number (Vaswani et al. 2017), always in float32.

    Args:
        channels: Length of an encoding.
        cos_first: Cosines come before sines.
        shift: Frequencies are 10000^(-i / (channels // 2 - shift)).
    """

    frequencies: Tensor

    def __init__(self, channels: int, *, cos_first: bool, shift: int) -> None:
        super().__init__()
        self.channels = channels
        self.cos_first = cos_first
        self.shift = shift
        self._set_frequencies(torch.get_default_device())

    def _set_frequencies(self, device: torch.device) -> None:
        table = _frequencies(self.channels // 2, self.shift, device)
        self.register_buffer("frequencies", table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sinusoid:
        """Move to another device; the buffer stays float32 under half() or to(dtype)."""
        super()._apply(fn, recurse)
        self._set_frequencies(self.frequencies.device)
        return self

    def forward(self, value: Tensor) -> Tensor:
        """Encode numbers [N] of any real dtype as float32 [N, channels]; an odd last one is 0."""
        angle = value.float()[:, None] * self.frequencies
        parts = [angle.cos(), angle.sin()] if self.cos_first else [angle.sin(), angle.cos()]
        return F.pad(torch.cat(parts, dim=1), (0, self.channels % 2))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels] to [N, channels]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Denoising U-Net of Ho et al. 2020, App. B.

    State dicts are interchangeable with those of UNet2DModel of diffusers. A new network is on the
    default device, in float32 and channels_last memory.

    Args:
        config: The configuration.
        **options: Options of `UNetConfig`, instead of `config`.

    Attributes:
        config: The configuration.

    Raises:
        ValueError: An option is unknown, a value is not supported, or there are both a
            configuration and options.
    """

    def __init__(self, config: UNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        cfg = UNetConfig.from_config_or_options(config, options)
        self.config = cfg
        channels = cfg.block_out_channels

        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        self.time_proj = Sinusoid(channels[0], cos_first=cfg.flip_sin_to_cos, shift=cfg.freq_shift)
        self.time_embedding = EmbeddingMLP(channels[0], cfg.time_channels)
        self.class_embedding = _class_embedding(cfg)
        self.down_blocks = nn.ModuleList(_down_block(cfg, level) for level in range(len(channels)))
        self.up_blocks = nn.ModuleList(
            _up_block(cfg, level) for level in reversed(range(len(channels)))
        )
        self.mid_block = None if cfg.mid_block_type is None else _mid_block(cfg)
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, channels[0], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], cfg.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv_in.weight.device

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Return the network's output for noisy images.

        Args:
            x: Images [N, in_channels, H, W] on the device of the weights, of any floating-point
                dtype and layout. H and W are multiples of 2^(levels - 1).
            t: Timesteps >= 0, from 0 on: int64 [N], or one for all images, 0-d or an int.
            class_labels: Labels of a class-conditional network: int64 [N] in
                [0, num_class_embeds), real [N] for class_embed_type "timestep", or floating-point
                [N, time_channels] for "identity".

        Returns:
            The output [N, out_channels, H, W], in the dtype of `x`, channels_last.

        Raises:
            ValueError: An argument has another shape, dtype or device, or labels are missing, not
                accepted, or out of range. Values are checked in CPU memory only.
        """
        check_images(x, self.config.in_channels, self.config.size_multiple, self.device)
        emb = self.time_embedding(self.time_proj(as_timesteps(x, t)).to(self.dtype))
        if self.class_embedding is not None:
            emb = emb + self.embed_labels(self.class_embedding, x, class_labels)
        else:
            reject_labels(class_labels)

        h = x.to(self.dtype, memory_format=torch.channels_last)
        if self.config.center_input_sample:
            h = 2 * h - 1
        h = self.conv_in(h)
        skips = [h]
        for block in self.down_blocks:
            skips += block(h, emb)
            h = skips[-1]
        if self.mid_block is not None:
            h = self.mid_block(h, emb)
        for block in self.up_blocks:
            h = block(h, skips, emb)
        h = F.silu(group_norm(self.conv_norm_out, h), inplace=True)
        return self.conv_out(h).to(x.dtype)

    def embed_labels(self, embedding: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embeddings of labels, [N, time_channels].

        Args:
            embedding: A class embedding with the options of this network's.
            x: Images [N, C, H, W].
            labels: Labels as for `forward`.

        Raises:
            ValueError: Labels are missing or not accepted.
        """
        kind = self.config.class_embed_type
        accepted = {None: "int64", "timestep": "real", "identity": "floating"}[kind]
        channels = self.config.time_channels if kind == "identity" else None
        checked = check_labels(x, labels, accepted, channels)
        if kind == "timestep":
            return embedding(self.time_proj(checked).to(self.dtype))
        if isinstance(embedding, nn.Embedding):
            check_label_range(checked, embedding.num_embeddings)
        return embedding(checked).to(self.dtype)


def _class_embedding(cfg: UNetConfig) -> nn.Module | None:
    if cfg.class_embed_type == "timestep":
        return EmbeddingMLP(cfg.block_out_channels[0], cfg.time_channels)
    if cfg.class_embed_type == "identity":
        return nn.Identity()
    if cfg.num_class_embeds is not None:
        return nn.Embedding(cfg.num_class_embeds, cfg.time_channels)
    return None


def _resnet(cfg: UNetConfig, in_channels: int, out_channels: int, **options: Any) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        cfg.time_channels,
        groups=cfg.norm_num_groups,
        eps=cfg.norm_eps,
        dropout=cfg.dropout,
        scale_shift=cfg.resnet_time_scale_shift == "scale_shift",
        **options,
    )


def _attentions(cfg: UNetConfig, kind: str, channels: int, count: int) -> list[Attention]:
    if not kind.startswith("Attn"):
        return []
    return [
        Attention(channels, cfg.attention_head_dim, groups=cfg.norm_num_groups, eps=cfg.norm_eps)
        for _ in range(count)
    ]


def _resamples_by_resnet(kind: str, option: str) -> bool:
    """Return True where a residual block resamples: by option in attention blocks, else by name."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and option == "resnet")


def _down_block(cfg: UNetConfig, level: int) -> DownBlock:
    kind, widths = cfg.down_block_types[level], cfg.block_out_channels
    width = widths[level]
    inputs = [widths[max(level - 1, 0)]] + [width] * (cfg.layers_per_block - 1)
    downsampler: nn.Module | None = None
    if level < len(widths) - 1:
        if _resamples_by_resnet(kind, cfg.downsample_type):
            downsampler = _resnet(cfg, width, width, resample="down")
        else:
            downsampler = Downsample(width, cfg.downsample_padding)
    return DownBlock(
        [_resnet(cfg, channels, width) for channels in inputs],
        _attentions(cfg, kind, width, len(inputs)),
        downsampler,
    )


def _mid_block(cfg: UNetConfig) -> MidBlock:
    width, scale = cfg.block_out_channels[-1], cfg.mid_block_scale_factor
    groups = cfg.attn_norm_num_groups
    if groups is None and cfg.resnet_time_scale_shift == "default":
        groups = cfg.norm_num_groups
    attention = Attention(
        width, cfg.attention_head_dim, groups=groups, eps=cfg.norm_eps, output_scale=scale
    )
    return MidBlock(
        [_resnet(cfg, width, width, output_scale=scale) for _ in range(2)],
        [attention] if cfg.add_attention else [],
    )


def _up_block(cfg: UNetConfig, level: int) -> UpBlock:
    """Return the decoder block of a level, which concatenates the encoder's outputs, last first.

    The last of these is the input of the encoder's level, as wide as the level above.
    """
    widths, count = cfg.block_out_channels, cfg.layers_per_block + 1
    kind, width = cfg.up_block_types[len(widths) - 1 - level], widths[level]
    inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * (count - 1)
    skips = [width] * (count - 1) + [widths[max(level - 1, 0)]]
    upsampler: nn.Module | None = None
    if level > 0:
        if _resamples_by_resnet(kind, cfg.upsample_type):
            upsampler = _resnet(cfg, width, width, resample="up")
        else:
            upsampler = Upsample(width)
    return UpBlock(
        [
            _resnet(cfg, x_channels + skip, width)
            for x_channels, skip in zip(inputs, skips, strict=True)
        ],
        _attentions(cfg, kind, width, count),
        upsampler,
    )
