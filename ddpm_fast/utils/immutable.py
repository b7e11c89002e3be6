"""Immutable objects that hold tables, with cached copies on each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils import checks


class ImmutableTables:
    """Base class of immutable objects with CPU tables: equality by content, cached copies.

    A subclass passes its tables and fields to `_freeze`; `content` names those that are compared.
    """

    _tables: dict[str, Tensor]
    _content: tuple[object, ...]
    _cache: dict[tuple[str, torch.device, torch.dtype], Tensor]

    def _set_tables(self, tables: dict[str, Tensor], content: Sequence[str], **fields: Any) -> None:
        with torch.inference_mode(False):
            tables = {name: table.clone() for name, table in tables.items()}
        key = tuple(tables[n].numpy().tobytes() if n in tables else fields[n] for n in content)
        self.__dict__.update(fields, _tables=tables, _content=key, _cache={})

    def _on(self, table: str, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        """Return the copy of a table on a device in a dtype; it is created once and shared."""
        source = self._tables[table]
        if source.is_floating_point() and dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype!r}")
        device = checks.device("device", device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        key = (table, device, dtype)
        copy = self._cache.get(key)
        if copy is None:
            # Not an inference tensor: autograd could not save it. Cast before the copy: a copy from
            # the host is complete when `to` returns, so that any stream may read it. setdefault is
            # atomic: all threads get the same copy.
            with torch.inference_mode(False):
                copy = self._cache.setdefault(key, source.to(dtype, copy=True).to(device))
        return copy

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImmutableTables) or type(self) is not type(other):
            return NotImplemented
        return self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)
