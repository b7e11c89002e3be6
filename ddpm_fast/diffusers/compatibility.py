"""Checks that a pipeline of diffusers can be accelerated: its network and its scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from ddpm_fast.diffusers.scheduler_options import (
    Compat,
    base_class,
    get_clip,
    has_learned_variance,
    reject_subclass,
)
from ddpm_fast.engine import AcceleratedUNet
from ddpm_fast.utils import checks

_PROCESSORS = (AttnProcessor, AttnProcessor2_0)  # two implementations of the same attention
_LIBRARIES = ("torch.nn.", "diffusers.models.")


def check_components(unet: Any, scheduler: Any, compat: Compat) -> None:
    """Check network and scheduler of a pipeline.

    Args:
        unet: Must be a UNet2DModel without hooks or modified parts, with a sample_size, and with
            the output channels that the scheduler expects. It may be compiled.
        scheduler: Must be a supported scheduler.
        compat: "diffusers" or "corrected".

    Raises:
        TypeError: `unet` or `scheduler` is of another class, or `unet` of another dtype.
        ValueError: A part of the network was modified, an option is not supported, or the network
            is in training mode with dropout.
    """
    network = unwrap(unet)
    kind = type(network)
    if kind is not UNet2DModel:
        raise TypeError(f"unet must be a UNet2DModel; got {kind.__name__}")
    if unet.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"unet must be float32, float16 or bfloat16; got {checks.dtype_name(unet.dtype)}"
        )
    check_modules(network)
    if network.training and network.config.dropout:
        raise ValueError("unet must be in eval mode, as it has dropout; call unet.eval() first")
    if network.config.sample_size is None:
        raise ValueError("unet must have a sample_size, the size of the images; got None")
    reject_subclass(scheduler)
    base_class(scheduler)
    get_clip(scheduler)
    learned = has_learned_variance(scheduler)
    channels, out = network.config.in_channels, network.config.out_channels
    expected = 2 * channels if learned else channels
    if out != expected:
        raise ValueError(
            f"unet must have {expected} output channels for {type(scheduler).__name__} with"
            f" {'a learned' if learned else 'no learned'} variance; got {out}"
        )
    if (
        learned
        and base_class(scheduler) is not DDPMScheduler
        and channels != 3
        and compat == "diffusers"
    ):
        raise ValueError(
            "unet must have 3 channels for a learned variance with compat='diffusers', because"
            f" diffusers keeps three channels of the output; got {channels}. Use"
            " compat='corrected'"
        )


def check_modules(network: nn.Module) -> None:
    """Check that no part of a network was modified.

    Raises:
        ValueError: A part has a hook, another forward, attention processor or class; the message
            names it.
    """
    for name, module in network.named_modules():
        if reason := _modification(module):
            part = f"unet.{name}" if name else "unet"
            raise ValueError(f"{part}: {reason}, which the engine would not run; remove it")


def _modification(module: nn.Module) -> str:
    """Describe a change of a module beyond its class and weights; empty for none."""
    own = vars(module)
    if any(own.get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return "has a forward hook"
    if "_hf_hook" in own or own.get("_diffusers_hook") is not None:
        return "has a hook of accelerate or diffusers (offloading)"
    if "forward" in own:
        return "has its own forward"
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor) not in _PROCESSORS:
        return f"has the attention processor {type(processor).__name__}"
    if not f"{type(module).__module__}.".startswith(_LIBRARIES):
        return f"is a {type(module).__name__} of {type(module).__module__}"
    return ""


def unwrap(unet: Any) -> Any:
    """Return the network inside a wrapper of torch.compile or an `AcceleratedUNet`."""
    network = getattr(unet, "_orig_mod", unet)
    return network.network if isinstance(network, AcceleratedUNet) else network
