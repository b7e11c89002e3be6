"""An accelerated network in place of the network: arguments, outputs, gradients, the module."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cases import F32, SCHEDULE, same_bits
from ddpm_fast import Sampler, StepTable, accelerate
from engine_cases import Prefers, arguments, engine, small
from unet_cases import SMALL, relative_error

ENGINE = "engine float32"


@pytest.fixture
def theirs():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**SMALL | {"sample_size": 8}).eval()


@pytest.fixture(params=["ours", "theirs"])
def network(request):
    return small() if request.param == "ours" else request.getfixturevalue("theirs")


@pytest.mark.parametrize(
    "t",
    [
        7,
        7.0,
        np.float32(7),
        np.int64(7),
        torch.tensor(7),
        torch.tensor(7.0),
        torch.tensor([7]),
        torch.tensor([7.0], dtype=torch.float64),
        torch.tensor([7, 7, 7], dtype=torch.int32),
        torch.tensor([7.0, 7.0, 7.0]),
    ],
    ids=repr,
)
def test_forms_of_a_timestep(t):
    unet = small()
    x, _ = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers(ENGINE))
    assert same_bits(model(x, t), model(x, torch.full((3,), 7)))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (7.5, "a whole number in floating point; got 7.5"),
        (float("nan"), "got nan"),
        (torch.tensor([1.0, 2.25, 3.0]), "got 2.25"),
        (torch.tensor(True), "got bool"),
        (None, "got NoneType"),
        (torch.tensor(7.0, requires_grad=True), "without a gradient"),
    ],
)
def test_timesteps_that_are_no_whole_numbers(t, message):
    unet = small()
    x, _ = arguments(unet.config)
    with pytest.raises(TypeError, match=rf"^t must be an integer.*{message}"):
        accelerate(unet, tuner=Prefers("module"))(x, t)


def test_calls_of_diffusers(network):
    x, t = arguments(small().config)
    model = accelerate(network, tuner=Prefers(ENGINE))
    want = model(x, t)
    assert type(want) is torch.Tensor
    outputs = [
        want.sample,
        model(sample=x, timestep=t).sample,
        model(x, timestep=t),
        model(x, t, return_dict=True).sample,
        *model(x, t, None, False),
        model(x, t, return_dict=False)[0],
    ]
    assert len(outputs) == 6
    for got in outputs:
        assert same_bits(got, want)
    assert want.sample.data_ptr() == want.data_ptr()
    assert model(x[:0], t[:0]).sample.shape == (0, *x.shape[1:])


def test_an_argument_given_twice_or_not_at_all():
    model = accelerate(small(), tuner=Prefers("module"))
    x, t = arguments(model.config)
    with pytest.raises(TypeError, match=r"^x must be given once, as x or sample; got both"):
        model(x, t, sample=x)
    with pytest.raises(TypeError, match=r"^t must be given once, as t or timestep; got both"):
        model(x, t, timestep=t)
    with pytest.raises(TypeError, match=r"^x must be .*got NoneType"):
        model(timestep=t)


@pytest.mark.parametrize("chosen", ["module", ENGINE])
def test_a_gradient_goes_through_the_network(network, chosen):
    """As in guidance: the gradient of a loss of x0 by x, in a loop without gradients."""
    x, t = arguments(small().config)
    model = accelerate(network, tuner=Prefers(chosen))

    def gradient(predict):
        with torch.enable_grad():
            noisy = x.clone().requires_grad_()
            x0 = noisy - 0.5 * predict(noisy, t).sample
            return torch.autograd.grad(x0.square().sum(), noisy)[0]

    with torch.no_grad():
        got = gradient(model)
        plain = model(x.clone().requires_grad_(), t)
    as_diffusers = network if hasattr(network(x, t), "sample") else _with_sample(network)
    assert relative_error(got, gradient(as_diffusers)) < 1e-5
    assert not plain.requires_grad
    through_func = torch.func.vjp(lambda x: model(x, t), x)[1](torch.ones_like(x))[0]
    assert through_func.abs().max() > 0


def _with_sample(network):
    return lambda x, t: SimpleNamespace(sample=network(x, t))


def test_a_gradient_without_dropout_and_of_another_dtype():
    unet = small(dropout=0.5).train().bfloat16()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers("module"))
    x.requires_grad_()
    first, second = model(x, t), model(x, t)
    assert first.requires_grad
    assert first.dtype == F32
    assert same_bits(first.detach(), second.detach())


def test_a_gradient_of_labels():
    unet = small(class_embed_type="identity")
    x, t, labels = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers(ENGINE))
    labels.requires_grad_()
    model(x, t, labels).sum().backward()
    assert labels.grad.abs().max() > 0


def test_an_engine_refuses_a_gradient():
    unet = small()
    x, t = arguments(unet.config)
    planned = engine(unet, x)
    want = planned(x, t)
    with pytest.raises(ValueError, match=r"^x must not require a gradient, .*call the network"):
        planned(x.clone().requires_grad_(), t)
    with torch.no_grad():
        assert same_bits(planned(x.clone().requires_grad_(), t), want)


def test_it_is_a_module_with_the_networks_parts(network):
    model = accelerate(network, tuner=Prefers("module"))
    assert isinstance(model, nn.Module)
    assert list(model.state_dict()) == list(network.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), network.parameters(), strict=True))
    assert list(model.children()) == list(network.children())
    assert model.conv_in is network.conv_in
    assert model.config.in_channels == network.config.in_channels == 2
    assert (model.dtype, model.device) == (F32, torch.device("cpu"))
    assert model.eval() is model
    network.train()
    assert model.eval().requires_grad_(False) is model
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018


def test_parts_replaced_or_loaded_through_it_are_the_networks():
    unet = small()
    x, t = arguments(unet.config)
    model = accelerate(unet, tuner=Prefers(ENGINE))
    before = model(x, t)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    model.conv_out = copy.deepcopy(unet.conv_out)
    model.conv_out.bias.data += 1
    assert unet.conv_out is model.conv_out
    assert relative_error(model(x, t), before + 1) < 1e-5
    model.load_state_dict(state)
    assert relative_error(model(x, t), before) < 1e-5
    holder = nn.ModuleDict({"unet": model})
    assert set(holder.state_dict()) == {f"unet.{name}" for name in state}
    holder.load_state_dict({f"unet.{name}": value * 0 for name, value in state.items()})
    assert not model(x, t).any()


def test_conversion_to_another_dtype_and_back(network):
    x, t = arguments(small().config)
    model = accelerate(network, tuner=Prefers("module"))
    want = model(x, t)
    assert model.to("cpu") is model
    assert model.chosen
    model.to(torch.bfloat16)
    assert model.dtype == model.input_dtype == next(network.parameters()).dtype == torch.bfloat16
    assert relative_error(model(x, t), want) < 0.1
    assert relative_error(model.float()(x, t), want) < 0.1
    assert model.dtype == F32
    with pytest.raises(TypeError, match=r"unet must be float16, .*; got float64"):
        model.double()


def test_hooks_of_the_module_run():
    model = accelerate(small(), tuner=Prefers(ENGINE))
    x, t = arguments(model.config)
    calls = []
    with model.register_forward_hook(lambda module, args, out: calls.append(out)):
        out = model(x, t)
    assert calls == [out]


def test_a_sampler_reads_images_in_the_dtype_of_the_engine():
    class Half(nn.Linear):
        input_dtype = torch.bfloat16

        def forward(self, x, t):
            assert x.dtype == torch.bfloat16
            return x

    sampler = Sampler(Half(1, 1), StepTable.ddim(SCHEDULE, 2), (1, 4, 4))
    assert sampler.dtype == torch.bfloat16
    sampler.sample(1, progress=False)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_a_pipeline_of_diffusers_runs_it(theirs, kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    pipe = getattr(diffusers, f"{kind}Pipeline")(theirs, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def images(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(2, generator, num_inference_steps=4, output_type="np").images

    want = images(pipe)
    model = pipe.unet = accelerate(theirs, tuner=Prefers(ENGINE))
    assert abs(images(pipe) - want).max() < 1e-5
    assert pipe.device == model.device
    assert pipe.dtype == F32
    assert list(model.chosen) == [(2, 2, 8, 8)]
    assert pipe.to(torch.bfloat16).unet.dtype == torch.bfloat16
    pipe.to(torch.float32)
    assert accelerate(pipe)._current().model.network is theirs
