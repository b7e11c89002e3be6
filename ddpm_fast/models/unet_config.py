"""The options of the U-Net, under the names diffusers' UNet2DModel gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddpm_fast.models.base_config import NetworkConfig, is_finite, is_integer

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_POSITIVE_INTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_OPTIONAL_POSITIVE_INTS = (
    "time_embedding_dim",
    "attention_head_dim",
    "attn_norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
)
_BOOLS = ("center_input_sample", "flip_sin_to_cos", "add_attention")


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Options of `UNet`; names, meanings and defaults are those of diffusers' UNet2DModel.

    Sequences may be given as lists and are kept as tuples. `attention_head_dim` is the width of
    a head (None: one head as wide as the level). `downsample_padding` 0 pads right and bottom
    by one pixel, 1 pads all sides. `downsample_type` and `upsample_type` "resnet" act in the
    attention blocks only, as in diffusers. `attn_norm_num_groups` sets the groups of the middle
    block's attention norm; None leaves `norm_num_groups`, or no norm at all under
    `resnet_time_scale_shift="scale_shift"`.

    Raises:
        ValueError: an option has a value that is not supported, or two options contradict each
            other; the message names the option, the value and what is accepted.
    """

    _network = "UNet"

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        self._lists_to_tuples(
            "sample_size", "down_block_types", "up_block_types", "block_out_channels"
        )
        self._check_scalars()
        self._check_levels()

    def _check_scalars(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if not any(value == one and type(value) is type(one) for one in accepted):
                self._reject(name, value, ", ".join(map(repr, accepted)))
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            if not is_integer(value, 1):
                self._reject(name, value, "an integer >= 1")
        for name in _OPTIONAL_POSITIVE_INTS:
            value = getattr(self, name)
            if value is not None and not is_integer(value, 1):
                self._reject(name, value, "None or an integer >= 1")
        for name in _BOOLS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                self._reject(name, value, "True or False")
        self._height_width(self.sample_size)
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            self._reject("dropout", self.dropout, "a number in [0, 1)")
        for name in ("norm_eps", "mid_block_scale_factor"):
            value = getattr(self, name)
            if not is_finite(value) or value <= 0:
                self._reject(name, value, "a finite number > 0")

    def _check_levels(self) -> None:
        channels = self.block_out_channels
        if (
            not isinstance(channels, tuple)
            or not channels
            or not all(is_integer(c, 1) and c % self.norm_num_groups == 0 for c in channels)
        ):
            self._reject(
                "block_out_channels",
                channels,
                f"one or more multiples of norm_num_groups={self.norm_num_groups}",
            )
        for name, accepted in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            if not isinstance(types, tuple) or any(kind not in accepted for kind in types):
                self._reject(name, types, "a sequence of " + ", ".join(accepted))
            if len(types) != len(channels):
                self._reject(name, types, f"{len(channels)} entries, as many as block_out_channels")
        shift, end = self.freq_shift, max(1, channels[0] // 2)
        if not is_integer(shift, 0) or shift >= end:
            self._reject("freq_shift", shift, f"an integer in [0, {end})")
        groups = self.attn_norm_num_groups
        if groups is not None and channels[-1] % groups != 0:
            self._reject("attn_norm_num_groups", groups, f"a divisor of {channels[-1]}")
        head, attended = self.attention_head_dim, self._attended_channels()
        if head is not None and attended and head > min(attended):
            self._reject(
                "attention_head_dim", head, f"at most {min(attended)}, the narrowest attention"
            )

    def _attended_channels(self) -> list[int]:
        channels = self.block_out_channels
        down = [
            c
            for c, kind in zip(channels, self.down_block_types, strict=True)
            if kind.startswith("Attn")
        ]
        up = [
            c
            for c, kind in zip(reversed(channels), self.up_block_types, strict=True)
            if kind.startswith("Attn")
        ]
        mid = [channels[-1]] if self.mid_block_type is not None and self.add_attention else []
        return down + mid + up

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of an input image; None without a sample_size."""
        sides = self._height_width(self.sample_size)
        return None if sides is None else (self.in_channels, *sides)

    @property
    def num_classes(self) -> int | None:
        """Labels are 0 .. num_classes - 1; None where there are none, or none of this kind."""
        return None if self.class_embed_type is not None else self.num_class_embeds

    @property
    def time_channels(self) -> int:
        """Width of the time embedding that the residual blocks see."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """Height and width of an input are multiples of this: 2 to the number of halvings."""
        return 2 ** (len(self.block_out_channels) - 1)
