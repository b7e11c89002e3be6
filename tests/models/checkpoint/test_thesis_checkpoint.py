"""The thesis' U-Net on disk: the folder of any other, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_cases import CONFIG, OPTIONS, SCHEDULER, UNET_FILE, contents, edit, same_state
from ddpm_fast import NoiseSchedule, ThesisUNet, ThesisUNetConfig, UNet, load, save
from thesis_cases import inputs, thesis


@pytest.fixture
def unet():
    return thesis(num_classes=3)


@pytest.fixture
def folder(tmp_path, unet):
    return save(tmp_path / "model", unet, NoiseSchedule.cosine(10), prediction="v")


@pytest.fixture
def other(tmp_path):
    """The folder of a `UNet`."""
    return save(tmp_path / "other", UNet(**OPTIONS), NoiseSchedule.cosine(10))


class TestRoundTrip:
    def test_a_pipeline(self, folder, unet):
        assert contents(folder).keys() == {
            *("model_index.json", "unet", "scheduler", CONFIG, SCHEDULER, UNET_FILE)
        }
        found = load(folder)
        assert type(found.unet) is ThesisUNet
        assert (found.unet.config, found.sample_shape) == (unet.config, (1, 8, 8))
        assert (found.prediction, found.schedule) == ("v", NoiseSchedule.cosine(10))
        assert same_state(found.unet, unet)
        assert not found.unet.training
        for name, weight in found.unet.named_parameters():
            if weight.dim() == 4:
                assert weight.is_contiguous(memory_format=torch.channels_last), name
        arguments = inputs(unet.config)
        with torch.no_grad():
            assert torch.equal(found.unet(*arguments), unet(*arguments))

    def test_what_the_files_say(self, folder, unet):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["unet"] == ["ddpm_fast", "ThesisUNet"]
        config = json.loads((folder / CONFIG).read_text())
        assert config.pop("_class_name") == "ThesisUNet"
        assert ThesisUNetConfig.from_dict(config) == unet.config
        state = load_file(folder / UNET_FILE)
        assert state.keys() == unet.state_dict().keys()

    def test_the_network_alone(self, tmp_path, unet):
        found = load(save(tmp_path / "alone", unet))
        assert same_state(found.unet, unet)
        assert (found.schedule, found.sample_shape) == (None, (1, 8, 8))

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("asked", [None, torch.float16])
    def test_dtype_and_variant(self, tmp_path, unet, stored, asked):
        folder = save(tmp_path / "model", unet.to(stored), variant="half")
        found = load(folder, asked, variant="half").unet
        assert found.dtype == (asked or torch.float32)
        for name, value in found.state_dict().items():
            assert torch.equal(value, unet.state_dict()[name].to(value.dtype)), name

    @pytest.mark.parametrize("named", ["index", "config"])
    def test_either_file_may_name_the_class(self, folder, unet, named):
        config = json.loads((folder / CONFIG).read_text())
        if named == "index":
            del config["_class_name"]
            (folder / CONFIG).write_text(json.dumps(config))
        else:
            (folder / "model_index.json").unlink()
        assert same_state(load(folder).unet, unet)

    def test_one_overwrites_the_other(self, folder, unet):
        save(folder, UNet(**OPTIONS), overwrite=True)
        assert type(load(folder).unet) is UNet
        save(folder, unet, overwrite=True)
        assert same_state(load(folder).unet, unet)


def edit_json(name, **change):
    return lambda folder, other: edit(folder / name, change)


def take(name):
    """The file of a `UNet`'s folder instead of its own."""
    return lambda folder, other: (folder / name).write_bytes((other / name).read_bytes())


class TestRefused:
    @pytest.mark.parametrize(
        ("corrupt", "match"),
        [
            pytest.param(
                take(UNET_FILE),
                f"{UNET_FILE}: holds the weights of a UNet2DModel; the config is a ThesisUNet's",
                id="weights-of-a-unet",
            ),
            pytest.param(
                take(CONFIG),
                f"{CONFIG}: is the config of a UNet2DModel; model_index.json names a ThesisUNet",
                id="config-of-a-unet",
            ),
            pytest.param(
                take("model_index.json"),
                f"{CONFIG}: is the config of a ThesisUNet; model_index.json names a UNet2DModel",
                id="index-of-a-unet",
            ),
            pytest.param(
                edit_json("model_index.json", unet=["ddpm_fast", "UNet"]),
                r"model_index.json: unet is .*'UNet'\], expected UNet2DModel or ThesisUNet",
                id="index-of-another",
            ),
            pytest.param(
                edit_json(CONFIG, _class_name=["ThesisUNet"]),
                rf"{CONFIG}: expected a UNet2DModel or ThesisUNet, found \['ThesisUNet'\]",
                id="class-is-a-list",
            ),
            pytest.param(
                edit_json(CONFIG, norm="batch"),
                f"{CONFIG}: ThesisUNet option norm must be .*got 'batch'",
                id="option",
            ),
            pytest.param(
                edit_json(CONFIG, in_channels=1),
                f"{CONFIG}: ThesisUNet option must be one of .*; got .in_channels",
                id="option-of-a-unet",
            ),
            pytest.param(
                edit_json(CONFIG, num_classes=None),
                r"does not have: downsampling.0.label.weight",
                id="classes-left-over",
            ),
            pytest.param(
                edit_json(CONFIG, sequence_channels=[8, 16, 32]),
                r"missing: downsampling.1.conv1.bias",
                id="deeper",
            ),
            pytest.param(
                edit_json(CONFIG, time_embedding_dims=64),
                r"downsampling.0.time.weight is F32 \[16, 128\], expected \[16, 64\]",
                id="time",
            ),
        ],
    )
    def test_on_load(self, folder, other, corrupt, match):
        corrupt(folder, other)
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    def test_weights_of_the_thesis_in_a_unet(self, folder, other):
        take(UNET_FILE)(other, folder)
        with pytest.raises(ValueError, match=r"weights of a ThesisUNet; .* is a UNet2DModel's"):
            load(other)

    def test_weights_that_are_not_finite(self, folder, unet):
        before = contents(folder.parent)
        with torch.no_grad():
            unet.upsampling[0].conv1.bias[0] = torch.nan
        with pytest.raises(ValueError, match=r"unet: upsampling.0.conv1.bias has values"):
            save(folder, unet, overwrite=True)
        assert contents(folder.parent) == before

    def test_weights_beyond_the_dtype(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv1.bias[0] = 1e5
        folder = save(tmp_path / "model", unet)
        with pytest.raises(ValueError, match=r"conv1.bias has values torch.float16 cannot hold"):
            load(folder, torch.float16)
