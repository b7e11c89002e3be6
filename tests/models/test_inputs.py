"""Inputs and options that the networks reject, and their configurations as JSON."""

import warnings

import pytest
import torch

from ddpm_fast import ThesisUNet, ThesisUNetConfig
from ddpm_fast.models import UNet, UNetConfig
from thesis_cases import TINY
from unet_cases import SMALL

X, T = torch.zeros(2, 2, 8, 8), torch.tensor([1, 2])
GREY = X[:, :1]


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
        pytest.param(X, T, T, "class_labels must be None", id="labels-without-classes"),
    ],
)
def test_inputs_of_the_unet(x, t, labels, match):
    with pytest.raises(ValueError, match=match):
        UNet(**SMALL)(x, t, labels)


@pytest.mark.parametrize(
    ("x", "t", "labels", "match"),
    [
        pytest.param(GREY.int(), T, None, "x must be a floating.*int32", id="integers"),
        pytest.param(X, T, None, r"x must be \[N, 1, H", id="channels"),
        pytest.param(GREY[..., :7], T, None, "x must .*multiples of 2.*8, 7", id="odd-width"),
        pytest.param(GREY.to("meta"), T, None, "x must be a tensor on cpu", id="x-device"),
        pytest.param(GREY, torch.arange(3), None, r"t must be one .* 2.*\[3\]", id="t-length"),
        pytest.param(GREY, T, T, "class_labels must be None", id="labels-without-classes"),
    ],
)
def test_inputs_of_the_thesis_unet(x, t, labels, match):
    with pytest.raises(ValueError, match=match):
        ThesisUNet(**TINY)(x, t, labels)


@pytest.mark.parametrize(
    ("options", "labels", "match"),
    [
        pytest.param({"num_class_embeds": 5}, None, "be given", id="missing"),
        pytest.param({"num_class_embeds": 5}, 3, r"int64 \[2\].*got int", id="no-tensor"),
        pytest.param({"num_class_embeds": 5}, T.float(), r"int64 \[2\].*float32", id="float"),
        pytest.param({"num_class_embeds": 5}, T.int(), r"int64 \[2\].*int32", id="int32"),
        pytest.param({"num_class_embeds": 5}, T[:1], r"int64 \[2\].*\[1\]", id="length"),
        pytest.param({"num_class_embeds": 5}, T.to("meta"), "on cpu; got .* on meta", id="device"),
        pytest.param({"num_class_embeds": 5}, T + 3, r"\[0, 4\]; got 5", id="too-large"),
        pytest.param({"num_class_embeds": 5}, -T, r"\[0, 4\]; got -1", id="negative"),
        pytest.param({"class_embed_type": "timestep"}, T[:1], r"real \[2\]", id="timestep"),
        pytest.param({"class_embed_type": "identity"}, T, r"floating \[2, 64\]", id="identity"),
    ],
)
def test_class_labels_of_the_unet(options, labels, match):
    with pytest.raises(ValueError, match=f"class_labels must .*{match}"):
        UNet(**SMALL, **options)(X, T, labels)


@pytest.mark.parametrize(
    ("labels", "match"), [(None, "be given"), (T[:1], r"int64 \[2\].*\[1\]"), (T + 3, "got 5")]
)
def test_class_labels_of_the_thesis_unet(labels, match):
    with pytest.raises(ValueError, match=f"class_labels must .*{match}"):
        ThesisUNet(**TINY, num_classes=5)(GREY, T, labels)


UNET_OPTIONS = [
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
]
THESIS_OPTIONS = [
    ("img_channels", 0),
    ("img_channels", True),
    ("time_embedding_dims", 3),
    ("time_embedding_dims", 128.0),
    ("num_classes", 0),
    ("num_classes", False),
    ("sequence_channels", (64,)),
    ("sequence_channels", 64),
    ("sequence_channels", (64, 130)),
    ("sequence_channels", (64, 0)),
    ("sequence_channels", (64, 128.0)),
    ("sample_size", 0),
    ("sample_size", "8"),
    ("sample_size", (8, 8, 8)),
    ("sample_size", 9),
    ("sample_size", (8, 9)),
    ("norm", "batch"),
    ("norm_num_groups", 0),
    ("norm_num_groups", None),
]


@pytest.mark.parametrize(
    ("config", "base", "option", "value"),
    [
        *((UNetConfig, SMALL, *case) for case in UNET_OPTIONS),
        *((ThesisUNetConfig, TINY, *case) for case in THESIS_OPTIONS),
    ],
)
def test_options_are_rejected_by_name(config, base, option, value):
    with pytest.raises(ValueError, match=f"UNet option {option} must be .*; got "):
        config(**base | {option: value})


def test_contradictions_name_both_options():
    with pytest.raises(ValueError, match=r"norm_num_groups=8; got \(8, 12\)"):
        ThesisUNet(sequence_channels=(8, 12), norm_num_groups=8)
    with pytest.raises(ValueError, match="multiples of 16, for 4 halvings; got 24"):
        ThesisUNet(sample_size=24)
    assert ThesisUNetConfig(sequence_channels=(7, 9), norm=None).norm_num_groups == 4


@pytest.mark.parametrize("network", [UNet, ThesisUNet])
def test_unknown_option_and_config_with_options(network):
    name = network.__name__
    with pytest.raises(ValueError, match=rf"^{name} option must be one of .*; got 'labels'"):
        network(labels=True)
    config = {UNet: UNetConfig, ThesisUNet: ThesisUNetConfig}[network]()
    with pytest.raises(ValueError, match=rf"^{name} must get a config or options; got both"):
        network(config, sample_size=8)


EMA_KEYS = {"decay": 0.9999, "optimization_step": 3, "use_ema_warmup": False, "inv_gamma": 1.0}


@pytest.mark.parametrize("config", [UNetConfig, ThesisUNetConfig])
def test_keys_of_a_file_that_cannot_change_the_network(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.from_dict(EMA_KEYS | {"_name_or_path": "a/b"}) == config()
    others = {f"of_trainer_{i}": i for i in range(5)} | {"cross_attention_dim": None}
    name = config.__name__.removesuffix("Config")
    noted = f"^{name} options ignored: cross_attention_dim, of_trainer_0, of_trainer_1 and 3 more$"
    with pytest.warns(UserWarning, match=noted):
        assert config.from_dict(others) == config()


@pytest.mark.parametrize(
    ("option", "off", "on"),
    [
        ("cross_attention_dim", None, 768),
        ("self_condition", False, True),
        ("conv_in_kernel", 3, 5),
        ("resnet_out_scale_factor", 1.0, 1.4),
    ],
)
def test_options_of_other_networks(option, off, on):
    with pytest.warns(UserWarning, match=f"options ignored: {option}$"):
        assert UNetConfig.from_dict({option: off}) == UNetConfig()
    with pytest.raises(ValueError, match=rf"^UNet option must be one of .*; got '{option}'$"):
        UNetConfig.from_dict({option: on})


def test_unet_config_to_json_and_back():
    written = UNetConfig(**SMALL, sample_size=(8, 16)).to_dict()
    assert written["block_out_channels"] == [16, 32]
    read = UNetConfig.from_dict(written | {"_class_name": "UNet2DModel", "_unknown": 1})
    assert read == UNetConfig(**SMALL, sample_size=(8, 16))
    assert read.sample_shape == (2, 8, 16)


def test_thesis_config_to_json_and_back():
    config = ThesisUNetConfig(
        sequence_channels=[8, 16], sample_size=[4, 8], img_channels=3, num_classes=2
    )
    written = config.to_dict()
    assert written["sequence_channels"] == [8, 16]
    read = ThesisUNetConfig.from_dict(written | {"_class_name": "ThesisUNet", "_unknown": 1})
    assert read == config
    assert read.sample_shape == (3, 4, 8)


@pytest.mark.parametrize("config", [UNetConfig(**SMALL), ThesisUNetConfig()])
def test_configs_are_frozen_and_hashable(config):
    assert hash(config) == hash(type(config)(**config.to_dict()))
    with pytest.raises(AttributeError):
        config.sample_size = 5


def test_defaults_are_those_of_the_thesis():
    config = ThesisUNetConfig()
    assert config.sequence_channels == (64, 128, 256, 512, 1024)
    assert (config.time_embedding_dims, config.num_classes) == (128, None)
    assert (config.sample_shape, config.size_multiple) == ((1, 32, 32), 16)
    assert (config.in_channels, config.out_channels) == (1, 1)
    assert ThesisUNetConfig(sample_size=None).sample_shape is None
