"""The U-Net of Ho et al. 2020, that of Martinez Rojas' thesis, and their options."""

from ddpm_fast.models.thesis_unet import ThesisUNet
from ddpm_fast.models.thesis_unet_config import ThesisUNetConfig
from ddpm_fast.models.unet import UNet
from ddpm_fast.models.unet_config import UNetConfig

__all__ = ["ThesisUNet", "ThesisUNetConfig", "UNet", "UNetConfig"]
