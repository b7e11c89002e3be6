"""The options of the thesis' U-Net, under the names its code gives them."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm_fast.models.base_config import NetworkConfig, is_integer


@dataclass(frozen=True)
class ThesisUNetConfig(NetworkConfig):
    """Options of `ThesisUNet`; the defaults are the thesis', of `norm` and what follows ours.

    Sequences may be given as lists and are kept as tuples. img_channels: of the image, in and out.
    time_embedding_dims: length of the encoding of a timestep. num_classes: labels are
    0 .. num_classes - 1; None for a network without. sequence_channels: of the levels, from the
    image's size down. sample_size: of an image, or (height, width); None leaves it open. norm:
    "group", or None for none at all, as the thesis' text has it. norm_num_groups: of the norms; a
    group of a single channel would take out again what the time has added to it.

    Raises:
        ValueError: an option has a value that is not supported, or two options contradict each
            other; the message names the option, the value and what is accepted.
    """

    _network = "ThesisUNet"

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
            self._reject("norm", self.norm, "'group', None")
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
        """Channels of an input image."""
        return self.img_channels

    @property
    def out_channels(self) -> int:
        """Channels of a prediction: those of the image, no variance is learned."""
        return self.img_channels

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of an input image; None without a sample_size."""
        sides = self._height_width(self.sample_size)
        return None if sides is None else (self.img_channels, *sides)

    @property
    def size_multiple(self) -> int:
        """Height and width of an input are multiples of this: 2 to the number of halvings."""
        return 2 ** (len(self.sequence_channels) - 1)
