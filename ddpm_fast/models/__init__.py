"""U-Nets of Ho et al. 2020 and of the thesis of Martinez Rojas 2023, and their configurations."""

from ddpm_fast.models.thesis_unet import ThesisUNet
from ddpm_fast.models.thesis_unet_config import ThesisUNetConfig
from ddpm_fast.models.unet import UNet
from ddpm_fast.models.unet_config import UNetConfig

__all__ = ["ThesisUNet", "ThesisUNetConfig", "UNet", "UNetConfig"]
