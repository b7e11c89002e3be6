"""Weights that wrappers saved: prefixes of keys."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import OPTIONS, UNET_FILE, same_state
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load, save

BIN_FILE = "unet/diffusion_pytorch_model.bin"


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(**OPTIONS).eval()


@pytest.fixture
def folder(tmp_path, unet):
    return save(tmp_path / "model", unet, NoiseSchedule.linear())


def rewrite(folder, rename, others=None):
    state = {rename(key): value for key, value in load_file(folder / UNET_FILE).items()}
    state |= {key: value.contiguous() for key, value in (others or {}).items()}
    save_file(state, folder / UNET_FILE)


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("_orig_mod.", "'_orig_mod.'"),
        ("module.", "'module.'"),
        ("unet.", "'unet.'"),
        ("ema_model.", "'ema_model.'"),
        ("module._orig_mod.", "'_orig_mod.', 'module.'"),
        ("_orig_mod.module.unet.", "'_orig_mod.', 'module.', 'unet.'"),
        ("ema_model.module.", "'module.', 'ema_model.'"),
        ("model.diffusion_model.", "'model.diffusion_model.'"),
    ],
)
def test_a_prefix_is_removed_with_a_note(folder, unet, prefix, removed):
    rewrite(folder, lambda key: prefix + key)
    with pytest.warns(UserWarning, match="keys read without") as noted:
        found = load(folder).unet
    assert same_state(found, unet)
    assert [str(w.message) for w in noted] == [f"{folder / UNET_FILE}: keys read without {removed}"]


def test_a_wrapper_of_a_part(folder, unet):
    rewrite(folder, lambda key: key.replace("down_blocks.0.", "down_blocks.0._orig_mod."))
    with pytest.warns(UserWarning, match=r"keys read without '_orig_mod\.'$"):
        assert same_state(load(folder).unet, unet)


def test_averaged_weights_precede_the_others(folder, unet):
    online = {f"online_model.{key}": value + 1 for key, value in unet.state_dict().items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    rewrite(folder, lambda key: f"ema_model.{key}", online | counters)
    ignored = len(online) + 2
    with pytest.warns(UserWarning, match=rf"'ema_model\.'; {ignored} other keys ignored$"):
        assert same_state(load(folder).unet, unet)


def test_old_names_of_attention_behind_a_prefix(folder, unet):
    rewrite(folder, lambda key: "module." + key.replace(".to_q.", ".query."))
    with pytest.warns(UserWarning, match="keys read without"):
        assert same_state(load(folder).unet, unet)


def test_pickled_weights_of_data_parallel(folder, unet):
    (folder / UNET_FILE).unlink()
    torch.save(torch.nn.DataParallel(unet).state_dict(), folder / BIN_FILE)
    with pytest.warns(UserWarning, match=r"\.bin: keys read without 'module\.'$"):
        assert same_state(load(folder).unet, unet)


@pytest.mark.filterwarnings("ignore:.*keys read without")
@pytest.mark.parametrize(
    ("others", "match"),
    [
        pytest.param({"a.extra": torch.ones(1)}, "does not have: extra", id="under-the-prefix"),
        pytest.param("b.", r"holds several networks, 'a\.', 'b\.'", id="two-networks"),
        pytest.param("", "are missing|does not have: a", id="beside-the-plain-keys"),
        pytest.param("a._orig_mod.", "are the same weight", id="twice"),
    ],
)
def test_weights_that_are_rejected(folder, unet, others, match):
    if isinstance(others, str):
        others = {others + key: value.clone() for key, value in unet.state_dict().items()}
    rewrite(folder, lambda key: f"a.{key}", others)
    with pytest.raises(ValueError, match=match) as caught:
        load(folder)
    assert len(str(caught.value)) - len(str(folder)) <= 300
