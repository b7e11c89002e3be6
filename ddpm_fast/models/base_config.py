"""Base class of the configurations of networks: checks, and conversion from and to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, Self


def is_integer(value: object, low: int) -> bool:
    """Return True for an int, not a bool, of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_finite(value: object) -> bool:
    """Return True for an int or float, not a bool, that is neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class NetworkConfig:
    """Base class of the configurations; `_network` is the name of the network in messages."""

    _network: ClassVar[str]

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Make a configuration from the contents of unet/config.json.

        Args:
            options: Options by name. Keys that start with "_" are ignored; missing options have
                their defaults.

        Raises:
            ValueError: A key is not an option of the network, or a value is not supported.
        """
        known = {field.name for field in fields(cls)}
        own = {key: value for key, value in options.items() if not key.startswith("_")}
        if unknown := sorted(own.keys() - known):
            accepted = ", ".join(sorted(known))
            raise ValueError(f"{cls._network} option must be one of {accepted}; got {unknown[0]!r}")
        return cls(**own)

    @classmethod
    def from_config_or_options(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """Return `config`, or for None a configuration with these options.

        Raises:
            ValueError: There are both, or as `from_dict`.
        """
        if config is None:
            return cls.from_dict(options)
        if options:
            names = ", ".join(options)
            raise ValueError(f"{cls._network} must get a config or options; got both ({names})")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, in the order of declaration; tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def _reject(cls, option: str, value: object, accepted: str) -> NoReturn:
        raise ValueError(f"{cls._network} option {option} must be {accepted}; got {value!r}")

    def _lists_to_tuples(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def _height_width(cls, size: Any) -> tuple[int, int] | None:
        """Return height and width for the option sample_size, after a check."""
        if size is None:
            return None
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(is_integer(side, 1) for side in sides):
            accepted = "None, an integer >= 1 or two of them (height, width)"
            cls._reject("sample_size", size, accepted)
        return sides
