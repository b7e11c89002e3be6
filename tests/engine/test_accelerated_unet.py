"""AcceleratedUNet: choices, reports, changed weights, arguments."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import threading

import pytest
import torch

import ddpm_fast
from cases import BF16, F32, SCHEDULE, same_bits
from ddpm_fast import Sampler, StepTable, UNet, UNetConfig, accelerate
from engine_cases import Prefers, arguments, small
from unet_cases import SMALL, relative_error


@pytest.fixture
def clone():
    """diffusers' network and ours, with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    ours = small()
    theirs = diffusers.UNet2DModel(**ours.config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize("wanted", ["module", "engine float32"])
def test_the_choice_runs_and_is_reported(wanted, caplog):
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers(wanted))
    assert model.report().splitlines() == ["UNet on cpu", "no shape has run yet"]
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        got = model(x, t)
    assert f"accelerate: {wanted} for [3, 2, 4, 8]" in caplog.text
    assert relative_error(got, unet(x, t)) < 1e-5
    assert not got.requires_grad
    assert model._tuner.requests == [["module", "engine float32"]]
    line = model.report().splitlines()[1]
    assert line.startswith(f"3x2x4x8: {wanted} (module 500 ms, engine float32 500 ms); differs by")
    assert model.chosen[3, 2, 4, 8].drift < 1e-5
    assert (model.chosen[3, 2, 4, 8].drift == 0) == (wanted == "module")


def test_a_slow_engine_is_not_chosen(monkeypatch):
    """Real timing, with an engine that sleeps."""
    import time

    call = ddpm_fast.UNetEngine.__call__

    def slow(self, *args):
        time.sleep(0.1)
        return call(self, *args)

    monkeypatch.setattr(ddpm_fast.UNetEngine, "__call__", slow)
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet)
    assert same_bits(model(x, t), unet(x, t).detach())
    assert model.chosen[tuple(x.shape)].name == "module"


@pytest.mark.parametrize("wanted", ["module", "channels_last", "engine float32"])
def test_a_network_of_diffusers_gives_its_own_output(clone, wanted):
    theirs, ours = clone
    x, t = arguments(ours.config)
    model = accelerate(theirs, tuner=Prefers(wanted))
    assert relative_error(model(x, t), theirs(x, t).sample) < 1e-5
    assert model.config == ours.config
    assert not any(p.is_meta for p in theirs.parameters())


def test_the_drift_of_another_dtype_is_reported():
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, dtype=BF16, tuner=Prefers("engine bfloat16"))
    got = model(x, t)
    assert model._tuner.requests == [["module", "engine float32", "engine bfloat16"]]
    assert got.dtype == F32
    assert 1e-4 < model.chosen[tuple(x.shape)].drift < 0.1
    assert relative_error(got, unet(x, t)) < 0.1


def test_the_network_its_mode_and_the_random_state_stay_the_same():
    unet = UNet(**SMALL | {"dropout": 0.5}).train()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    x, t = arguments(unet.config)
    rng = torch.get_rng_state()
    for wanted in ("module", "engine float32"):
        model = accelerate(unet, tuner=Prefers(wanted))
        assert same_bits(model(x, t), model(x, t))  # without dropout
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in unet.modules())
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())


def test_changed_weights_take_effect(clone):
    theirs, ours = clone
    x, t = arguments(ours.config)
    model = accelerate(theirs, tuner=Prefers("engine float32"))
    before, state = model(x, t), model.captured_state()
    with torch.no_grad():
        theirs.conv_out.bias.add_(1)
    assert model.captured_state() != state
    assert (model(x, t) - before - 1).abs().max() < 1e-5
    theirs.conv_out.bias = torch.nn.Parameter(theirs.conv_out.bias.detach() + 1)
    assert (model(x, t) - before - 2).abs().max() < 1e-5
    theirs.conv_out = copy.deepcopy(theirs.conv_out)
    theirs.conv_out.bias.data.add_(1)  # of another module
    assert (model(x, t) - before - 3).abs().max() < 1e-5
    theirs.conv_out.bias.data = theirs.conv_out.bias.data + 1
    assert (model(x, t) - before - 4).abs().max() < 1e-5


def test_runners_of_the_least_recently_used_shapes_are_dropped():
    unet = small()
    model = accelerate(unet, tuner=Prefers("engine float32"))
    for batch in (1, 2, 3, 1, 4, 5):
        x, t = arguments(unet.config, num=batch)
        assert relative_error(model(x, t), unet(x, t)) < 1e-5
    assert [shape[0] for shape in model.chosen] == [3, 1, 4, 5]
    assert model(x[:0], t[:0]).shape == x[:0].shape


@pytest.mark.parametrize(
    "options",
    [
        {"num_class_embeds": 5},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
    ],
    ids=str,
)
def test_class_labels(options):
    unet = small(**options)
    args = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    assert relative_error(model(*args), unet(*args)) < 1e-5


def test_a_sampler_runs_it_in_place_of_the_network():
    unet = small(in_channels=3, out_channels=3)
    table = StepTable.ddim(SCHEDULE, 5)
    for wanted in ("module", "engine float32"):
        sampler = Sampler(
            accelerate(unet, tuner=Prefers(wanted)), table, (3, 4, 8), micro_batch=4, pad=False
        )
        expected = Sampler(unet, table, (3, 4, 8), micro_batch=4, pad=False)
        got, want = (s.sample(6, progress=False) for s in (sampler, expected))
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize(
    ("unet", "options", "error", "message"),
    [
        (torch.nn.Linear(1, 1), {}, TypeError, "unet must be .*UNet2DModel; got Linear.*optimize_"),
        ("unet", {}, TypeError, "unet must be .* got str"),
        (None, {"dtype": torch.int8}, TypeError, "dtype must be float16, .*; got int8"),
        (
            None,
            {"num_timesteps": 0},
            ValueError,
            r"num_timesteps must be an integer in \[1, .*got 0",
        ),
        (None, {"dtype": "float16"}, TypeError, "dtype must be float16, .*; got 'float16'"),
    ],
)
def test_bad_arguments_raise(unet, options, error, message):
    with pytest.raises(error, match=message):
        accelerate(small() if unet is None else unet, **options)


@pytest.mark.parametrize(
    ("x", "t", "error", "message"),
    [
        (torch.zeros(3), 0, ValueError, r"x must be \[N, 2, H, W\]; got \[3\]"),
        (torch.zeros(1, 5, 4, 4), 0, ValueError, r"x must be \[N, 2, H, W\]; got \[1, 5"),
        (torch.zeros(1, 2, 4, 5), 0, ValueError, "x must have a height and width .* of 2"),
        (torch.zeros(1, 2, 4, 4).int(), 0, TypeError, "x must be a floating-point .* int32"),
        (None, 0, TypeError, "x must be a floating-point tensor; got NoneType"),
        (
            torch.zeros(1, 2, 4, 4),
            1000,
            ValueError,
            r"t must be an integer in \[0, 999\]; got 1000",
        ),
        (torch.zeros(1, 2, 4, 4), 0.5, TypeError, "t must be an integer"),
    ],
)
def test_bad_calls_raise(x, t, error, message):
    with pytest.raises(error, match=message):
        accelerate(small(), tuner=Prefers("module"))(x, t)


@pytest.mark.parametrize("wanted", ["module", "engine float32"])
def test_num_timesteps_bounds_the_timesteps(wanted):
    unet = small()
    x, _ = arguments(unet.config)
    model = accelerate(unet, num_timesteps=4000, tuner=Prefers(wanted))
    assert relative_error(model(x, 3999), unet(x, 3999)) < 1e-5
    with pytest.raises(ValueError, match=r"t must be an integer in \[0, 3999\]"):
        model(x, 4000)


@pytest.mark.parametrize("options", [{}, {"class_embed_type": "timestep"}], ids=str)
def test_the_engine_ignores_autocast(options):
    unet = small(**options)
    args = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    outside = model(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(model(*args), outside)
        fresh = accelerate(unet, tuner=Prefers("engine float32"))
        assert same_bits(fresh(*args), outside)


def test_dropout_stays_off_in_every_thread():
    unet = UNet(**SMALL | {"dropout": 0.5}).train()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("module"))
    expected = model(x, t)
    wrong = []

    def work():
        wrong.extend(not same_bits(model(x, t), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    assert all(module.training for module in unet.modules())


def test_networks_and_dtypes_have_separate_choices(clone):
    theirs, ours = clone
    x, t = arguments(ours.config)
    tuner = Prefers("module")
    for network in (ours, theirs, small().bfloat16()):
        accelerate(network, tuner=tuner)(x, t)
    accelerate(ours, dtype=BF16, tuner=tuner)(x, t)
    assert len(tuner.requests) == 4
    assert len({key for key in tuner.choices if key.startswith("network")}) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same_with_its_own_weights(copied):
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, num_timesteps=500, tuner=Prefers("engine float32"))
    expected = model(x, t % 500)
    again = copied(model)
    assert again.num_timesteps == 500
    assert relative_error(again(x, t % 500), expected) < 1e-5
    with torch.no_grad():
        again.network.conv_out.bias.add_(1)
    assert same_bits(model(x, t % 500), expected)


def test_identity_is_json_and_names_the_choice():
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    assert model.identity() == {}
    model(x, t)
    identity = json.loads(json.dumps(model.identity()))
    assert identity["3x2x4x8"]["chosen"] == "engine float32"
    assert len(identity["3x2x4x8"]["engine"]["operations"]) > 50


def test_a_failing_engine_is_reported(monkeypatch, caplog):
    def broken(self, *args):
        raise RuntimeError("broken")

    monkeypatch.setattr(ddpm_fast.UNetEngine, "__call__", broken)
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet)
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert same_bits(model(x, t), unet(x, t).detach())
    assert "accelerate: without ('engine float32',), which failed" in caplog.text
    assert model.report().endswith("; engine float32 failed")


def test_float64_raises():
    with pytest.raises(TypeError, match=r"unet must be float16, .*; got float64"):
        accelerate(small().double())


def test_an_unsupported_option_of_diffusers_raises():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**SMALL | {"time_embedding_type": "fourier"})
    with pytest.raises(ValueError, match="time_embedding_type must be 'positional'; got 'fourier'"):
        accelerate(theirs)


@pytest.mark.cuda
def test_on_a_gpu_calls_replay_the_engine_in_float16():
    unet = UNet(UNetConfig.from_dict(SMALL)).cuda().eval()
    x, t = (value.cuda() for value in arguments(unet.config))
    model = accelerate(unet)
    want = unet.double()(x.double(), t)
    for _ in range(3):
        assert relative_error(model(x, t), want) < 2e-2
    assert model.chosen[tuple(x.shape)].name == "engine float16"
