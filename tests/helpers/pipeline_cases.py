"""Small pipelines of diffusers, accelerated without measurements."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch

import ddpm_fast
from ddpm_fast import Tuner, accelerate
from engine_cases import CPU

SHIPPED = Path(ddpm_fast.__file__).parent / "assets" / "triangles"
SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OFF = Tuner(CPU, mode="off")


def unet(**options) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**defaults | options).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddpm(scheduler=None, **options):
    return quiet(diffusers.DDPMPipeline(unet(**options), scheduler or diffusers.DDPMScheduler()))


def ddim(scheduler=None, **options):
    return quiet(diffusers.DDIMPipeline(unet(**options), scheduler or diffusers.DDIMScheduler()))


def fast(pipe, **options):
    return accelerate(pipe, tuner=OFF, **options)
