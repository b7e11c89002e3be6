"""Folders of the training script of diffusers: `unet_ema`, with the options of EMAModel."""

import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from checkpoint_cases import OPTIONS, assert_same_output, same_state
from ddpm_fast import accelerate, load
from ddpm_fast.training.build_network import build_network


@pytest.fixture(scope="module")
def unet_ema(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint-500") / "unet_ema"
    torch.manual_seed(0)
    unet = UNet2DModel(**OPTIONS)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    ema.step(unet.parameters())
    ema.save_pretrained(folder)
    assert "optimization_step" in (folder / "config.json").read_text()
    return folder


@pytest.fixture(scope="module")
def network(unet_ema):
    return UNet2DModel.from_pretrained(unet_ema).eval()


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_loads(unet_ema, network):
    assert_same_output(load(unet_ema).unet, network)
    assert same_state(build_network(str(unet_ema), (1, 4, 8)), network)


def test_accelerates(network):
    fast = accelerate(network)
    x = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = network(x, torch.tensor([3, 800])).sample
    torch.testing.assert_close(fast(x, torch.tensor([3, 800])), want, rtol=1e-5, atol=1e-5)


def test_accelerates_in_a_pipeline_that_is_saved_again(network, tmp_path):
    fast = accelerate(DDPMPipeline(network, DDPMScheduler()))
    fast.save_pretrained(tmp_path)
    assert_same_output(load(tmp_path).unet, network)
    accelerate(DDPMPipeline.from_pretrained(tmp_path))


def test_keys_that_the_class_does_not_read_change_nothing(network):
    noted = UNet2DModel(**OPTIONS)
    noted.register_to_config(self_condition=True, cross_attention_dim=8)
    accelerate(noted)
