"""A network's weights on disk: the keys of its state dict, which for `UNet` are diffusers'."""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpm_fast.models.registry import NETWORK_KINDS, AnyUNet, network_kind
from ddpm_fast.utils.files import read_json

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
    kind = network_kind(unet)
    held_kind = next((other for other in NETWORK_KINDS if other.marker_key in places), kind)
    if kind.marker_key not in places and held_kind is not kind:
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


FLOATING = ("F64", "F32", "F16", "BF16")
_NAMES = dict(
    zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), FLOATING, strict=True)
)


class TensorFile(Protocol):
    """Tensors under string keys. Dtypes go by safetensors' names: F32."""

    def keys(self) -> list[str]:
        """The names of the tensors."""

    def describe(self, key: str) -> tuple[str, list[int]]:
        """Dtype and shape of a tensor."""

    def read(self, key: str) -> Tensor:
        """A tensor, on the CPU."""


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors or a .bin file; nothing but tensors is ever made of a pickle.

    Values are mapped into memory, except those of a .bin in the format before torch 1.6.

    Raises:
        ValueError: the file is none, is cut short, or holds something else than dense tensors.
    """
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._path = path
        with _whole(path):
            self._file = safe_open(path, framework="pt")

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def describe(self, key: str) -> tuple[str, list[int]]:
        with _whole(self._path):
            found = self._file.get_slice(key)
            return found.get_dtype(), found.get_shape()

    def read(self, key: str) -> Tensor:
        with _whole(self._path):
            return self._file.get_tensor(key)


class _Pickled:
    def __init__(self, path: Path) -> None:
        self._state = _unpickle(path)
        if not isinstance(self._state, dict):
            raise ValueError(f"{path}: expected a dict of tensors, found {_kind(self._state)}")
        for key, value in self._state.items():
            if not isinstance(key, str) or not _is_dense(value):
                raise ValueError(
                    f"{path}: expected a dict of tensors, found {key!r}: {_kind(value)}"
                )

    def keys(self) -> list[str]:
        return list(self._state)

    def describe(self, key: str) -> tuple[str, list[int]]:
        value = self._state[key]
        return _NAMES.get(value.dtype, str(value.dtype)), list(value.shape)

    def read(self, key: str) -> Tensor:
        return self._state[key]


def _kind(value: object) -> str:
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
        # Only torch's zip format can be mapped.
        mapped = zipfile.is_zipfile(file)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {named[1]}" if named else "it is not a pickle of tensors"
        raise ValueError(
            f"{path}: refused: {what}, and nothing but tensors is unpickled"
        ) from error
    # A damaged pickle can make its reader fail in any way, with EINVAL for one.
    except Exception as error:
        line = str(error).partition(". ")[0]
        raise ValueError(f"{path}: not a whole file of tensors ({line or _kind(error)})") from error


FORMATS = ("safetensors", "bin")

_STEM = "diffusion_pytorch_model"
_SHARD = "-{0}-of-{0}".format("[0-9]" * 5)
_WORDS = {*FORMATS, "index", "json"}


@dataclass(frozen=True)
class WeightFiles:
    """The files of a network's weights.

    source: the one file, or the index of several.
    paths: the files themselves.
    index: which of them holds each key; None for one file, which holds all.
    """

    source: Path
    paths: tuple[Path, ...]
    index: Mapping[str, Path] | None = None


def check_variant(variant: str | None) -> None:
    """Raises ValueError for what is neither None nor a name such as fp16."""
    if variant is None:
        return
    plain = isinstance(variant, str) and re.fullmatch("[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*", variant)
    if not plain or variant in _WORDS:
        accepted = "None or a plain name such as 'fp16' (letters, digits, _ and - between them)"
        raise ValueError(f"variant must be {accepted}; got {variant!r}")


def single_name(variant: str | None, kind: str = "safetensors") -> str:
    """The name of a file that holds all weights."""
    return f"{_STEM}{_suffix(variant)}.{kind}"


def _index_names(variant: str | None, kind: str) -> tuple[str, ...]:
    """The name of an index of shards, and the one that older releases gave to that of a variant."""
    name = f"{_STEM}.{kind}.index{_suffix(variant)}.json"
    return (name,) if variant is None else (name, f"{_STEM}.{kind}.{variant}.index.json")


def patterns(variant: str | None, kind: str) -> tuple[str, ...]:
    """Globs of every file that the weights of a variant in one format may consist of."""
    shard = f"{_STEM}{_suffix(variant)}{_SHARD}.{kind}"
    old = () if variant is None else (f"{_STEM}{_SHARD}.{variant}.{kind}",)
    return (single_name(variant, kind), *_index_names(variant, kind), shard, *old)


def _suffix(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"


def is_weights(name: str, variant: str | None, kinds: tuple[str, ...] = FORMATS) -> bool:
    """Whether a file of this name belongs to the weights of `variant` in one of the formats."""
    return any(fnmatchcase(name, glob) for kind in kinds for glob in patterns(variant, kind))


def find_weights(home: Path, variant: str | None) -> WeightFiles:
    """The weights in the folder `home`, found in diffusers' order.

    safetensors come before .bin, and in either an index of shards before a single file.

    Raises:
        FileNotFoundError: there are none of this variant, or a shard is missing.
        ValueError: an index that is not one, or that names a file outside the folder.
    """
    for kind in FORMATS:
        for name in _index_names(variant, kind):
            if (home / name).is_file():
                return _read_index(home / name, kind)
        single = home / single_name(variant, kind)
        if single.is_file():
            return WeightFiles(single, (single,))
    _raise_missing(home, variant)


def _raise_missing(home: Path, variant: str | None) -> NoReturn:
    names = {path.name for path in home.iterdir() if path.is_file()}
    cut = (re.sub(_SHARD, "", name.removeprefix(_STEM)) for name in names if name.startswith(_STEM))
    words = (next(iter({*name.split(".")} - _WORDS - {""}), None) for name in cut)
    held = sorted({"without a variant" if word is None else f"variant={word!r}" for word in words})
    missing = "checkpoint weights are missing" + ("" if variant is None else f", {variant=}")
    others = sorted(name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".pkl")))
    if held:
        missing += f"; there are weights {', '.join(held)}"
    elif others:
        missing += f"; {', '.join(others)} is of another kind"
    raise FileNotFoundError(errno.ENOENT, missing, str(home / single_name(variant)))


def _read_index(path: Path, kind: str) -> WeightFiles:
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{path}: expected a weight_map from keys to files")
    for name in named.values():
        if not isinstance(name, str) or re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise ValueError(f"{path}: {name!r} is not the name of a file beside it")
        if not name.endswith(f".{kind}"):
            raise ValueError(f"{path}: {name!r} is not a .{kind} file")
    index = {key: path.with_name(name) for key, name in named.items()}
    shards = tuple(sorted(set(index.values())))
    for shard in shards:
        if not shard.is_file():
            reason = f"a file of weights that {path.name} names is missing"
            raise FileNotFoundError(errno.ENOENT, reason, str(shard))
    return WeightFiles(path, shards, index)
