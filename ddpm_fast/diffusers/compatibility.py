"""What the parts of a pipeline must be for its chain to be known."""

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
from ddpm_fast.utils import checks

_PROCESSORS = (AttnProcessor, AttnProcessor2_0)  # the same attention, computed by other calls
_LIBRARIES = ("torch.nn.", "diffusers.models.")


def check_components(unet: Any, scheduler: Any, compat: Compat) -> None:
    """That the parts of a pipeline are what its chain is known for."""
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
        raise ValueError("unet is in training mode, with dropout; call unet.eval() first")
    if network.config.sample_size is None:
        raise ValueError("unet has no sample_size, the size of the images to draw")
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
            f"variance_type: diffusers keeps three channels of a learned output whatever they are,"
            f" and there are {channels}; take compat='corrected'"
        )


def check_modules(network: nn.Module) -> None:
    """That every part of a network does what its class does. Raises ValueError naming the part."""
    for name, module in network.named_modules():
        reason = _added_to(module)
        if reason:
            raise ValueError(
                f"unet.{name}: {reason}, which the engine would not run; remove it".replace(
                    "unet.:", "unet:"
                )
            )


def _added_to(module: nn.Module) -> str:
    """What was put on a module that its class and weights do not say; empty for nothing."""
    own = vars(module)
    if any(own.get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return "has a forward hook"
    if "_hf_hook" in own or own.get("_diffusers_hook") is not None:
        return "has a hook of accelerate or diffusers (offloading)"
    if "forward" in own:
        return "has a forward of its own"
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor) not in _PROCESSORS:
        return f"has the attention processor {type(processor).__name__}"
    if not f"{type(module).__module__}.".startswith(_LIBRARIES):
        return f"is a {type(module).__name__} of {type(module).__module__}"
    return ""


def fingerprint(network: nn.Module) -> tuple[float, ...]:
    """A number for each weight, which changes with it, however it was written to.

    Some ways of writing (``.data``, as diffusers' EMAModel) leave no trace but the values.
    """
    weights = [parameter.detach() for parameter in network.parameters()]
    return tuple(torch.stack(torch._foreach_norm(weights, 2, torch.float64)).tolist())


def unwrap(unet: Any) -> Any:
    """The network itself, where torch.compile has wrapped it."""
    return getattr(unet, "_orig_mod", unet)
