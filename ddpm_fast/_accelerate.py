"""Function `accelerate`, for a network or a pipeline of diffusers."""

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
    check_weights: bool = ...,
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
    check_weights: bool = ...,
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
    check_weights: bool = ...,
) -> FastDDPMPipeline | FastDDIMPipeline: ...


def accelerate(target: Any, scheduler: Any = None, **options: Any) -> Any:
    """Return an accelerated network or an accelerated pipeline of diffusers.

    An accelerated pipeline has the call, output types, progress bar and generators of the original,
    and samples the same images up to rounding. The original is not changed; network and scheduler
    are shared.

    Args:
        target: A `UNet` or UNet2DModel, or a DDPMPipeline or DDIMPipeline.
        scheduler: A scheduler for the network `target`: DDPMScheduler, DDIMScheduler,
            DPMSolverMultistepScheduler or UniPCMultistepScheduler, the last two of order 1 and 2.
            The result is then a pipeline. None: the result is an `AcceleratedUNet`, or for a
            pipeline a pipeline.
        **options: For a network, those of `AcceleratedUNet`. For a pipeline:

            - `dtype`: float16, bfloat16 or float32, in which the network computes. None: its own
              dtype; another one is an approximation.
            - `compat`: "diffusers": follow diffusers, including its known bugs. "corrected": follow
              the papers (see docs/diffusers.md). None: the option of a drop-in scheduler, else
              "diffusers".
            - `noise`: "generator": draw noise from torch generators in the order of diffusers.
              "philox": generate it in the kernel, so that image k of a call depends on the seed
              and k only.
            - `micro_batch`: With "philox", number of images that the network processes at once. It
              bounds memory, and the bits of an image do not depend on batch_size. None: all images
              of a call.
            - `tuner`: `Tuner` of the engine. None: one with its cache on disk.
            - `check_weights`: As for `AcceleratedUNet`: compare the weights before each run.

    Returns:
        An `AcceleratedUNet`, a `FastDDPMPipeline` or a `FastDDIMPipeline`.

    Raises:
        TypeError: `target`, `scheduler` or an option is of another type.
        ValueError: An option of the network, the scheduler or this function is not supported.
    """
    if scheduler is None and (isinstance(target, nn.Module) or not hasattr(target, "scheduler")):
        return AcceleratedUNet(target, **options)
    from ddpm_fast.diffusers.pipelines import accelerate_pipeline, pipeline_of

    if scheduler is not None and not isinstance(target, nn.Module):
        raise TypeError(
            f"target must be a UNet2DModel with a scheduler; got {type(target).__name__}"
        )
    pipe = target if scheduler is None else pipeline_of(target, scheduler)
    return accelerate_pipeline(pipe, **options)
