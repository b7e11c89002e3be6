"""What the thesis' U-Net refuses: images, timesteps, labels, options."""

import pytest
import torch

from ddpm_fast import ThesisUNet, ThesisUNetConfig
from thesis_cases import TINY


class TestBadInput:
    X = torch.zeros(2, 1, 8, 8)
    T = torch.tensor([1, 2])

    @pytest.mark.parametrize(
        ("x", "t", "labels", "match"),
        [
            pytest.param(X.numpy(), T, None, "x must be a floating.*ndarray", id="no-tensor"),
            pytest.param(X.int(), T, None, "x must be a floating.*int32", id="integers"),
            pytest.param(X[0], T, None, r"x must be \[N, 1, H, W\].*\[1, 8, 8\]", id="3-d"),
            pytest.param(X.expand(2, 3, 8, 8), T, None, r"x must be \[N, 1, H", id="channels"),
            pytest.param(X[..., :7], T, None, "x must .*multiples of 2.*8, 7", id="odd-width"),
            pytest.param(X[:, :, :0], T, None, "x must .*multiples of 2.*0, 8", id="no-pixels"),
            pytest.param(X.to("meta"), T, None, "x must be a tensor on cpu", id="x-device"),
            pytest.param(X, torch.arange(3), None, r"t must be one .* 2.*\[3\]", id="t-length"),
            pytest.param(X, T.float(), None, "t must be int64.*float32", id="t-float"),
            pytest.param(X, T.to("meta"), None, "t must be int64.*on cpu", id="t-device"),
            pytest.param(X, -1, None, "t must be .*-1", id="t-negative"),
            pytest.param(X, T, T, "class_labels must be None", id="labels-unasked"),
        ],
    )
    def test_forward(self, x, t, labels, match):
        with pytest.raises(ValueError, match=match):
            ThesisUNet(**TINY)(x, t, labels)

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            pytest.param(None, "be given", id="missing"),
            pytest.param(3, r"int64 \[2\].*got int", id="no-tensor"),
            pytest.param(T.float(), r"int64 \[2\].*float32", id="float"),
            pytest.param(T.int(), r"int64 \[2\].*int32", id="int32"),
            pytest.param(T[:1], r"int64 \[2\].*\[1\]", id="length"),
            pytest.param(T.to("meta"), r"on cpu; got .* on meta", id="device"),
            pytest.param(T + 3, r"\[0, 4\]; got 5", id="too-large"),
            pytest.param(-T, r"\[0, 4\]; got -1", id="negative"),
        ],
    )
    def test_class_labels(self, labels, match):
        with pytest.raises(ValueError, match=f"class_labels must .*{match}"):
            ThesisUNet(**TINY, num_classes=5)(self.X, self.T, labels)


class TestConfig:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
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
        ],
    )
    def test_option(self, option, value):
        with pytest.raises(ValueError, match=f"ThesisUNet option {option} must be .*; got "):
            ThesisUNet(**TINY | {option: value})

    def test_contradictions_name_both(self):
        with pytest.raises(ValueError, match=r"norm_num_groups=8; got \(8, 12\)"):
            ThesisUNet(sequence_channels=(8, 12), norm_num_groups=8)
        with pytest.raises(ValueError, match="multiples of 16, for 4 halvings; got 24"):
            ThesisUNet(sample_size=24)
        assert ThesisUNetConfig(sequence_channels=(7, 9), norm=None).norm_num_groups == 4

    def test_unknown_option(self):
        with pytest.raises(ValueError, match=r"ThesisUNet option must be one of .*; got .labels"):
            ThesisUNet(labels=True)

    def test_config_and_options_at_once(self):
        with pytest.raises(ValueError, match="ThesisUNet must get a config or options; got both"):
            ThesisUNet(ThesisUNetConfig(), img_channels=1)

    def test_takes_json_and_gives_it_back(self):
        config = ThesisUNetConfig(
            sequence_channels=[8, 16], sample_size=[4, 8], img_channels=3, num_classes=2
        )
        written = config.to_dict()
        assert written["sequence_channels"] == [8, 16]
        read = ThesisUNetConfig.from_dict(written | {"_class_name": "ThesisUNet", "_unknown": 1})
        assert read == config
        assert hash(read) == hash(config)
        assert read.sample_shape == (3, 4, 8)
        with pytest.raises(AttributeError):
            read.img_channels = 1

    def test_defaults_are_those_of_the_thesis(self):
        config = ThesisUNetConfig()
        assert config.sequence_channels == (64, 128, 256, 512, 1024)
        assert (config.time_embedding_dims, config.num_classes) == (128, None)
        assert (config.sample_shape, config.size_multiple) == ((1, 32, 32), 16)
        assert (config.in_channels, config.out_channels) == (1, 1)
        assert ThesisUNetConfig(sample_size=None).sample_shape is None
