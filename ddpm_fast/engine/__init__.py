"""The U-Net as a flat plan of fused operations over memory that is planned once."""

from ddpm_fast.engine.accelerate import AcceleratedUNet, accelerate
from ddpm_fast.engine.engine import UNetEngine
from ddpm_fast.engine.tuning import Tuner

__all__ = ["AcceleratedUNet", "Tuner", "UNetEngine", "accelerate"]
