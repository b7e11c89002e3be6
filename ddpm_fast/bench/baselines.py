"""The peers: other implementations of the same networks and chains, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ddpm_fast.models import UNet

# The module of each peer and the package that has it.
PACKAGES = {
    "diffusers": "diffusers",
    "denoising_diffusion_pytorch": "denoising-diffusion-pytorch",
}


class MissingError(RuntimeError):
    """A peer cannot be imported; the message says why and what to install."""


def module(name: str) -> Any:
    """A peer's module. Raises MissingError."""
    package = PACKAGES[name]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise MissingError(f"the package {package} cannot be imported ({reason})") from error
    except Exception as error:
        raise MissingError(f"the package {package} fails when it is imported: {error}") from error


def diffusers_unet(unet: UNet, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' UNet2DModel with the same options and weights. Raises MissingError."""
    model = module("diffusers").UNet2DModel(**unet.config.to_dict())
    model.load_state_dict(unet.state_dict())
    model = model.eval().to(device)
    return model if dtype == torch.float32 else model.to(dtype)


def diffusers_pipeline(unet: UNet, device: torch.device, dtype: torch.dtype) -> Any:
    """DDPMPipeline of that model with its default scheduler, silent. Raises MissingError."""
    diffusers = module("diffusers")
    model = diffusers_unet(unet, device, dtype)
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _silent(steps: Iterable[int], **options: Any) -> Iterable[int]:
    return steps


def lucidrains(channels: int, side: int, steps: int, device: torch.device) -> Any:
    """GaussianDiffusion with its own U-Net of width 64, in float32, silent. Raises MissingError."""
    package = module("denoising_diffusion_pytorch")
    # Its loop takes no option for its progress bar.
    setattr(importlib.import_module(package.GaussianDiffusion.__module__), "tqdm", _silent)  # noqa: B010
    unet = package.Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=channels)
    diffusion = package.GaussianDiffusion(unet, image_size=side, timesteps=steps)
    return diffusion.eval().to(device)
