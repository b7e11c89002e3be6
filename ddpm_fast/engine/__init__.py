"""Compiled U-Net: fused operations in a flat plan, with memory planned in advance."""

from ddpm_fast.engine.accelerated_unet import AcceleratedUNet
from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.unet_engine import UNetEngine

__all__ = ["AcceleratedUNet", "Tuner", "UNetEngine"]
