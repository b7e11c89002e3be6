"""U-Net of the master's thesis of Martinez Rojas (Hamburg, 2023), section 4.1."""

from __future__ import annotations

from itertools import pairwise
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
from ddpm_fast.models.thesis_unet_config import ThesisUNetConfig
from ddpm_fast.models.unet import Sinusoid
from ddpm_fast.models.unet_blocks import group_norm


class ThesisBlock(nn.Module):
    """Two 3x3 convolutions with embeddings of time and label between them, and a resampling."""

    def __init__(
        self, cfg: ThesisUNetConfig, in_channels: int, channels: int, resample: nn.Module
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm1 = _norm(cfg, channels)
        self.time = nn.Linear(cfg.time_embedding_dims, channels)
        self.label = None if cfg.num_classes is None else nn.Embedding(cfg.num_classes, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _norm(cfg, channels)
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, H/2, W/2] or [N, channels, 2H, 2W].

        Args:
            x: The input.
            time: Encoded timesteps [N or 1, time_embedding_dims].
            labels: int64 [N], or None without an embedding of labels.
        """
        emb = F.relu(self.time(time))
        if self.label is not None:
            emb = emb + self.label(labels)
        # Not in place: the gradient of ReLU reads its result.
        h = F.relu(group_norm(self.norm1, self.conv1(x)), inplace=True) + emb[:, :, None, None]
        h = F.relu(group_norm(self.norm2, self.conv2(h)), inplace=True)
        return self.resample(h)


class ThesisUNet(nn.Module):
    """Denoising U-Net of Martinez Rojas 2023, section 4.1; called and saved like a `UNet`.

    The thesis specifies a 3x3 convolution to the first of `sequence_channels`; a block that halves
    the resolution for each pair of neighbours in them; a block that doubles it for each pair in
    reverse, whose input is concatenated with the output of the encoder's block of its size (the
    innermost takes its input twice); and a 1x1 convolution back to the image. It describes a block
    as 3x3 convolutions with ReLU, a resampling, and time and labels as inputs.

    The code of the block is not in its listing. This implementation: convolution, norm, ReLU; plus
    the ReLU of a linear layer of the timestep's sinusoidal encoding (sines first, shift 1, as in
    Ho et al. 2020) and an embedding of the label; convolution, norm, ReLU; then a 4x4 convolution
    of stride 2, transposed in the decoder. The text has max pooling and a 2x2 up-convolution, but
    the listing concatenates images of equal size and crops none. The norm is GroupNorm. The running
    statistics of BatchNorm would differ between processes, would not be part of an average of
    weights, and would make the network behave differently in training and in sampling.

    A new network is on the default device, in float32 and channels_last memory.

    Args:
        config: The configuration.
        **options: Options of `ThesisUNetConfig`, instead of `config`.

    Attributes:
        config: The configuration.

    Raises:
        ValueError: An option is unknown, a value is not supported, or there are both a
            configuration and options.
    """

    def __init__(self, config: ThesisUNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        cfg = ThesisUNetConfig.from_config_or_options(config, options)
        self.config = cfg
        channels = cfg.sequence_channels

        self.time_embedding = Sinusoid(cfg.time_embedding_dims, cos_first=False, shift=1)
        self.downsampling = nn.ModuleList(
            ThesisBlock(cfg, wide, deep, nn.Conv2d(deep, deep, 4, stride=2, padding=1))
            for wide, deep in pairwise(channels)
        )
        self.upsampling = nn.ModuleList(
            ThesisBlock(cfg, 2 * deep, wide, nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1))
            for deep, wide in pairwise(reversed(channels))
        )
        self.conv1 = nn.Conv2d(cfg.img_channels, channels[0], 3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], cfg.img_channels, 1)
        self.to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv1.weight.device

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Return the network's output for noisy images.

        Args:
            x: Images [N, img_channels, H, W] on the device of the weights, of any floating-point
                dtype and layout. H and W are multiples of 2^(len(sequence_channels) - 1).
            t: Timesteps >= 0, from 0 on: int64 [N], or one for all images, 0-d or an int.
            class_labels: int64 [N] in [0, num_classes), for a network with labels.

        Returns:
            The output [N, img_channels, H, W], in the dtype of `x`, channels_last.

        Raises:
            ValueError: An argument has another shape, dtype or device, or labels are missing, not
                accepted, or out of range. Values are checked in CPU memory only.
        """
        check_images(x, self.config.img_channels, self.config.size_multiple, self.device)
        time = self.time_embedding(as_timesteps(x, t)).to(self.dtype)
        if self.config.num_classes is None:
            reject_labels(class_labels)
        else:
            check_label_range(check_labels(x, class_labels), self.config.num_classes)

        h = self.conv1(x.to(self.dtype, memory_format=torch.channels_last))
        skips = []
        for block in self.downsampling:
            h = block(h, time, class_labels)
            skips.append(h)
        for block in self.upsampling:
            h = block(torch.cat([h, skips.pop()], dim=1), time, class_labels)
        return self.conv2(h).to(x.dtype)


def _norm(cfg: ThesisUNetConfig, channels: int) -> nn.Module:
    return nn.Identity() if cfg.norm is None else nn.GroupNorm(cfg.norm_num_groups, channels)
