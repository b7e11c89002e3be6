"""A network's weights on disk: the keys of its state dict, which for `UNet` are diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ddpm_fast.models.checkpoint.tensor_files import FLOATING, TensorFile, open_tensors
from ddpm_fast.models.checkpoint.weight_files import WeightFiles
from ddpm_fast.models.registry import KINDS, AnyUNet, kind_of

_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# As a 1x1 convolution it has two axes more.
_PROJECTION = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def current_key(key: str) -> str:
    """The name diffusers gives `key` now; attention layers of early releases had others."""
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.", key)


def read_weights(unet: AnyUNet, files: WeightFiles, device: torch.device) -> None:
    """Give a network on the meta device memory on `device`, and there the weights of `files`.

    They are cast to its dtype. Nothing is allocated before the files' headers fit the network.

    Raises:
        ValueError: a file that is damaged or of another kind, weights of another class of networks,
            keys missing, left over, given twice or not where the index has them, a shape or dtype
            that does not fit, weights that are not finite in the network's dtype; the message names
            file and key.
    """
    opened = {path: open_tensors(path) for path in files.paths}
    if files.index is not None:
        for path, file in opened.items():
            _check_shard(files.source, files.index, path, file)
    places = _match(unet, opened, files.source)
    unet.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in unet.state_dict().items():
            path, key = places[name]
            value = opened[path].read(key)
            parameter.copy_(value.reshape(parameter.shape))
            if not parameter.isfinite().all():
                cause = (
                    f"values {parameter.dtype} cannot hold"
                    if value.isfinite().all()
                    else "values that are not finite"
                )
                raise ValueError(f"{path}: {key} has {cause}")


def _check_shard(source: Path, index: Mapping[str, Path], path: Path, file: TensorFile) -> None:
    """That a file holds the keys that the index of shards places there, and no other."""
    held = set(file.keys())
    if lost := {key for key, home in index.items() if home == path} - held:
        raise ValueError(f"{path}: keys are missing that {source.name} places there: {_some(lost)}")
    if astray := sorted(key for key in held if index.get(key) != path):
        home = index.get(astray[0])
        place = f"in {home.name}" if home else "nowhere"
        raise ValueError(f"{path}: holds {astray[0]}, which {source.name} places {place}")


def _match(
    unet: AnyUNet, opened: Mapping[Path, TensorFile], source: Path
) -> dict[str, tuple[Path, str]]:
    """The file and the key of each of the network's weights, names, shapes and dtypes compared."""
    places: dict[str, tuple[Path, str]] = {}
    for path, file in opened.items():
        for key in file.keys():  # noqa: SIM118
            held = places.setdefault(current_key(key), (path, key))
            if held != (path, key):
                raise ValueError(f"{path}: {held[1]} and {key} are the same weight")
    kind = kind_of(unet)
    held_kind = next((other for other in KINDS if other.own_key in places), kind)
    if kind.own_key not in places and held_kind is not kind:
        raise ValueError(
            f"{source}: holds the weights of a {held_kind.name}; the config is a {kind.name}'s"
        )
    wanted = {name: list(value.shape) for name, value in unet.state_dict().items()}
    if missing := wanted.keys() - places.keys():
        raise ValueError(f"{source}: keys are missing: {_some(missing)}")
    if extra := places.keys() - wanted.keys():
        raise ValueError(f"{source}: keys the network does not have: {_some(extra)}")
    for name, shape in wanted.items():
        path, key = places[name]
        dtype, found = opened[path].describe(key)
        fitting = [shape, [*shape, 1, 1]] if _PROJECTION.search(name) else [shape]
        if found not in fitting or dtype not in FLOATING:
            accepted = f"{shape} in one of {', '.join(FLOATING)}"
            raise ValueError(f"{path}: {key} is {dtype} {found}, expected {accepted}")
    return places


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_weights(unet: AnyUNet, path: Path) -> None:
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
