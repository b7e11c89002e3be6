"""Which files of a folder hold a network's weights, under the names diffusers gives them.

diffusion_pytorch_model[.variant].safetensors
diffusion_pytorch_model.safetensors.index[.variant].json, and the shards it names
diffusion_pytorch_model[.variant].bin
diffusion_pytorch_model.bin.index[.variant].json, and the shards it names
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from ddpm_fast.utils.files import read_json

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
    _refuse_missing(home, variant)


def _refuse_missing(home: Path, variant: str | None) -> NoReturn:
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
