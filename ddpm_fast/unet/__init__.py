"""The U-Net of Ho et al. 2020 and its options."""

from ddpm_fast.unet.config import UNetConfig
from ddpm_fast.unet.model import UNet

__all__ = ["UNet", "UNetConfig"]
