"""The U-Net as a flat plan of fused operations over memory that is planned once."""

from ddpm_fast.engine.accelerated_unet import AcceleratedUNet
from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.unet_engine import UNetEngine

__all__ = ["AcceleratedUNet", "Tuner", "UNetEngine"]
