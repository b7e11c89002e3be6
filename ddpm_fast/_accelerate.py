"""`accelerate`: the fast form of a network, or of a pipeline of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from ddpm_fast.engine import AcceleratedUNet, Tuner

if TYPE_CHECKING:
    from diffusers import DDIMPipeline, DDPMPipeline

    from ddpm_fast.diffusers.pipelines import FastDDIMPipeline, FastDDPMPipeline
    from ddpm_fast.diffusers.scheduler_options import Compat


@overload
def accelerate(
    target: nn.Module,
    *,
    dtype: torch.dtype | None = ...,
    num_timesteps: int | None = ...,
    tuner: Tuner | None = ...,
) -> AcceleratedUNet: ...


@overload
def accelerate(
    target: DDPMPipeline | DDIMPipeline,
    *,
    dtype: torch.dtype | None = ...,
    compat: Compat | None = ...,
    noise: Literal["generator", "philox"] = ...,
    micro_batch: int | None = ...,
    tuner: Tuner | None = ...,
) -> FastDDPMPipeline | FastDDIMPipeline: ...


@overload
def accelerate(
    target: nn.Module,
    scheduler: Any,
    *,
    dtype: torch.dtype | None = ...,
    compat: Compat | None = ...,
    noise: Literal["generator", "philox"] = ...,
    micro_batch: int | None = ...,
    tuner: Tuner | None = ...,
) -> FastDDPMPipeline | FastDDIMPipeline: ...


def accelerate(target: Any, scheduler: Any = None, **options: Any) -> Any:
    """The fastest thing that can run a network, or a pipeline of diffusers, called in its place.

    **A pipeline** (DDPMPipeline, DDIMPipeline, or a UNet2DModel and a scheduler: DDPMScheduler,
    DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler of order 1 and 2): a
    pipeline of the same call, output types, progress bar and generators, that draws the same images
    up to rounding. ``target`` is left as it is, and its network and scheduler are shared.

    dtype: what the network computes in; None is its own. Another one is an approximation.
    compat: "diffusers" follows the library, its slips included; "corrected" the papers (see
        docs/diffusers.md). None takes the scheduler's, if it has one, else "diffusers".
    noise: "generator" draws from torch generators in the library's order; "philox" makes it in the
        kernel, so that image k of a call depends on the seed and k alone.
    micro_batch: with "philox", how many images go through the network together, so that any number
        of images fits and an image has the same bits whatever the batch_size; None: all of a call.
    tuner: what times and keeps the choices of the engine; None makes one that keeps them on disk.

    **A network** (a `UNet` or UNet2DModel) alone: see `AcceleratedUNet`, whose options
    are dtype, num_timesteps and tuner, and whose dtype is float16 on a GPU unless given.

    Raises TypeError, ValueError naming the argument, or the option that is not supported.
    """
    if scheduler is None and (isinstance(target, nn.Module) or not hasattr(target, "scheduler")):
        return AcceleratedUNet(target, **options)
    from ddpm_fast.diffusers.pipelines import accelerate_pipeline, pipeline_of

    if scheduler is not None and not isinstance(target, nn.Module):
        raise TypeError(
            f"target must be a UNet2DModel where a scheduler is given; got {type(target).__name__}"
        )
    pipe = target if scheduler is None else pipeline_of(target, scheduler)
    return accelerate_pipeline(pipe, **options)
