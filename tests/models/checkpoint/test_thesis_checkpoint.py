"""Checkpoints of ThesisUNet, and of files that do not belong to one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_cases import (
    CONFIG,
    INDEX,
    OPTIONS,
    SCHEDULER,
    UNET_FILE,
    contents,
    edit,
    same_state,
)
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
    """Checkpoint of a `UNet`."""
    return save(tmp_path / "other", UNet(**OPTIONS), NoiseSchedule.cosine(10))


class TestRoundTrip:
    def test_a_pipeline(self, folder, unet):
        assert contents(folder).keys() == {
            *(INDEX, "unet", "scheduler", CONFIG, SCHEDULER, UNET_FILE)
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

    def test_files(self, folder, unet):
        index = json.loads((folder / INDEX).read_text())
        assert index["unet"] == ["ddpm_fast", "ThesisUNet"]
        config = json.loads((folder / CONFIG).read_text())
        assert config.pop("_class_name") == "ThesisUNet"
        assert ThesisUNetConfig.from_dict(config) == unet.config
        state = load_file(folder / UNET_FILE)
        assert state.keys() == unet.state_dict().keys()

    def test_network_only(self, tmp_path, unet):
        found = load(save(tmp_path / "alone", unet))
        assert same_state(found.unet, unet)
        assert (found.schedule, found.sample_shape) == (None, (1, 8, 8))

    @pytest.mark.parametrize(
        ("stored", "asked"), [(torch.float64, torch.float16), (torch.bfloat16, None)]
    )
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
            (folder / INDEX).unlink()
        assert same_state(load(folder).unet, unet)

    def test_overwrite_with_another_class(self, folder, unet):
        save(folder, UNet(**OPTIONS), overwrite=True)
        assert type(load(folder).unet) is UNet
        save(folder, unet, overwrite=True)
        assert same_state(load(folder).unet, unet)


def edit_json(name, **change):
    return lambda folder, other: edit(folder / name, change)


def take(name):
    """Replace a file by that of the checkpoint of a `UNet`."""
    return lambda folder, other: (folder / name).write_bytes((other / name).read_bytes())


# fmt: off
ERRORS = {
    "weights-of-a-unet": (
        take(UNET_FILE),
        f"{UNET_FILE}: holds the weights of a UNet2DModel; the config is that of a ThesisUNet"),
    "config-of-a-unet": (
        take(CONFIG),
        f"{CONFIG}: _class_name must be ThesisUNet, as in {INDEX}; got 'UNet2DModel'"),
    "index-of-a-unet": (
        take(INDEX),
        f"{CONFIG}: _class_name must be UNet2DModel, as in {INDEX}; got 'ThesisUNet'"),
    "index-of-another": (
        edit_json(INDEX, unet=["ddpm_fast", "UNet"]),
        rf"{INDEX}: unet must be a UNet2DModel or ThesisUNet; got .*'UNet'\]"),
    "class-is-a-list": (
        edit_json(CONFIG, _class_name=["ThesisUNet"]),
        rf"{CONFIG}: _class_name must be UNet2DModel or ThesisUNet; got \['ThesisUNet'\]"),
    "option": (
        edit_json(CONFIG, norm="batch"),
        f"{CONFIG}: ThesisUNet option norm must be 'group' or None; got 'batch'"),
    "option-of-a-unet": (
        edit_json(CONFIG, in_channels=1),
        f"{CONFIG}: ThesisUNet option must be one of .*; got 'in_channels'"),
    "classes-left-over": (
        edit_json(CONFIG, num_classes=None), "does not have: downsampling.0.label.weight"),
    "deeper": (
        edit_json(CONFIG, sequence_channels=[8, 16, 32]), "missing: downsampling.1.conv1.bias"),
    "time": (
        edit_json(CONFIG, time_embedding_dims=64),
        r"downsampling.0.time.weight must be \[16, 64\] .*; got F32 \[16, 128\]"),
}
# fmt: on


class TestErrors:
    @pytest.mark.parametrize("name", ERRORS)
    def test_on_load(self, folder, other, name):
        corrupt, match = ERRORS[name]
        corrupt(folder, other)
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    def test_thesis_weights_in_a_unet(self, folder, other):
        take(UNET_FILE)(other, folder)
        with pytest.raises(
            ValueError, match=r"weights of a ThesisUNet; .* is that of a UNet2DModel"
        ):
            load(other)

    def test_weights_that_are_not_finite(self, folder, unet):
        before = contents(folder.parent)
        with torch.no_grad():
            unet.upsampling[0].conv1.bias[0] = torch.nan
        with pytest.raises(ValueError, match=r"unet: upsampling.0.conv1.bias has values"):
            save(folder, unet, overwrite=True)
        assert contents(folder.parent) == before

    def test_weights_out_of_range_of_the_dtype(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv1.bias[0] = 1e5
        folder = save(tmp_path / "model", unet)
        with pytest.raises(
            ValueError, match=r"conv1.bias has values that torch.float16 cannot represent"
        ):
            load(folder, torch.float16)
