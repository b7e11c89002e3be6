"""Exact, fast sampling of denoising diffusion models.

A sampler is a table of coefficients (`StepTable`). One fused kernel runs all samplers, in four
backends that are checked against plain PyTorch.
"""

from importlib import import_module
from types import ModuleType

from ddpm_fast._accelerate import accelerate
from ddpm_fast.diffusion.forward import q_posterior, q_sample, q_sample_philox
from ddpm_fast.diffusion.gaussian import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_kl_full,
    gaussian_log_density,
)
from ddpm_fast.diffusion.likelihood import VariationalBound, variational_bound
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.diffusion.parameterization import (
    ConvertedModel,
    convert_prediction,
    noise_from_score,
    score_from_noise,
    tweedie,
)
from ddpm_fast.diffusion.schedule import NoiseSchedule, ScheduleWarning
from ddpm_fast.diffusion.thresholding import DynamicThreshold
from ddpm_fast.diffusion.variance import model_variance
from ddpm_fast.engine import AcceleratedUNet, Tuner, UNetEngine
from ddpm_fast.engine.fuse_modules.optimize import OptimizeReport, optimize_module
from ddpm_fast.models import ThesisUNet, ThesisUNetConfig, UNet, UNetConfig
from ddpm_fast.models.checkpoint.checkpoint import Checkpoint, load, save
from ddpm_fast.ops import BACKENDS
from ddpm_fast.ops.functional import attention, group_norm
from ddpm_fast.ops.philox import philox_normal, philox_rng
from ddpm_fast.sampling.codec import Codec, image_to_image, slerp
from ddpm_fast.sampling.reverse_step import reverse_step_
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepMemory, StepTable
from ddpm_fast.training import TrainingLosses, training_losses
from ddpm_fast.training.loss_weights import objective_weights

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "AcceleratedUNet",
    "Checkpoint",
    "Codec",
    "ConvertedModel",
    "DynamicThreshold",
    "NoiseSchedule",
    "OptimizeReport",
    "Sampler",
    "ScheduleWarning",
    "StepMemory",
    "StepTable",
    "ThesisUNet",
    "ThesisUNetConfig",
    "TrainingLosses",
    "Tuner",
    "UNet",
    "UNetConfig",
    "UNetEngine",
    "VariationalBound",
    "accelerate",
    "attention",
    "convert_prediction",
    "discretised_gaussian_log_likelihood",
    "gaussian_kl",
    "gaussian_kl_full",
    "gaussian_log_density",
    "group_norm",
    "image_to_image",
    "load",
    "model_variance",
    "noise_from_score",
    "objective_weights",
    "optimize_module",
    "philox_normal",
    "philox_rng",
    "q_posterior",
    "q_sample",
    "q_sample_philox",
    "respace",
    "reverse_step_",
    "save",
    "score_from_noise",
    "slerp",
    "training_losses",
    "tweedie",
    "variational_bound",
]


def __getattr__(name: str) -> ModuleType:
    """Import `ddpm_fast.diffusers`, which needs diffusers, on first access."""
    if name == "diffusers":
        return import_module("ddpm_fast.diffusers")
    raise AttributeError(f"module 'ddpm_fast' has no attribute {name!r}")
