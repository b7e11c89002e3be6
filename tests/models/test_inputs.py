"""What the U-Net refuses: images, timesteps, labels, options."""

import pytest
import torch

from ddpm_fast.models import UNet, UNetConfig
from unet_cases import SMALL


class TestBadInput:
    X = torch.zeros(2, 2, 8, 8)
    T = torch.tensor([1, 2])

    @pytest.mark.parametrize(
        ("x", "t", "labels", "match"),
        [
            pytest.param(X.numpy(), T, None, "x must be a floating.*ndarray", id="no-tensor"),
            pytest.param(X.int(), T, None, "x must be a floating.*int32", id="integers"),
            pytest.param(X[0], T, None, r"x must be \[N, 2, H, W\].*\[2, 8, 8\]", id="3-d"),
            pytest.param(X[:, :1], T, None, r"x must be \[N, 2, H, W\]", id="channels"),
            pytest.param(X[..., :7], T, None, "x must .*multiples of 2.*8, 7", id="odd-width"),
            pytest.param(X[:, :, :5], T, None, "x must .*multiples of 2.*5, 8", id="odd-height"),
            pytest.param(X[..., :0], T, None, "x must .*multiples of 2.*8, 0", id="no-pixels"),
            pytest.param(X.to("meta"), T, None, "x must be a tensor on cpu", id="x-device"),
            pytest.param(X, torch.arange(3), None, r"t must be one .* 2.*\[3\]", id="t-length"),
            pytest.param(X, torch.arange(1), None, r"t must be one .* 2.*\[1\]", id="t-one"),
            pytest.param(X, T[:, None], None, "t must be int64, 0-d", id="t-2-d"),
            pytest.param(X, T.float(), None, "t must be int64.*float32", id="t-float"),
            pytest.param(X, T.int(), None, "t must be int64.*int32", id="t-int32"),
            pytest.param(X, T.to("meta"), None, "t must be int64.*on cpu", id="t-device"),
            pytest.param(X, -1, None, "t must be .*-1", id="t-negative"),
            pytest.param(X, 1.5, None, "t must be .*1.5", id="t-python-float"),
            pytest.param(X, True, None, "t must be .*True", id="t-bool"),
            pytest.param(X, T, T, "class_labels must be None", id="labels-unasked"),
        ],
    )
    def test_forward(self, x, t, labels, match):
        with pytest.raises(ValueError, match=match):
            UNet(**SMALL)(x, t, labels)

    @pytest.mark.parametrize(
        ("options", "labels", "match"),
        [
            pytest.param({"num_class_embeds": 5}, None, "be given", id="missing"),
            pytest.param({"num_class_embeds": 5}, 3, r"int64 \[2\].*got int", id="no-tensor"),
            pytest.param({"num_class_embeds": 5}, T.float(), r"int64 \[2\]", id="float"),
            pytest.param({"num_class_embeds": 5}, T[:1], r"int64 \[2\]", id="length"),
            pytest.param({"num_class_embeds": 5}, T + 3, r"\[0, 4\]; got 5", id="too-large"),
            pytest.param({"num_class_embeds": 5}, -T, r"\[0, 4\]; got -1", id="negative"),
            pytest.param({"class_embed_type": "timestep"}, T[:1], r"real \[2\]", id="timestep"),
            pytest.param({"class_embed_type": "identity"}, T, r"floating \[2, 64\]", id="identity"),
        ],
    )
    def test_class_labels(self, options, labels, match):
        with pytest.raises(ValueError, match=f"class_labels must .*{match}"):
            UNet(**SMALL, **options)(self.X, self.T, labels)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("sample_size", 0),
            ("sample_size", (8, 8, 8)),
            ("sample_size", "32"),
            ("in_channels", 0),
            ("in_channels", 3.0),
            ("out_channels", True),
            ("layers_per_block", 0),
            ("time_embedding_type", "fourier"),
            ("time_embedding_dim", 0),
            ("freq_shift", 8),
            ("freq_shift", 0.5),
            ("down_block_types", ("SkipDownBlock2D", "DownBlock2D")),
            ("down_block_types", ("DownBlock2D",)),
            ("up_block_types", "UpBlock2D"),
            ("mid_block_type", "UNetMidBlock2DCrossAttn"),
            ("block_out_channels", (16, 20)),
            ("block_out_channels", ()),
            ("block_out_channels", 16),
            ("mid_block_scale_factor", 0),
            ("downsample_padding", 2),
            ("downsample_padding", 1.0),
            ("downsample_type", "fir"),
            ("upsample_type", None),
            ("dropout", 1.0),
            ("dropout", float("nan")),
            ("act_fn", "gelu"),
            ("attention_head_dim", 64),
            ("attention_head_dim", 0),
            ("norm_num_groups", None),
            ("attn_norm_num_groups", 5),
            ("norm_eps", float("nan")),
            ("norm_eps", 0.0),
            ("resnet_time_scale_shift", "spatial"),
            ("class_embed_type", "projection"),
            ("num_class_embeds", -1),
            ("add_attention", 1),
            ("flip_sin_to_cos", None),
        ],
    )
    def test_option(self, option, value):
        with pytest.raises(ValueError, match=f"UNet option {option} must be .*; got "):
            UNet(**SMALL | {option: value})

    def test_unknown_option(self):
        with pytest.raises(ValueError, match=r"UNet option must be one of .*; got .cross"):
            UNet(**SMALL, cross_attention_dim=8)

    def test_config_and_options_at_once(self):
        with pytest.raises(ValueError, match="got both"):
            UNet(UNetConfig(**SMALL), in_channels=1)


class TestConfig:
    def test_takes_json_and_gives_it_back(self):
        written = UNetConfig(**SMALL, sample_size=(8, 16)).to_dict()
        assert written["block_out_channels"] == [16, 32]
        read = UNetConfig.from_dict(written | {"_class_name": "UNet2DModel", "_unknown": 1})
        assert read == UNetConfig(**SMALL, sample_size=(8, 16))
        assert read.sample_shape == (2, 8, 16)

    def test_is_frozen_and_hashable(self):
        config = UNetConfig(**SMALL)
        assert hash(config) == hash(UNetConfig(**SMALL))
        with pytest.raises(AttributeError):
            config.in_channels = 5
