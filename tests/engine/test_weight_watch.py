"""Changed weights of an accelerated network, whatever wrote them."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch

from cases import F16, SCHEDULE, same_bits
from ddpm_fast import Codec, Sampler, StepTable, Tuner, UNet, accelerate, variational_bound
from ddpm_fast.engine import weight_watch
from engine_cases import Prefers, arguments, small
from unet_cases import SMALL

TABLE = StepTable.ddim(SCHEDULE, 3)


def train(unet, optimizer):
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def copied_from_average(unet):
    ema = pytest.importorskip("diffusers.training_utils").EMAModel(unet.parameters())
    for shadow in ema.shadow_params:
        shadow.mul_(1.1)
    ema.copy_to(unet.parameters())


def copied_by_foreach(unet):
    data = [parameter.data for parameter in unet.parameters()]
    torch._foreach_copy_(data, [value * 1.1 for value in data])


def written_by_address(unet):
    ctypes.memset(unet.conv_in.weight.data_ptr(), 0, 4)


def replaced(unet):
    unet.conv_out = copy.deepcopy(unet.conv_out)
    unet.conv_out.bias.data.add_(1)


WRITES = {
    "adamw-fused": lambda u: train(u, torch.optim.AdamW(u.parameters(), lr=0.1, fused=True)),
    "sgd-fused": lambda u: train(u, torch.optim.SGD(u.parameters(), lr=0.1, fused=True)),
    "adagrad-fused": lambda u: train(u, torch.optim.Adagrad(u.parameters(), lr=0.1, fused=True)),
    "adam-foreach": lambda u: train(u, torch.optim.Adam(u.parameters(), lr=0.1, foreach=True)),
    "ema": copied_from_average,
    "foreach-data": copied_by_foreach,
    "data": lambda u: u.conv_in.weight.data.copy_(-u.conv_in.weight.data),
    "data-assigned": lambda u: setattr(u.conv_in.weight, "data", -u.conv_in.weight.data),
    "numpy": lambda u: u.conv_in.weight.detach().numpy().__setitem__((0, 0, 0, 0), 3),
    "address": written_by_address,
    "in-place": lambda u: torch.nn.init.zeros_(u.conv_in.weight),
    "load": lambda u: u.load_state_dict({k: v * 1.1 for k, v in u.state_dict().items()}),
    "replaced": replaced,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_direct_call_uses_the_weights_of_now(write):
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    before = model(x, t)
    write(unet)
    after = model(x, t)
    assert not same_bits(after, before)
    assert same_bits(after, accelerate(unet, tuner=Prefers("engine float32"))(x, t))


def test_a_diffusers_network_too():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(**small().config.to_dict()).eval()
    x, t = arguments(small().config)
    model = accelerate(unet, tuner=Prefers("channels_last"))
    before = model(x, t)
    copied_from_average(unet)
    assert not same_bits(model(x, t), before)


@pytest.fixture
def comparisons(monkeypatch):
    """Counts the comparisons of weights."""
    counted = []
    original = weight_watch.WeightWatcher.changed

    def changed(self):
        counted.append(self)
        return original(self)

    monkeypatch.setattr(weight_watch.WeightWatcher, "changed", changed)
    return counted


def test_each_run_compares_once_before_its_first_step(comparisons):
    """Also through a function of the caller's, which hides the network."""
    unet = small(sample_size=8)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    model.refresh()
    shape = (unet.config.in_channels, 8, 8)
    for wrapped in (model, lambda x, t: model(x, t)):
        sampler = Sampler(wrapped, TABLE, shape, 2, device="cpu")
        before = sampler.sample(4, progress=False)
        del comparisons[:]
        assert same_bits(sampler.sample(4, progress=False), before)
        assert len(comparisons) == 1
        unet.conv_out.bias.data.add_(0.1)
        after = sampler.sample(4, progress=False)
        assert not same_bits(after, before)
        fresh = Sampler(accelerate(unet, tuner=Prefers("engine float32")), TABLE, shape, 2)
        assert same_bits(after, fresh.sample(4, progress=False))


def test_codec_and_bound_compare_once_a_run(comparisons):
    unet = small(sample_size=8)
    shape = (unet.config.in_channels, 8, 8)
    model = accelerate(unet, tuner=Prefers("engine float32"))
    codec = Codec(model, SCHEDULE, shape, 3, micro_batch=2)
    x = torch.zeros(2, *shape)
    codes = codec.encode(x, progress=False)
    del comparisons[:]
    unet.conv_out.bias.data.add_(0.1)
    assert not same_bits(codec.encode(x, progress=False), codes)
    assert len(comparisons) == 1
    bound = variational_bound(model, SCHEDULE, x, steps=3, progress=False)
    unet.conv_out.bias.data.add_(0.1)
    other = variational_bound(model, SCHEDULE, x, steps=3, progress=False)
    assert len(comparisons) == 3
    assert not same_bits(bound.vb, other.vb)


def test_without_the_check_refresh_takes_effect(comparisons):
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("engine float32"), check_weights=False)
    before, state = model(x, t), model.captured_state()
    unet.conv_out.bias.data.add_(1)
    assert same_bits(model(x, t), before)
    assert not comparisons
    model.refresh()
    assert model.captured_state() != state
    assert (model(x, t) - before - 1).abs().max() < 1e-5
    assert copy.deepcopy(model)._options["check_weights"] is False


def test_weights_of_a_pipeline():
    diffusers = pytest.importorskip("diffusers")
    from pipeline_cases import ddim, quiet

    pipe = ddim()
    fast = quiet(accelerate(pipe, tuner=Prefers("engine float32")))

    def images(pipeline):
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipeline(2, generator=generator, num_inference_steps=2, output_type="np").images
        )

    images(fast)
    pipe.unet.conv_in.weight.data.neg_()  # all norms stay the same
    assert (images(fast) - images(quiet(pipe))).abs().max() < 1e-4
    assert diffusers.__version__


def test_dropout_of_an_accelerated_network_is_off():
    unet = UNet(**SMALL | {"dropout": 0.5}).train()
    model = accelerate(unet, tuner=Prefers("engine float32"))
    shape = (unet.config.in_channels, 8, 8)
    samples = [Sampler(model, TABLE, shape, 2).sample(2, progress=False) for _ in range(2)]
    assert same_bits(*samples)
    assert unet.training


@pytest.mark.cuda
def test_on_a_gpu_the_second_call_after_a_write_uses_it():
    unet = small().cuda()
    x, t = (value.cuda() for value in arguments(unet.config))
    model = accelerate(unet, tuner=Tuner(torch.device("cuda"), mode="off"))
    before = model(x, t)
    unet.conv_out.bias.data.add_(1)
    model(x, t)  # its comparison is read by the next call
    assert (model(x, t) - before - 1).abs().max() < 0.05
    unet.conv_out.bias.data.add_(1)
    model.refresh()
    assert (model(x, t) - before - 2).abs().max() < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [True, False])
def test_on_a_gpu_no_run_uses_old_weights(graph):
    unet = small(sample_size=8).cuda()
    shape = (unet.config.in_channels, 8, 8)
    tuner = Tuner(torch.device("cuda"), mode="off")
    model = accelerate(unet, tuner=tuner)
    for wrapped in (model, lambda x, t: model(x, t)):
        sampler = Sampler(wrapped, TABLE, shape, 2, device="cuda", dtype=F16, graph=graph)
        before = sampler.sample(4, progress=False)
        assert same_bits(sampler.sample(4, progress=False), before)
        train(unet, torch.optim.AdamW(unet.parameters(), lr=0.1, fused=True))
        after = sampler.sample(4, progress=False)
        assert not same_bits(after, before)
        fresh = Sampler(accelerate(unet, tuner=tuner), TABLE, shape, 2, graph=graph)
        assert same_bits(after, fresh.sample(4, progress=False))
