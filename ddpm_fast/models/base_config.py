"""What the configs of the networks share: their checks, and the way to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, Self


def is_integer(value: object, least: int) -> bool:
    """Whether it is an int, no bool, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object) -> bool:
    """Whether it is a number, no bool, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class NetworkConfig:
    """Base of the configs. `_network` is what their errors call the network."""

    _network: ClassVar[str]

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Options from a parsed unet/config.json; keys that start with "_" are ignored.

        Raises:
            ValueError: a key is not an option of the network, or a value is not supported.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in options.items() if not key.startswith("_")}
        unknown = sorted(set(given) - known)
        if unknown:
            cls._reject(unknown[0], given[unknown[0]], ", ".join(sorted(known)))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-ready values (tuples become lists), in declaration order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def _reject(cls, option: str, value: object, accepted: str) -> NoReturn:
        reason = f"is not supported; accepted: {accepted}"
        raise ValueError(f"{cls._network} option {option}={value!r} {reason}")

    def _lists_to_tuples(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def _height_width(cls, size: Any) -> tuple[int, int] | None:
        """Height and width of the option sample_size, or None for None, after a check."""
        if size is None:
            return None
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(is_integer(side, 1) for side in sides):
            accepted = "None, an integer >= 1 or two of them (height, width)"
            cls._reject("sample_size", size, accepted)
        return sides
