"""The U-Net's weights in a safetensors file, under diffusers' keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_fast.unet.config import UNetConfig
from ddpm_fast.unet.model import UNet

_FLOATING = ("F64", "F32", "F16", "BF16")
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_key(key: str) -> str:
    """The name diffusers gives `key` now; attention layers of early releases had others."""
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.", key)


def read_unet(config: UNetConfig, path: Path, dtype: torch.dtype, device: torch.device) -> UNet:
    """A `UNet` in eval mode with the weights of `path`, cast to `dtype`, on `device`.

    Nothing is allocated before the file's header fits the network.

    Raises:
        ValueError: not a safetensors file, keys missing or left over, a shape or dtype that does
            not fit, weights that are not finite in `dtype`; the message names file and key.
    """
    with torch.device("meta"):
        unet = UNet(config).to(dtype).eval()
    try:
        with safe_open(path, framework="pt") as file:
            keys = _match(unet, file, path)
            unet.to_empty(device=device)
            with torch.no_grad():
                for name, parameter in unet.state_dict().items():
                    value = file.get_tensor(keys[name])
                    parameter.copy_(value)
                    if not parameter.isfinite().all():
                        cause = (
                            f"values {dtype} cannot hold"
                            if value.isfinite().all()
                            else "values that are not finite"
                        )
                        raise ValueError(f"{path}: {keys[name]} has {cause}")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return unet


def _match(unet: UNet, file: safe_open, path: Path) -> dict[str, str]:
    """The file's key of each of the network's, after comparing names, shapes and dtypes."""
    keys: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118
        if keys.setdefault(current_key(key), key) != key:
            raise ValueError(f"{path}: {keys[current_key(key)]} and {key} are the same weight")
    wanted = {name: list(value.shape) for name, value in unet.state_dict().items()}
    if missing := wanted.keys() - keys.keys():
        raise ValueError(f"{path}: keys are missing: {_some(missing)}")
    if extra := keys.keys() - wanted.keys():
        raise ValueError(f"{path}: keys the network does not have: {_some(extra)}")
    for name, shape in wanted.items():
        found = file.get_slice(keys[name])
        if found.get_shape() != shape or found.get_dtype() not in _FLOATING:
            raise ValueError(
                f"{path}: {keys[name]} is {found.get_dtype()} {found.get_shape()}, "
                f"expected {shape} in one of {', '.join(_FLOATING)}"
            )
    return keys


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_weights(unet: UNet, path: Path) -> None:
    """Write the state dict as safetensors, contiguous, in the dtype it has.

    Raises:
        ValueError: a weight is not finite (the file would not load).
        OSError: the file cannot be written.
    """
    state = {
        name: value.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        for name, value in unet.state_dict().items()
    }
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"unet: {name} has values that are not finite")
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        raise OSError(int(code[1]) if code else None, str(error), str(path)) from error
