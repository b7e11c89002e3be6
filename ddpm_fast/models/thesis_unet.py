"""The U-Net of Martinez Rojas' master's thesis (Hamburg, 2023), section 4.1."""

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
    """Two 3x3 convolutions with time and label between them, and a halving or doubling."""

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
        """[N, in, H, W] -> [N, channels, H/2, W/2] or [N, channels, 2H, 2W].

        time: [N or 1, time_embedding_dims]. labels: int64 [N] for a block with an embedding.
        """
        emb = F.relu(self.time(time))
        if self.label is not None:
            emb = emb + self.label(labels)
        # The sum is a tensor of its own: the gradient of ReLU reads what ReLU returned.
        h = F.relu(group_norm(self.norm1, self.conv1(x)), inplace=True) + emb[:, :, None, None]
        h = F.relu(group_norm(self.norm2, self.conv2(h)), inplace=True)
        return self.resample(h)


class ThesisUNet(nn.Module):
    """Denoising U-Net of Martinez Rojas 2023, section 4.1, called and saved as `UNet` is.

    Built from a `ThesisUNetConfig` or from its options as keywords, on the default device in
    float32 and in channels_last memory.

    The thesis' are: a 3x3 convolution to the first of `sequence_channels`; a block that halves the
    image for each pair of neighbours in them; a block that doubles it for each pair in reverse,
    which takes its input beside the output of the block of its size on the way down (so that the
    innermost takes its input twice); a 1x1 convolution back to the image. Of a block its text says:
    3x3 convolutions with ReLU, a halving or doubling, time and labels given to each.

    Its listing leaves the block's code out. Filled in here, in the form that is usual: convolution,
    norm, ReLU; plus the ReLU of a linear layer of the timestep's sinusoidal encoding (sines first,
    shift 1, as Ho et al. 2020) and an embedding of the label; convolution, norm, ReLU; then a 4x4
    convolution of stride 2, transposed on the way up, where the text has max pooling and a 2x2
    up-convolution but the listing joins images of equal size and crops none. The norm is
    GroupNorm: the running statistics of BatchNorm, its usual companion, differ between ranks, are
    no parameters that an average of weights would follow, and make training and sampling two
    different networks.

    Raises:
        ValueError: an unknown option, or a value that is not supported.
    """

    def __init__(self, config: ThesisUNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and options:
            given = ", ".join(options)
            raise ValueError(f"ThesisUNet must get a config or options; got both ({given})")
        cfg = config if config is not None else ThesisUNetConfig.from_dict(options)
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
        """Dtype of the weights, in which the network computes."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv1.weight.device

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """The network's prediction for noisy images `x` at 0-based timesteps `t`.

        Args:
            x: [N, img_channels, H, W], any floating dtype and layout, H and W multiples of
                2^(len(sequence_channels) - 1), on the device of the weights.
            t: int64, [N] or a single value (0-d or a Python int) for the whole batch, >= 0.
            class_labels: for a network with num_classes only. int64 [N] in [0, num_classes).

        Returns:
            [N, img_channels, H, W] in the dtype of `x`, channels_last.

        Raises:
            ValueError: an argument of another shape, dtype or device; labels missing, out of
                range (seen on the CPU only, elsewhere it would take a synchronisation), or given
                to a network that takes none.
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
