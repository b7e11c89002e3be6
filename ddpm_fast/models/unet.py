"""The U-Net of Ho et al. 2020 in the parameterisation of diffusers' UNet2DModel."""

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
    """[half] float32: 10000^(-i / (half - shift)), made on the CPU so every device has its bits."""
    index = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000) * index / (half - shift)).to(device)


class Sinusoid(nn.Module):
    """Sinusoidal position encoding of a number (Vaswani et al. 2017), always float32."""

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
        """Follows a move to another device, but stays float32 under half() or to(dtype)."""
        super()._apply(fn, recurse)
        self._set_frequencies(self.frequencies.device)
        return self

    def forward(self, value: Tensor) -> Tensor:
        """[N] of any real dtype -> [N, channels] float32; an odd last channel is 0."""
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
        """[N, in] -> [N, channels]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Denoising U-Net of Ho et al. 2020, App. B, with diffusers' options and parameter names.

    Built from a `UNetConfig` or from its options as keywords, on the default device in float32
    and in channels_last memory. State dicts interchange with diffusers' UNet2DModel.

    Raises:
        ValueError: an unknown option, or a value that is not supported.
    """

    def __init__(self, config: UNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and options:
            raise ValueError(f"UNet must get a config or options; got both ({', '.join(options)})")
        cfg = config if config is not None else UNetConfig.from_dict(options)
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
        """Dtype of the weights, in which the network computes."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv_in.weight.device

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """The network's prediction for noisy images `x` at 0-based timesteps `t`.

        Args:
            x: [N, in_channels, H, W], any floating dtype and layout, H and W multiples of
                2^(levels - 1), on the device of the weights.
            t: int64, [N] or a single value (0-d or a Python int) for the whole batch, >= 0.
            class_labels: for a class-conditional network only. int64 [N] in
                [0, num_class_embeds); any real [N] for class_embed_type "timestep"; floating
                [N, time channels] for "identity".

        Returns:
            [N, out_channels, H, W] in the dtype of `x`, channels_last.

        Raises:
            ValueError: an argument of another shape, dtype or device; labels missing, out of
                range (seen on the CPU only, elsewhere it would take a synchronisation), or given
                to a network that takes none.
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
        """[N, time channels]: checked labels through ``embedding``, a class embedding like its own.

        Raises ValueError as `forward` does.
        """
        kind = self.config.class_embed_type
        accepted = {None: "int64", "timestep": "real", "identity": "floating"}[kind]
        channels = self.config.time_channels if kind == "identity" else None
        given = check_labels(x, labels, accepted, channels)
        if kind == "timestep":
            return embedding(self.time_proj(given).to(self.dtype))
        if isinstance(embedding, nn.Embedding):
            check_label_range(given, embedding.num_embeddings)
        return embedding(given).to(self.dtype)


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
    """The option counts in attention blocks only; plain blocks say it in their name."""
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
    """The decoder at `level`, which takes the skips of the encoder there, the last one first.

    The last of them is the input of the encoder's level, as wide as the level above.
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
