"""Pipelines and arguments that `accelerate` rejects, without changing anything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

from ddpm_fast import UNet, accelerate
from ddpm_fast.diffusers import FastDDIMScheduler
from pipeline_cases import ddim, ddpm, fast, quiet, unet
from scheduler_cases import generator


class Own(diffusers.DDPMPipeline):
    def __call__(self):
        return None


def rejected(case):
    """Return a pipeline that cannot be accelerated, or options that are not accepted."""
    return {
        "own-loop": lambda: (Own(unet(), diffusers.DDPMScheduler()), {}),
        "euler": lambda: (ddpm(diffusers.EulerDiscreteScheduler()), {}),
        "order": lambda: (ddpm(diffusers.DPMSolverMultistepScheduler(solver_order=3)), {}),
        "our-unet": lambda: (_with_unet(UNet(block_out_channels=(32, 64), **BLOCKS)), {}),
        "act": lambda: (ddpm(act_fn="gelu"), {}),
        "training": lambda: (_training(), {}),
        "channels": lambda: (ddpm(out_channels=6), {}),
        "size": lambda: (ddpm(sample_size=None), {}),
        "noise": lambda: (ddpm(), {"noise": "white"}),
        "compat": lambda: (ddpm(), {"compat": "right"}),
        "micro-batch": lambda: (ddpm(), {"micro_batch": 4}),
        "dtype": lambda: (ddpm(), {"dtype": torch.int8}),
        "num-timesteps": lambda: (ddpm(), {"num_timesteps": 10}),
        "grey-learned-dpm": lambda: (
            ddpm(
                diffusers.DPMSolverMultistepScheduler(variance_type="learned_range"),
                in_channels=1,
                out_channels=2,
            ),
            {},
        ),
    }[case]()


BLOCKS = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def _with_unet(network):
    pipe = ddpm()
    pipe.unet = network
    return pipe


def _training():
    pipe = ddpm(dropout=0.5)
    pipe.unet.train()
    return pipe


@pytest.mark.parametrize(
    ("case", "error", "match"),
    [
        (
            "own-loop",
            TypeError,
            "target must be a DDPMPipeline, a DDIMPipeline or a network; got Own",
        ),
        ("euler", TypeError, "scheduler must be one of DDPMScheduler, .*; got EulerDiscrete"),
        ("order", ValueError, "solver_order .* must be 1 or 2; got 3"),
        ("our-unet", TypeError, "unet must be a UNet2DModel; got UNet"),
        ("act", ValueError, "act_fn .*must be .*; got 'gelu'"),
        ("training", ValueError, "unet must be in eval mode"),
        ("channels", ValueError, "unet must have 3 output channels .* got 6"),
        ("size", ValueError, "sample_size"),
        ("noise", ValueError, "noise must be one of generator, philox; got 'white'"),
        ("compat", ValueError, "compat must be one of diffusers, corrected; got 'right'"),
        ("micro-batch", ValueError, "micro_batch must be None with noise='generator'"),
        ("dtype", TypeError, "dtype must be float16, bfloat16 or float32; got int8"),
        ("num-timesteps", TypeError, "num_timesteps"),
        ("grey-learned-dpm", ValueError, "unet must have 3 channels for a learned variance"),
    ],
)
def test_pipelines_and_options_that_are_not_supported(case, error, match):
    pipe, options = rejected(case)
    before = dict(pipe.__dict__)
    with pytest.raises(error, match=match):
        accelerate(pipe, **options)
    assert pipe.__dict__ == before


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        (
            {"batch_size": 2, "generator": [generator(1)] * 3},
            "generator must be .* batch_size = 2; got 3",
        ),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer"),
        ({"num_inference_steps": -1}, "num_inference_steps must be an integer"),
    ],
)
def test_bad_arguments_of_a_call(call, match):
    quick = fast(ddpm())
    with pytest.raises(ValueError, match=match):
        quick(**call)
    assert quick(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_bad_arguments_of_a_ddim_call():
    quick = fast(ddim())
    with pytest.raises(ValueError, match="eta"):
        quick(eta=-0.5)
    quick.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(TypeError, match="scheduler must be a DDIMScheduler; got DDPMScheduler"):
        quick()
    with pytest.raises(ValueError, match="generator must be a single one with noise='philox'"):
        fast(ddpm(), noise="philox")(2, [generator(1), generator(2)])
    with pytest.raises(TypeError, match="generator must be a Generator; got str"):
        fast(ddpm())(1, "abc")
    with pytest.raises(TypeError, match="UNet2DModel"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got int"):
        accelerate(3)


# Modified networks


class Halved:
    """An attention processor of another class."""

    def __init__(self, own):
        self.own = own

    def __call__(self, *args, **options):
        return self.own(*args, **options) / 2


class Added(torch.nn.Linear):
    """A layer of another class, such as an adapter."""


def modify(pipe, how):
    network = pipe.unet
    attention = network.mid_block.attentions[0]
    if how == "processor":
        attention.set_processor(Halved(attention.processor))
    elif how == "hook":
        network.mid_block.register_forward_hook(lambda module, inputs, output: output * 0)
    elif how == "pre-hook":
        network.register_forward_pre_hook(lambda module, inputs: None)
    elif how == "forward":
        network.conv_in.forward = lambda x: x
    elif how == "layer":
        attention.to_q = Added(16, 16)
    elif how == "offload":
        network._hf_hook = object()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("processor", r"unet.mid_block.attentions.0: has the attention processor Halved"),
        ("hook", r"unet.mid_block: has a forward hook"),
        ("pre-hook", r"unet: has a forward hook"),
        ("forward", r"unet.conv_in: has its own forward"),
        ("layer", r"unet.mid_block.attentions.0.to_q: is a Added of"),
        ("offload", r"unet: has a hook of accelerate or diffusers"),
    ],
)
def test_modified_parts_are_named(how, match):
    pipe = ddpm()
    quick = fast(pipe)
    modify(pipe, how)
    for attempt in (lambda: fast(pipe), lambda: quick(1, num_inference_steps=2)):
        with pytest.raises(ValueError, match=match):
            attempt()


def test_weights_written_through_data_are_noticed():
    """EMAModel of diffusers copies through .data, which does not increment the version counter."""
    from diffusers.training_utils import EMAModel

    pipe = ddpm()
    quick = fast(pipe)
    quick(1, generator(1), 3, output_type="np")
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.bias.add_(0.3)
    EMAModel(other.parameters()).copy_to(pipe.unet.parameters())
    want, got = (p(1, generator(1), 3, output_type="np").images for p in (pipe, quick))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_subclasses_of_schedulers_are_rejected():
    class Mine(FastDDIMScheduler):
        def step(self, *args, **options):
            raise AssertionError("never called")

    with pytest.raises(TypeError, match="got Mine, whose steps may differ"):
        fast(ddpm(Mine()))
    with pytest.raises(TypeError, match="got Mine"):
        accelerate(unet(), Mine())


def test_from_pipe_keeps_the_settings():
    quick = fast(ddpm(), compat="corrected", noise="philox", micro_batch=2)
    again = type(quick).from_pipe(quick)
    assert again.settings == quick.settings
    assert again.unet is quick.unet


def test_float64_networks_are_rejected():
    pipe = ddpm()
    quick = fast(pipe)
    pipe.unet.double()
    for call in (lambda: fast(pipe), lambda: quick(1, num_inference_steps=2)):
        with pytest.raises(
            TypeError, match="unet must be float32, float16 or bfloat16; got float64"
        ):
            call()


def test_bad_arguments_of_accelerate():
    with pytest.raises(TypeError, match="target must be a UNet2DModel with a scheduler"):
        accelerate(ddpm(), diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match="tuner must be a Tuner; got int"):
        accelerate(ddpm(), tuner=3)
    with pytest.raises(ValueError, match="compat must be one of diffusers, corrected; got ''"):
        accelerate(ddpm(), compat="")
    assert quiet(fast(ddpm()))(1, num_inference_steps=2, output_type=None).images.shape == (
        1,
        8,
        8,
        3,
    )
