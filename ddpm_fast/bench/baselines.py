"""Baselines: other implementations of the same networks and chains, if installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ddpm_fast.models import UNet

# Module of each baseline and the package that provides it.
PACKAGES = {
    "diffusers": "diffusers",
    "denoising_diffusion_pytorch": "denoising-diffusion-pytorch",
}


class MissingError(RuntimeError):
    """A baseline cannot be imported; the message gives the reason and the package."""


def module(name: str) -> Any:
    """Import a baseline's module.

    Args:
        name: a key of `PACKAGES`.

    Raises:
        MissingError: the module cannot be imported.
    """
    package = PACKAGES[name]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise MissingError(f"the package {package} cannot be imported ({reason})") from error
    except Exception as error:
        raise MissingError(f"the package {package} fails when it is imported: {error}") from error


def diffusers_unet(unet: UNet, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' UNet2DModel with the options and weights of `unet`.

    Raises:
        MissingError: diffusers cannot be imported.
    """
    model = module("diffusers").UNet2DModel(**unet.config.to_dict())
    model.load_state_dict(unet.state_dict())
    model = model.eval().to(device)
    return model if dtype == torch.float32 else model.to(dtype)


def diffusers_pipeline(unet: UNet, device: torch.device, dtype: torch.dtype) -> Any:
    """Return diffusers' DDPMPipeline of that model and its default scheduler, without progress bar.

    Raises:
        MissingError: diffusers cannot be imported.
    """
    diffusers = module("diffusers")
    model = diffusers_unet(unet, device, dtype)
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _silent(steps: Iterable[int], **options: Any) -> Iterable[int]:
    return steps


def lucidrains(channels: int, side: int, steps: int, device: torch.device) -> Any:
    """Return lucidrains' GaussianDiffusion in float32 with its own U-Net of width 64.

    Args:
        channels: channels of the images.
        side: height and width of the images.
        steps: timesteps of the chain.
        device: the device.

    Raises:
        MissingError: denoising-diffusion-pytorch cannot be imported.
    """
    package = module("denoising_diffusion_pytorch")
    # Its sampling loop has no option that turns the progress bar off.
    setattr(importlib.import_module(package.GaussianDiffusion.__module__), "tqdm", _silent)  # noqa: B010
    unet = package.Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=channels)
    diffusion = package.GaussianDiffusion(unet, image_size=side, timesteps=steps)
    return diffusion.eval().to(device)
