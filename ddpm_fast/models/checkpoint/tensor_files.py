"""One file of named tensors, of which shapes are known before values are read."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
