"""The U-Net of Ho et al. 2020, that of Martinez Rojas' thesis, and their options."""

from ddpm_fast.unet.config import UNetConfig
from ddpm_fast.unet.model import UNet
from ddpm_fast.unet.thesis import ThesisUNet
from ddpm_fast.unet.thesis_config import ThesisUNetConfig

__all__ = ["ThesisUNet", "ThesisUNetConfig", "UNet", "UNetConfig"]
