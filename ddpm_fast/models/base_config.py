"""Base class of the configurations of networks: checks, and conversion from and to JSON."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, Self

# Written by EMAModel.save_pretrained of diffusers.
_EMA_KEYS = frozenset(
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


def is_integer(value: object, low: int) -> bool:
    """Return True for an int, not a bool, of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_finite(value: object) -> bool:
    """Return True for an int or float, not a bool, that is neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class NetworkConfig:
    """Base class of the configurations.

    Attributes:
        _network: Name of the network in messages.
        _unsupported: Options of other networks, each with the values that do not change the
            network.
    """

    _network: ClassVar[str]
    _unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Make a configuration from the contents of unet/config.json.

        Keys that start with "_" and those of EMAModel of diffusers are ignored, and all others that
        no network has are ignored with a warning, as in diffusers.

        Args:
            options: Options by name; missing ones have their defaults.

        Raises:
            ValueError: An option of another network is set, or a value is not supported.
        """
        known = {field.name for field in fields(cls)}
        others = {k: v for k, v in options.items() if k not in known and not k.startswith("_")}
        for key, off in cls._unsupported.items():
            if key in others and others[key] not in (None, False, *off):
                cls._reject_option(key)
        if ignored := sorted(others.keys() - _EMA_KEYS):
            text = ", ".join(key[:40] for key in ignored[:3])
            more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
            warnings.warn(f"{cls._network} options ignored: {text}{more}", stacklevel=2)
        return cls(**{key: value for key, value in options.items() if key in known})

    @classmethod
    def _reject_option(cls, key: str) -> NoReturn:
        raise ValueError(
            f"{cls._network} option must be one of those of {cls.__name__}; got {key[:40]!r}"
        )

    @classmethod
    def from_config_or_options(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """Return `config`, or for None a configuration with these options.

        Raises:
            ValueError: There are both, a key is not an option, or a value is not supported.
        """
        if config is None:
            if unknown := sorted(options.keys() - {field.name for field in fields(cls)}):
                cls._reject_option(unknown[0])
            return cls(**options)
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
