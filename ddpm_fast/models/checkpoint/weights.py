"""Weights of a network on disk: files under the names of diffusers, with the keys of a state dict.

diffusion_pytorch_model[.variant].safetensors
diffusion_pytorch_model.safetensors.index[.variant].json, and the shards that it lists
diffusion_pytorch_model[.variant].bin
diffusion_pytorch_model.bin.index[.variant].json, and the shards that it lists
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpm_fast.models.checkpoint.keys import current_key, find_prefix, removed_text
from ddpm_fast.models.registry import NETWORK_KINDS, AnyUNet, network_kind
from ddpm_fast.utils.files import read_json

FORMATS = ("safetensors", "bin")

_STEM = "diffusion_pytorch_model"
_SHARD = "-{0}-of-{0}".format("[0-9]" * 5)
_RESERVED = {*FORMATS, "index", "json"}

# Names of dtypes in safetensors files.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_FLOATING = tuple(_DTYPES.values())

# Stored as a 1x1 convolution, it has two more dimensions.
_PROJECTION = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


@dataclass(frozen=True)
class WeightFiles:
    """Files of the weights of a network.

    Attributes:
        source: The single file, or the index of the shards.
        paths: The file or the shards.
        index: Shard of each key; None for a single file.
    """

    source: Path
    paths: tuple[Path, ...]
    index: Mapping[str, Path] | None = None


def check_variant(variant: str | None) -> None:
    """Raise ValueError unless `variant` is None or a name such as "fp16"."""
    if variant is None:
        return
    plain = isinstance(variant, str) and re.fullmatch("[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*", variant)
    if not plain or variant in _RESERVED:
        accepted = "None or a plain name such as 'fp16' (letters, digits, _ and - between them)"
        raise ValueError(f"variant must be {accepted}; got {variant!r}")


def _suffix(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"


def single_name(variant: str | None, kind: str = "safetensors") -> str:
    """Return the name of a file of all weights, in a format of `FORMATS`."""
    return f"{_STEM}{_suffix(variant)}.{kind}"


def _index_names(variant: str | None, kind: str) -> tuple[str, ...]:
    """Return the name of an index of shards, and for a variant its name in older releases."""
    name = f"{_STEM}.{kind}.index{_suffix(variant)}.json"
    return (name,) if variant is None else (name, f"{_STEM}.{kind}.{variant}.index.json")


def patterns(variant: str | None, kind: str) -> tuple[str, ...]:
    """Return glob patterns of all files that weights of a variant and format can consist of."""
    shard = f"{_STEM}{_suffix(variant)}{_SHARD}.{kind}"
    old = () if variant is None else (f"{_STEM}{_SHARD}.{variant}.{kind}",)
    return (single_name(variant, kind), *_index_names(variant, kind), shard, *old)


def is_weights(name: str, variant: str | None, kinds: tuple[str, ...] = FORMATS) -> bool:
    """Return True for the name of a file of weights of this variant and of one of the formats."""
    return any(fnmatchcase(name, glob) for kind in kinds for glob in patterns(variant, kind))


def find_weights(folder: Path, variant: str | None) -> WeightFiles:
    """Find the weights in a folder, in the order of diffusers.

    safetensors files precede .bin files, and of each format an index of shards a single file.

    Raises:
        FileNotFoundError: There are no weights of this variant, or a shard is missing.
        ValueError: An index is not valid, or refers to a file outside the folder.
    """
    for kind in FORMATS:
        for name in _index_names(variant, kind):
            if (folder / name).is_file():
                return _read_index(folder / name, kind)
        single = folder / single_name(variant, kind)
        if single.is_file():
            return WeightFiles(single, (single,))
    _raise_missing(folder, variant)


def _raise_missing(folder: Path, variant: str | None) -> NoReturn:
    names = {path.name for path in folder.iterdir() if path.is_file()}
    endings = (name.removeprefix(_STEM) for name in names if name.startswith(_STEM))
    parts = ({*re.sub(_SHARD, "", ending).split(".")} - _RESERVED - {""} for ending in endings)
    variants = (next(iter(part), None) for part in parts)
    found = sorted({"without a variant" if v is None else f"variant={v!r}" for v in variants})
    others = sorted(name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".pkl")))
    reason = "checkpoint weights are missing" + ("" if variant is None else f", {variant=}")
    if found:
        reason += f"; there are weights {', '.join(found)}"
    elif others:
        reason += f"; {', '.join(others)} has another format"
    raise FileNotFoundError(errno.ENOENT, reason, str(folder / single_name(variant)))


def _read_index(path: Path, kind: str) -> WeightFiles:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: weight_map must be an object of keys and files")
    for name in names.values():
        if not isinstance(name, str) or re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise ValueError(f"{path}: {name!r} must be the name of a file in the same folder")
        if not name.endswith(f".{kind}"):
            raise ValueError(f"{path}: {name!r} must be a .{kind} file")
    index = {key: path.with_name(name) for key, name in names.items()}
    shards = tuple(sorted(set(index.values())))
    for shard in shards:
        if not shard.is_file():
            reason = f"a file of weights that {path.name} lists is missing"
            raise FileNotFoundError(errno.ENOENT, reason, str(shard))
    return WeightFiles(path, shards, index)


class TensorFile(Protocol):
    """File of named tensors. Dtypes have their names in safetensors, such as "F32"."""

    def keys(self) -> list[str]:
        """Return the names of the tensors."""

    def describe(self, key: str) -> tuple[str, list[int]]:
        """Return dtype and shape of a tensor without reading it."""

    def read(self, key: str) -> Tensor:
        """Return a tensor, on the CPU."""


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors or a .bin file. Of a .bin file only tensors are unpickled.

    Values are memory-mapped, except those of a .bin file in the format before torch 1.6.

    Raises:
        ValueError: The file is truncated, of another format, or holds anything but dense tensors.
    """
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._file = safe_open(path, framework="pt")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            reason = f"truncated or not a safetensors file ({error})"
            raise ValueError(f"{self._path}: {reason}") from error

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def describe(self, key: str) -> tuple[str, list[int]]:
        with self._errors():
            part = self._file.get_slice(key)
            return part.get_dtype(), part.get_shape()

    def read(self, key: str) -> Tensor:
        with self._errors():
            return self._file.get_tensor(key)


class _PickleFile:
    def __init__(self, path: Path) -> None:
        self._state = _unpickle(path)
        accepted = "must hold a dict of dense tensors on the CPU"
        if not isinstance(self._state, dict):
            raise ValueError(f"{path}: {accepted}; got {_describe(self._state)}")
        for key, value in self._state.items():
            if not isinstance(key, str) or not _is_dense(value):
                raise ValueError(f"{path}: {accepted}; got {key!r}: {_describe(value)}")

    def keys(self) -> list[str]:
        return list(self._state)

    def describe(self, key: str) -> tuple[str, list[int]]:
        value = self._state[key]
        return _DTYPES.get(value.dtype, str(value.dtype)), list(value.shape)

    def read(self, key: str) -> Tensor:
        return self._state[key]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor on {value.device}, {value.layout}"
    return type(value).__name__


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        # Only torch's zip format can be memory-mapped.
        mapped = zipfile.is_zipfile(file)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refers to {name[1]}" if name else "not a pickle of tensors"
        raise ValueError(f"{path}: {reason}; only tensors are unpickled") from error
    # torch.load raises many types for a damaged file, OSError with EINVAL among them.
    except Exception as error:
        line = str(error).partition(". ")[0] or type(error).__name__
        raise ValueError(f"{path}: truncated or not a file of tensors ({line})") from error


def read_weights(unet: AnyUNet, files: WeightFiles, device: torch.device) -> None:
    """Allocate the weights of a network and read them from files.

    Weights are cast to the dtype of the network. Keys, shapes and dtypes are checked before
    anything is allocated. A prefix of the keys, such as "module." or "unet.", is removed with a
    warning; other keys than those with the prefix are then ignored.

    Args:
        unet: A network on the meta device.
        files: The files.
        device: Device of the weights.

    Raises:
        ValueError: A file is damaged or has another format, holds weights of another class of
            networks, lacks keys, has other ones, or holds one twice or one that its index assigns
            to another file; a shape or dtype differs; or weights are not finite in the dtype of
            the network. The message names file and key.
    """
    opened = {path: open_tensors(path) for path in files.paths}
    if files.index is not None:
        for path, file in opened.items():
            _check_shard(files.source, files.index, path, file)
    locations = _match(unet, opened, files.source)
    unet.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in unet.state_dict().items():
            path, key = locations[name]
            value = opened[path].read(key)
            parameter.copy_(value.reshape(parameter.shape))
            if not parameter.isfinite().all():
                cause = (
                    f"values that {parameter.dtype} cannot represent"
                    if value.isfinite().all()
                    else "values that are not finite"
                )
                raise ValueError(f"{path}: {key} has {cause}")


def _check_shard(source: Path, index: Mapping[str, Path], path: Path, file: TensorFile) -> None:
    """Check that a file holds exactly the keys that the index assigns to it."""
    held = set(file.keys())
    if missing := {key for key, home in index.items() if home == path} - held:
        raise ValueError(f"{path}: lacks keys that {source.name} assigns to it: {_some(missing)}")
    if extra := sorted(key for key in held if index.get(key) != path):
        home = index.get(extra[0])
        other = home.name if home else "no file"
        raise ValueError(f"{path}: holds {extra[0]}, which {source.name} assigns to {other}")


def _match(
    unet: AnyUNet, opened: Mapping[Path, TensorFile], source: Path
) -> dict[str, tuple[Path, str]]:
    """Return file and key of each weight of the network, after checks of names and shapes."""
    locations: dict[str, tuple[Path, str]] = {}
    for path, file in opened.items():
        for key in file.keys():  # noqa: SIM118
            first = locations.setdefault(current_key(key), (path, key))
            if first != (path, key):
                raise ValueError(f"{path}: {first[1]} and {key} are the same weight")
    shapes = {name: list(value.shape) for name, value in unet.state_dict().items()}
    locations = _without_prefix(locations, shapes, source)
    kind = network_kind(unet)
    held_kind = next((other for other in NETWORK_KINDS if other.marker_key in locations), kind)
    if kind.marker_key not in locations and held_kind is not kind:
        raise ValueError(
            f"{source}: holds the weights of a {held_kind.name}; the config is that of a"
            f" {kind.name}"
        )
    if missing := shapes.keys() - locations.keys():
        raise ValueError(f"{source}: keys are missing: {_some(missing)}")
    if extra := locations.keys() - shapes.keys():
        raise ValueError(f"{source}: keys that the network does not have: {_some(extra)}")
    for name, shape in shapes.items():
        path, key = locations[name]
        dtype, found = opened[path].describe(key)
        fitting = [shape, [*shape, 1, 1]] if _PROJECTION.search(name) else [shape]
        if found not in fitting or dtype not in _FLOATING:
            accepted = f"{shape} in one of {', '.join(_FLOATING)}"
            raise ValueError(f"{path}: {key} must be {accepted}; got {dtype} {found}")
    return locations


def _without_prefix(
    locations: dict[str, tuple[Path, str]], names: Collection[str], source: Path
) -> dict[str, tuple[Path, str]]:
    """Return the locations by key without a prefix; warn of what was removed."""
    try:
        prefix = find_prefix(locations, names, (kind.marker_key for kind in NETWORK_KINDS))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    own = {k.removeprefix(prefix): v for k, v in locations.items() if k.startswith(prefix)}
    if removed := removed_text((key for _, key in own.values()), prefix):
        others = len(locations) - len(own)
        left_out = f"; {others} other keys ignored" if others else ""
        warnings.warn(f"{source}: keys read without {removed}{left_out}", stacklevel=5)
    return own


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_weights(unet: AnyUNet, path: Path) -> None:
    """Write a state dict as a safetensors file, contiguous and in its dtype.

    Raises:
        ValueError: A weight is not finite, so that the file could not be read.
        OSError: The file cannot be written.
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
