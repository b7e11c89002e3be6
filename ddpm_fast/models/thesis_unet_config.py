"""Configuration of the U-Net of Martinez Rojas 2023, with the option names of its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ddpm_fast.models.base_config import NetworkConfig, is_integer
from ddpm_fast.models.unet_config import UNetConfig


@dataclass(frozen=True)
class ThesisUNetConfig(NetworkConfig):
    """Options of `ThesisUNet`.

    Defaults are those of the thesis, except for `norm` and `norm_num_groups`, which it does not
    have. Sequences may be lists and are stored as tuples.

    Attributes:
        img_channels: Channels of images, in and out.
        time_embedding_dims: Length of the encoding of a timestep.
        num_classes: Labels are in [0, num_classes). None: the network takes no labels.
        sequence_channels: Channels of the levels, from full resolution down.
        sample_size: Side of an image, or (height, width). None: not specified.
        norm: "group", or None for no normalisation, as in the thesis' text.
        norm_num_groups: Number of groups. A group of a single channel would remove the time
            embedding that was added to it.

    Raises:
        ValueError: A value is not supported, or two options contradict each other.
    """

    _network = "ThesisUNet"
    _unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        field.name: () for field in fields(UNetConfig)
    }

    img_channels: int = 1
    time_embedding_dims: int = 128
    num_classes: int | None = None
    sequence_channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    sample_size: int | tuple[int, int] | None = 32
    norm: str | None = "group"
    norm_num_groups: int = 4

    def __post_init__(self) -> None:
        self._lists_to_tuples("sequence_channels", "sample_size")
        for name, least in (("img_channels", 1), ("time_embedding_dims", 4)):
            if not is_integer(getattr(self, name), least):
                self._reject(name, getattr(self, name), f"an integer >= {least}")
        if self.num_classes is not None and not is_integer(self.num_classes, 1):
            self._reject("num_classes", self.num_classes, "None or an integer >= 1")
        if self.norm not in ("group", None):
            self._reject("norm", self.norm, "'group' or None")
        groups, channels = self.norm_num_groups, self.sequence_channels
        if not is_integer(groups, 1):
            self._reject("norm_num_groups", groups, "an integer >= 1")
        multiple = 1 if self.norm is None else groups
        if (
            not isinstance(channels, tuple)
            or len(channels) < 2
            or not all(is_integer(c, 1) and c % multiple == 0 for c in channels)
        ):
            of = "integers >= 1" if self.norm is None else f"multiples of norm_num_groups={groups}"
            self._reject("sequence_channels", channels, f"two or more {of}")
        sides = self._height_width(self.sample_size)
        if sides is not None and any(side % self.size_multiple for side in sides):
            accepted = (
                f"None or multiples of {self.size_multiple}, for {len(channels) - 1} halvings"
            )
            self._reject("sample_size", self.sample_size, accepted)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.img_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output, as many as of an image: no variance is learned."""
        return self.img_channels

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """Shape (C, H, W) of an image; None without a sample_size."""
        sides = self._height_width(self.sample_size)
        return None if sides is None else (self.img_channels, *sides)

    @property
    def size_multiple(self) -> int:
        """Divisor of height and width of an image: 2^(number of halvings)."""
        return 2 ** (len(self.sequence_channels) - 1)
