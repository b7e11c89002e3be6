"""UNet against UNet2DModel of diffusers: state dicts, outputs, gradients, memory layout."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.models import UNet, UNetConfig
from unet_cases import (
    CIFAR,
    CONFIGS,
    LARGE,
    RESNET_TYPES,
    SIX_LEVELS,
    SMALL,
    assert_activations_channels_last,
    assert_contiguous_weights_do_not_spread,
    assert_weights_stay_channels_last,
    in_layout,
    inputs,
    relative_error,
    scramble,
)


def networks(diffusers, options):
    """Return both implementations with equal weights."""
    theirs = scramble(diffusers.UNet2DModel(**options)).eval()
    ours = UNet(**options).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


class TestParity:
    @pytest.mark.parametrize("change", CONFIGS)
    def test_equals_diffusers(self, diffusers, change):
        ours, theirs = networks(diffusers, SMALL | change)
        x, t, labels = inputs(ours.config)
        with torch.no_grad():
            want = theirs(x, t, class_labels=labels).sample
            assert relative_error(ours(x, t, labels), want) < 1e-5
            want = theirs(x, 7, class_labels=labels).sample
            assert relative_error(ours(x, 7, labels), want) < 1e-5

    def test_defaults_are_those_of_diffusers(self, diffusers):
        with torch.device("meta"):
            theirs = diffusers.UNet2DModel()
        ours = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        assert UNetConfig.from_dict(ours) == UNetConfig()

    @pytest.mark.slow
    def test_cifar10_network(self, diffusers):
        ours, theirs = networks(diffusers, CIFAR)
        x, t, _ = inputs(ours.config, num=1, size=(32, 32))
        with torch.no_grad():
            assert relative_error(ours(x, t), theirs(x, t).sample) < 1e-5

    @pytest.mark.parametrize(("options", "count"), [(CIFAR, 35_746_307), (LARGE, 113_673_219)])
    def test_known_networks_have_their_parameters(self, diffusers, options, count):
        with torch.device("meta"):
            ours, theirs = UNet(**options), diffusers.UNet2DModel(**options)
        assert sum(p.numel() for p in ours.parameters()) == count
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_half_error_within_twice_that_of_diffusers(self, diffusers, dtype):
        ours, theirs = networks(diffusers, SMALL | {"layers_per_block": 2})
        x, t, _ = inputs(ours.config, num=8)
        with torch.no_grad():
            exact = theirs.double()(x.double(), t).sample
            assert relative_error(ours.double()(x.double(), t), exact) < 1e-12
            got, baseline = ours.to(dtype)(x.to(dtype), t), theirs.to(dtype)(x.to(dtype), t).sample
        assert got.dtype == dtype
        errors = [(y.double() - exact).square().mean().sqrt() for y in (got, baseline)]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.parametrize(
        "change", [{}, RESNET_TYPES, {"num_class_embeds": 5}], ids=["plain", "resnet", "classes"]
    )
    def test_gradients_equal_diffusers(self, diffusers, change):
        ours, theirs = networks(diffusers, SMALL | change)
        x, t, labels = inputs(ours.config)
        ours(x, t, labels).square().mean().backward()
        theirs(x, t, class_labels=labels).sample.square().mean().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # to_k.bias shifts every score of a query alike: its gradient is rounding alone.
            if not name.endswith("to_k.bias"):
                assert relative_error(a.grad, b.grad) < 1e-4, name


class TestForward:
    def test_one_timestep_for_the_batch(self):
        unet = scramble(UNet(**SMALL)).eval()
        x, _, _ = inputs(unet.config)
        with torch.inference_mode():
            want = unet(x, torch.full((3,), 9))
            for t in (9, torch.tensor(9), torch.tensor([9] * 3)):
                torch.testing.assert_close(unet(x, t), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("weights", "images"),
        [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
    )
    def test_output_has_the_dtype_of_x(self, weights, images):
        unet = UNet(**SMALL).to(weights).eval()
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            assert unet(x.to(images), t).dtype == images

    def test_input_is_not_changed(self):
        unet = UNet(**SMALL).eval()
        x = inputs(unet.config)[0].to(memory_format=torch.channels_last)
        before = x.clone()
        with torch.no_grad():
            unet(x, 3)
        assert torch.equal(x, before)

    def test_empty_batch(self):
        unet = UNet(**SMALL).eval()
        x, t, _ = inputs(unet.config, num=0)
        assert unet(x, t).shape == x.shape

    def test_dropout_acts_in_training_only(self):
        unet = UNet(**SMALL, dropout=0.5)
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            assert not torch.equal(unet(x, t), unet(x, t))
            unet.eval()
            assert torch.equal(unet(x, t), unet(x, t))

    def test_time_frequencies_stay_float32(self):
        unet = UNet(**SMALL)
        before = unet.time_proj.frequencies.clone()
        with torch.device("meta"):
            moved = UNet(**SMALL).half().to_empty(device="cpu")
        for network in (unet.half(), unet.to(torch.bfloat16), unet.double(), moved):
            assert network.time_proj.frequencies.dtype == torch.float32
            assert torch.equal(network.time_proj.frequencies, before)

    @pytest.mark.slow
    def test_compiles_to_one_graph(self):
        unet = scramble(UNet(**SMALL, num_class_embeds=5)).eval()
        x, t, labels = inputs(unet.config)
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        with torch.inference_mode():
            assert relative_error(compiled(x, t, labels), unet(x, t, labels)) < 1e-5
            assert relative_error(compiled(x, t[0], labels), unet(x, t[0], labels)) < 1e-5

    @pytest.mark.parametrize("t", [4, torch.tensor(4), torch.tensor([1, 2, 3])], ids=type)
    def test_does_not_synchronise(self, t):
        """A CUDA graph can capture neither synchronisation nor tensors made from literals."""
        unet = UNet(**SMALL, class_embed_type="timestep").eval()
        x, _, labels = inputs(unet.config)
        seen = set()

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
                return func(*args, **(kwargs or {}))

        with torch.no_grad(), Record():
            unet(x, t, labels)
        assert "convolution" in seen
        assert not seen & {
            "_local_scalar_dense",
            "nonzero",
            "lift_fresh",
            "scalar_tensor",
            "arange",
        }
        meta_t = t.to("meta") if isinstance(t, torch.Tensor) else t
        assert unet.to("meta")(x.to("meta"), meta_t, labels.to("meta")).shape == x.shape


class TestChannelsLast:
    @pytest.mark.parametrize(
        ("change", "layout", "smallest"),
        [
            ({}, "contiguous", 1),
            ({}, "contiguous", 2),
            ({}, "channels_last", 1),
            ({}, "sliced", 2),
            ({"in_channels": 1, "out_channels": 1}, "sliced", 1),
            ({"in_channels": 1, "out_channels": 1}, "contiguous", 2),
            (RESNET_TYPES | {"downsample_padding": 0}, "contiguous", 1),
            ({"resnet_time_scale_shift": "scale_shift"}, "contiguous", 1),
            (SIX_LEVELS, "contiguous", 1),
        ],
    )
    def test_every_activation(self, change, layout, smallest):
        unet = UNet(**SMALL | change).eval()
        side = unet.config.size_multiple * smallest
        x, t, _ = inputs(unet.config, size=(side, side))
        count = assert_activations_channels_last(unet, (in_layout(x, layout), t), "conv_in")
        assert count > 40

    def test_weights_are_and_stay(self):
        assert_weights_stay_channels_last(UNet(**SMALL), UNet(**SMALL).state_dict())

    @pytest.mark.parametrize("channels", [1, 2])
    def test_contiguous_weights_do_not_spread(self, channels):
        unet = UNet(**SMALL | {"in_channels": channels}).eval()
        x, _, _ = inputs(unet.config)
        assert_contiguous_weights_do_not_spread(unet, x, unet.down_blocks[0])
