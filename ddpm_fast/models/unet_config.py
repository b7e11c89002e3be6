"""Configuration of the U-Net, with the option names of UNet2DModel of diffusers."""

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
# Options of other U-Nets of diffusers and of lucidrains, and their values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (),
    "addition_time_embed_dim": (),
    "attention_type": ("default",),
    "class_embeddings_concat": (),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_dim": (),
    "cross_attention_norm": (),
    "dual_cross_attention": (),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "learned_sinusoidal_cond": (),
    "mid_block_only_cross_attention": (),
    "num_attention_heads": (),
    "only_cross_attention": (),
    "projection_class_embeddings_input_dim": (),
    "random_fourier_features": (),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (),
    "self_condition": (),
    "time_cond_proj_dim": (),
    "time_embedding_act_fn": (),
    "timestep_post_act": (),
    "transformer_layers_per_block": (1,),
}
_BOOLS = ("center_input_sample", "flip_sin_to_cos", "add_attention")


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Options of `UNet`; names, meanings and defaults are those of UNet2DModel of diffusers.

    Sequences may be lists and are stored as tuples.

    Attributes:
        sample_size: Side of an image, or (height, width). None: not specified.
        in_channels: Channels of an image.
        out_channels: Channels of the output; twice `in_channels` with a learned variance.
        center_input_sample: Map images from [0, 1] to [-1, 1] first.
        time_embedding_type: "positional": the sinusoidal encoding.
        time_embedding_dim: Width of the time embedding. None: 4 times the first level's channels.
        freq_shift: Frequencies are 10000^(-i / (half - freq_shift)), half = channels / 2.
        flip_sin_to_cos: Cosines come first in the encoding.
        down_block_types: Block of each level of the encoder, from full resolution down.
        mid_block_type: "UNetMidBlock2D", or None for no middle block.
        up_block_types: Block of each level of the decoder, from the lowest resolution up.
        block_out_channels: Channels of the levels, from full resolution down.
        layers_per_block: Residual blocks of a level of the encoder; the decoder has one more.
        mid_block_scale_factor: Outputs of the middle block's layers are divided by it.
        downsample_padding: 0 pads one pixel at the right and the bottom, 1 pads all sides.
        downsample_type: "conv" or "resnet". As in diffusers, "resnet" applies to attention blocks.
        upsample_type: As `downsample_type`.
        dropout: Dropout probability, in [0, 1).
        act_fn: "silu" or "swish", its other name.
        attention_head_dim: Width of a head. None: one head as wide as the level.
        norm_num_groups: Groups of the normalisations.
        attn_norm_num_groups: Groups of the normalisation in the middle block's attention. None:
            `norm_num_groups`, or no normalisation where `resnet_time_scale_shift` is
            "scale_shift".
        norm_eps: Epsilon of the normalisations.
        resnet_time_scale_shift: "default" adds the time embedding; "scale_shift" scales and shifts
            the second normalisation by it (Dhariwal and Nichol 2021).
        add_attention: The middle block has attention.
        class_embed_type: None: integer labels have a learned embedding. "timestep": labels are real
            numbers, encoded as timesteps are. "identity": labels are embeddings.
        num_class_embeds: Integer labels are in [0, num_class_embeds). None: no integer labels.
        num_train_timesteps: Number of timesteps. None: not specified.

    Raises:
        ValueError: A value is not supported, or two options contradict each other.
    """

    _network = "UNet"
    _unsupported = _UNSUPPORTED

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
                self._reject(name, value, " or ".join(map(repr, accepted)))
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
            narrowest = f"at most {min(attended)}, the width of the narrowest attention"
            self._reject("attention_head_dim", head, narrowest)

    def _attended_channels(self) -> list[int]:
        channels = self.block_out_channels
        levels = [
            *zip(channels, self.down_block_types, strict=True),
            *zip(reversed(channels), self.up_block_types, strict=True),
        ]
        attended = [c for c, kind in levels if kind.startswith("Attn")]
        mid = [channels[-1]] if self.mid_block_type is not None and self.add_attention else []
        return attended + mid

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """Shape (C, H, W) of an image; None without a sample_size."""
        sides = self._height_width(self.sample_size)
        return None if sides is None else (self.in_channels, *sides)

    @property
    def num_classes(self) -> int | None:
        """Number of integer labels; None without labels, or with labels of another type."""
        return None if self.class_embed_type is not None else self.num_class_embeds

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """Divisor of height and width of an image: 2^(number of halvings)."""
        return 2 ** (len(self.block_out_channels) - 1)
