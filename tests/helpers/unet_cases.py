"""Configurations, inputs and checks that the tests of the U-Nets share."""

import copy
import math

import pytest
import torch

SMALL = {
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
PLAIN = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
GOOGLE = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CIFAR = GOOGLE | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
LARGE = GOOGLE | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
RESNET_TYPES = {"downsample_type": "resnet", "upsample_type": "resnet"}
SIX_LEVELS = LARGE | {"block_out_channels": (8, 8, 16, 16, 32, 32), "norm_num_groups": 8}

CONFIGS = [
    pytest.param({}, id="several-heads"),
    pytest.param({"attention_head_dim": None}, id="one-head"),
    pytest.param({"attention_head_dim": 12}, id="heads-narrower-than-level"),
    pytest.param({"in_channels": 1, "out_channels": 1}, id="one-channel"),
    pytest.param({"in_channels": 3, "out_channels": 6}, id="learned-variance"),
    pytest.param(PLAIN | {"add_attention": False}, id="no-attention"),
    pytest.param(PLAIN, id="middle-attention"),
    pytest.param({"mid_block_type": None}, id="no-middle"),
    pytest.param({"layers_per_block": 3}, id="three-layers"),
    pytest.param({"downsample_padding": 0}, id="pad-right-bottom"),
    pytest.param({"flip_sin_to_cos": False, "freq_shift": 1}, id="sin-first"),
    pytest.param({"center_input_sample": True}, id="centred-input"),
    pytest.param({"mid_block_scale_factor": math.sqrt(2)}, id="middle-scaled"),
    pytest.param({"time_embedding_dim": 24, "norm_eps": 1e-3}, id="time-width-eps"),
    pytest.param({"resnet_time_scale_shift": "scale_shift"}, id="scale-shift"),
    pytest.param(
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
        id="scale-shift-middle-norm",
    ),
    pytest.param({"attn_norm_num_groups": 16}, id="middle-norm-groups"),
    pytest.param(RESNET_TYPES, id="resample-by-resnet"),
    pytest.param(PLAIN | RESNET_TYPES, id="resample-type-unused"),
    pytest.param(
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        },
        id="resnet-blocks",
    ),
    pytest.param(
        {"block_out_channels": (15, 25), "norm_num_groups": 5, "attention_head_dim": 5},
        id="odd-widths",
    ),
    pytest.param(
        {
            "block_out_channels": (16,),
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",),
        },
        id="one-level",
    ),
    pytest.param({"num_class_embeds": 5}, id="class-labels"),
    pytest.param({"class_embed_type": "timestep"}, id="class-timestep"),
    pytest.param({"class_embed_type": "identity"}, id="class-identity"),
    pytest.param({"act_fn": "swish", "dropout": 0.5}, id="dropout-off-in-eval"),
    pytest.param(CIFAR | {"block_out_channels": (32, 64, 64, 64)}, id="narrow-cifar10"),
    pytest.param(SIX_LEVELS, id="narrow-celebahq"),
]


def scramble(module, seed=0):
    """Add noise to every parameter, so that none has its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(config, num=3, size=None):
    generator = torch.Generator().manual_seed(1)
    height, width = size or (config.size_multiple * 2, config.size_multiple * 4)
    x = torch.randn(num, config.in_channels, height, width, generator=generator)
    t = torch.randint(0, 1000, (num,), generator=generator)
    labels = None
    if config.class_embed_type == "identity":
        labels = torch.randn(num, config.time_channels, generator=generator)
    elif config.class_embed_type == "timestep" or config.num_class_embeds:
        labels = torch.randint(0, 5, (num,), generator=generator)
    return x, t, labels


def relative_error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def in_layout(x, layout):
    """Return images contiguous, channels_last or as every second channel of others."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return torch.cat([x, x], dim=1)[:, ::2] if layout == "sliced" else x


def assert_channels_last(tensor, where):
    """Check strides: a 1 x 1 map or a single channel counts as channels_last in every layout."""
    _, c, h, w = tensor.shape
    strides = zip(tensor.shape, tensor.stride(), (h * w * c, 1, w * c, c), strict=True)
    assert all(size == 1 or stride == want for size, stride, want in strides), where


def assert_activations_channels_last(unet, arguments, first):
    """Check inputs and outputs of all modules but the first; return their number."""
    checked = []

    def check(name):
        def hook(module, args, output):
            for tensor in (*args, *(output if isinstance(output, list) else [output])):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    checked.append(name)
                    assert_channels_last(tensor, name)

        return hook

    for name, module in unet.named_modules():
        if name not in ("", first):
            module.register_forward_hook(check(name))
    with torch.no_grad():
        assert_channels_last(unet(*arguments), "output")
    return len(checked)


def assert_weights_stay_channels_last(unet, state):
    """Check weights after a contiguous state dict is loaded, a copy, and a change of dtype."""
    unet.load_state_dict({k: v.contiguous() for k, v in state.items()})
    for network in (unet, copy.deepcopy(unet), unet.half()):
        for name, weight in network.named_parameters():
            if weight.dim() == 4:
                assert weight.is_contiguous(memory_format=torch.channels_last), name


def assert_contiguous_weights_do_not_spread(unet, x, second):
    """Check the input of the second layer, where the weights of the first are contiguous."""
    state = {name: torch.ones(value.shape) for name, value in unet.state_dict().items()}
    unet.load_state_dict(state, assign=True)
    second.register_forward_pre_hook(lambda module, args: assert_channels_last(args[0], "second"))
    with torch.no_grad():
        unet(x, 1)
