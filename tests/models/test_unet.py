"""The U-Net against diffusers' UNet2DModel: keys, numbers, layout."""

import copy

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
    assert_channels_last,
    inputs,
    relative_error,
    scramble,
)


@pytest.fixture
def peer_class():
    return pytest.importorskip("diffusers", reason="parity needs diffusers").UNet2DModel


def twins(peer_class, options):
    theirs = scramble(peer_class(**options)).eval()
    ours = UNet(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


class TestParity:
    @pytest.mark.parametrize("change", CONFIGS)
    def test_equals_diffusers(self, peer_class, change):
        ours, theirs = twins(peer_class, SMALL | change)
        x, t, labels = inputs(ours.config)
        with torch.no_grad():
            want = theirs(x, t, class_labels=labels).sample
            assert relative_error(ours(x, t, labels), want) < 1e-5
            want = theirs(x, 7, class_labels=labels).sample
            assert relative_error(ours(x, 7, labels), want) < 1e-5

    @pytest.mark.parametrize("change", CONFIGS)
    def test_diffusers_loads_our_state(self, peer_class, change):
        ours, theirs = UNet(**SMALL | change), peer_class(**SMALL | change)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())

    def test_defaults_are_those_of_diffusers(self, peer_class):
        with torch.device("meta"):
            theirs = peer_class()
        ours = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        assert UNetConfig.from_dict(ours) == UNetConfig()

    def test_cifar10_network(self, peer_class):
        ours, theirs = twins(peer_class, CIFAR)
        assert sum(p.numel() for p in ours.parameters()) == 35_746_307
        x, t, _ = inputs(ours.config, num=1, size=(32, 32))
        with torch.no_grad():
            assert relative_error(ours(x, t), theirs(x, t).sample) < 1e-5

    def test_256_network_has_its_parameters(self, peer_class):
        with torch.device("meta"):
            ours, theirs = UNet(**LARGE), peer_class(**LARGE)
        assert sum(p.numel() for p in ours.parameters()) == 113_673_219
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_half_error_within_twice_theirs(self, peer_class, dtype):
        ours, theirs = twins(peer_class, SMALL | {"layers_per_block": 2})
        x, t, _ = inputs(ours.config, num=8)
        with torch.no_grad():
            exact = theirs.double()(x.double(), t).sample
            assert relative_error(ours.double()(x.double(), t), exact) < 1e-12
            got, peer = ours.to(dtype)(x.to(dtype), t), theirs.to(dtype)(x.to(dtype), t).sample
        assert got.dtype == dtype
        errors = [(y.double() - exact).square().mean().sqrt() for y in (got, peer)]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.parametrize(
        "change", [{}, RESNET_TYPES, {"num_class_embeds": 5}], ids=["plain", "resnet", "classes"]
    )
    def test_gradients_equal_diffusers(self, peer_class, change):
        ours, theirs = twins(peer_class, SMALL | change)
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

    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize("images", [torch.float32, torch.float16], ids=["x-f32", "x-f16"])
    def test_answers_in_the_dtype_of_x(self, weights, images):
        unet = UNet(**SMALL).to(weights).eval()
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            assert unet(x.to(images), t).dtype == images

    def test_input_is_left_alone(self):
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

    def test_dropout_acts_in_training_alone(self):
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
    def test_reads_no_value_and_copies_none_from_the_host(self, t):
        """What a CUDA graph cannot capture: synchronisation, and tensors made from literals."""
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
    @pytest.mark.parametrize("smallest", [1, 2], ids=["one-pixel", "four-pixels"])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({}, id="plain"),
            pytest.param({"in_channels": 1, "out_channels": 1}, id="one-channel"),
            pytest.param(RESNET_TYPES | {"downsample_padding": 0}, id="resnet"),
            pytest.param({"resnet_time_scale_shift": "scale_shift"}, id="scale-shift"),
            pytest.param(SIX_LEVELS, id="six-levels"),
        ],
    )
    def test_every_activation(self, change, layout, smallest):
        unet = UNet(**SMALL | change).eval()
        side = unet.config.size_multiple * smallest
        x, t, _ = inputs(unet.config, size=(side, side))
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif layout == "sliced":
            x = torch.cat([x, x], dim=1)[:, ::2]
        checked = []

        def look(name):
            def hook(module, args, output):
                for tensor in (*args, *(output if isinstance(output, list) else [output])):
                    if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                        checked.append(name)
                        assert_channels_last(tensor, name)

            return hook

        for name, module in unet.named_modules():
            if name not in ("", "conv_in"):
                module.register_forward_hook(look(name))
        with torch.no_grad():
            assert_channels_last(unet(x, t), "output")
        assert len(checked) > 40

    def test_weights_are_and_stay(self):
        unet = UNet(**SMALL)
        state = {k: v.contiguous() for k, v in UNet(**SMALL).state_dict().items()}
        unet.load_state_dict(state)
        for network in (unet, copy.deepcopy(unet), unet.half()):
            for name, weight in network.named_parameters():
                if weight.dim() == 4:
                    assert weight.is_contiguous(memory_format=torch.channels_last), name

    @pytest.mark.parametrize("channels", [1, 2])
    def test_contiguous_weights_do_not_spread(self, channels):
        unet = UNet(**SMALL | {"in_channels": channels}).eval()
        state = {name: torch.ones(value.shape) for name, value in unet.state_dict().items()}
        unet.load_state_dict(state, assign=True)
        unet.down_blocks[0].register_forward_pre_hook(
            lambda module, args: assert_channels_last(args[0], "down_blocks.0")
        )
        with torch.no_grad():
            unet(inputs(unet.config)[0], 1)
