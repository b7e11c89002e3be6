"""The thesis' U-Net against its listing: layers, numbers, gradients, layout."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ddpm_fast import ThesisUNet
from thesis_cases import DEEPER, inputs, listing, thesis
from unet_cases import assert_channels_last, relative_error

CASES = [
    pytest.param({}, id="tiny"),
    pytest.param(DEEPER, id="three-levels"),
    pytest.param(DEEPER | {"num_classes": 5}, id="classes"),
    pytest.param({"norm": None}, id="no-norm"),
    pytest.param({"time_embedding_dims": 10, "norm_num_groups": 2}, id="time-groups"),
]


class TestNetwork:
    def test_default_has_the_layers_of_the_listing(self):
        with torch.device("meta"):
            unet = ThesisUNet()
        assert sum(p.numel() for p in unet.parameters()) == 62_713_025
        pairs = [
            (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
            for layer in unet.modules()
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        ]
        down = [(64, 128), (128, 256), (256, 512), (512, 1024)]
        up = [(1024, 512), (512, 256), (256, 128), (128, 64)]
        blocks = [(a, b, b) for a, b in down] + [(2 * a, b, b) for a, b in up]
        assert pairs == [
            *(layer for a, b, c in blocks for layer in ((a, b, 3, 1), (b, b, 3, 1), (c, c, 4, 2))),
            (1, 64, 3, 1),
            (64, 1, 1, 1),
        ]
        of_time = [layer for layer in unet.modules() if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in of_time] == [
            (128, wide) for wide in (128, 256, 512, 1024, 512, 256, 128, 64)
        ]
        assert unet(torch.empty(3, 1, 32, 48, device="meta"), 5).shape == (3, 1, 32, 48)

    @pytest.mark.parametrize("change", CASES)
    def test_equals_the_listing(self, change):
        unet = thesis(**change).double()
        x, t, labels = inputs(unet.config)
        want = listing(unet.config, unet.state_dict(), x.double(), t, labels)
        with torch.no_grad():
            # The encoding of the time is float32.
            assert relative_error(unet(x.double(), t, labels), want) < 1e-4
            early = t % 2
            want = listing(unet.config, unet.state_dict(), x.double(), early, labels)
            assert relative_error(unet(x.double(), early, labels), want) < 1e-6

    @pytest.mark.parametrize("size", [(16, 16), (16, 48), (64, 32)])
    @pytest.mark.parametrize("num", [0, 1, 3])
    def test_any_batch_and_multiples_of_16(self, num, size):
        unet = thesis(sequence_channels=(4, 8, 12, 16, 20), sample_size=None)
        x, t, _ = inputs(unet.config, num, size)
        with torch.no_grad():
            assert unet(x, t).shape == x.shape

    def test_one_timestep_for_the_batch(self):
        unet = thesis()
        x, _, _ = inputs(unet.config)
        with torch.inference_mode():
            want = unet(x, torch.full((3,), 9))
            for t in (9, torch.tensor(9), torch.tensor([9] * 3)):
                torch.testing.assert_close(unet(x, t), want, rtol=1e-5, atol=1e-5)
            assert relative_error(unet(x, 500), want) > 1e-2

    def test_labels_and_their_order_count(self):
        unet = thesis(num_classes=3)
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            a, b = unet(x, t, torch.tensor([0, 1, 2])), unet(x, t, torch.tensor([0, 2, 1]))
        torch.testing.assert_close(a[0], b[0])
        assert relative_error(a[1], b[1]) > 1e-2
        assert relative_error(a[2], b[2]) > 1e-2

    @pytest.mark.parametrize("level", [0, 1])
    def test_what_a_level_hands_over_counts(self, level):
        """Without its half of the concatenation the output is another."""
        unet = thesis(**DEEPER)
        x, t, _ = inputs(unet.config)

        def forget(module, args):
            joined, *rest = args
            own = joined.shape[1] // 2
            return (torch.cat([joined[:, :own], torch.zeros_like(joined[:, own:])], 1), *rest)

        with torch.no_grad():
            want = unet(x, t)
            unet.upsampling[level].register_forward_pre_hook(forget)
            assert relative_error(unet(x, t), want) > 1e-2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_half_error_within_twice_the_listing(self, dtype):
        unet = thesis(sequence_channels=(16, 32, 64), sample_size=None)
        x, t, _ = inputs(unet.config, num=4)
        exact = listing(unet.config, unet.double().state_dict(), x.double(), t)
        with torch.no_grad():
            got = unet.to(dtype)(x.to(dtype), t)
            peer = listing(unet.config, unet.state_dict(), x.to(dtype), t)
        assert got.dtype == dtype
        errors = [(y.double() - exact).square().mean().sqrt() for y in (got, peer)]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize("images", [torch.float64, torch.float16], ids=["x-f64", "x-f16"])
    def test_answers_in_the_dtype_of_x(self, weights, images):
        unet = thesis(num_classes=2).to(weights)
        x, t, labels = inputs(unet.config)
        with torch.no_grad():
            assert unet(x.to(images), t, labels).dtype == images
        assert (unet.dtype, unet.device) == (weights, torch.device("cpu"))

    @pytest.mark.parametrize("change", CASES)
    def test_gradients_reach_every_parameter(self, change):
        unet = thesis(**change).train()
        x, t, labels = inputs(unet.config)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        before = x.detach().clone()
        unet(x, t, labels).square().mean().backward()
        for name, parameter in (*unet.named_parameters(), ("x", x)):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert torch.equal(x.detach(), before), "x was written to"

    def test_gradients_equal_those_of_the_listing(self):
        unet = thesis(num_classes=2).double()
        x, t, labels = inputs(unet.config)
        x, t = x.double(), t % 2
        unet(x, t, labels).square().mean().backward()
        state = {k: v.detach().clone().requires_grad_() for k, v in unet.named_parameters()}
        listing(unet.config, state, x, t, labels).square().mean().backward()
        for name, parameter in unet.named_parameters():
            torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-5, atol=1e-9)

    def test_compiles_to_one_graph_forward_and_backward(self):
        unet = thesis(num_classes=3).train()
        x, t, labels = inputs(unet.config)
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        out = compiled(x, t, labels)
        assert relative_error(out, unet(x, t, labels)) < 1e-5
        out.square().mean().backward()
        assert all(p.grad is not None for p in unet.parameters())

    @pytest.mark.parametrize(
        "again", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pkl"]
    )
    def test_copies(self, again):
        unet = thesis(num_classes=3)
        other = again(unet)
        assert other.config == unet.config
        arguments = inputs(unet.config)
        with torch.no_grad():
            assert torch.equal(other(*arguments), unet(*arguments))
            other.conv2.bias.add_(1)
            assert not torch.equal(other(*arguments), unet(*arguments))

    def test_norms_keep_no_running_statistics(self):
        """A training pass changes nothing that sampling reads."""
        unet = thesis()
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            want = unet(x, t)
            unet.train()(3 * x, t)
            assert torch.equal(unet.eval()(x, t), want)
        assert list(unet.state_dict()) == [name for name, _ in unet.named_parameters()]


class TestChannelsLast:
    @pytest.mark.parametrize("smallest", [1, 2], ids=["one-pixel", "four-pixels"])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    @pytest.mark.parametrize("change", CASES)
    def test_every_activation(self, change, layout, smallest):
        unet = thesis(**change)
        side = unet.config.size_multiple * smallest
        x, t, labels = inputs(unet.config, size=(side, side))
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif layout == "sliced":
            x = torch.cat([x, x], dim=1)[:, ::2]
        checked = []

        def look(name):
            def hook(module, args, output):
                for tensor in (*args, output):
                    if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                        checked.append(name)
                        assert_channels_last(tensor, name)

            return hook

        for name, module in unet.named_modules():
            if name not in ("", "conv1"):
                module.register_forward_hook(look(name))
        with torch.no_grad():
            assert_channels_last(unet(x, t, labels), "output")
        assert len(checked) > 20

    def test_weights_are_and_stay(self):
        unet = thesis()
        unet.load_state_dict({k: v.contiguous() for k, v in thesis(1).state_dict().items()})
        for network in (unet, copy.deepcopy(unet), unet.half()):
            for name, weight in network.named_parameters():
                if weight.dim() == 4:
                    assert weight.is_contiguous(memory_format=torch.channels_last), name

    @pytest.mark.parametrize("channels", [1, 2])
    def test_contiguous_weights_do_not_spread(self, channels):
        unet = thesis(img_channels=channels)
        state = {name: torch.ones(value.shape) for name, value in unet.state_dict().items()}
        unet.load_state_dict(state, assign=True)
        unet.downsampling[0].register_forward_pre_hook(
            lambda module, args: assert_channels_last(args[0], "downsampling.0")
        )
        with torch.no_grad():
            unet(inputs(unet.config)[0], 1)
