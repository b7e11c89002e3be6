"""ThesisUNet against the listing in the thesis, in the sampler and on the command line."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ddpm_fast.models
from cli_runs import SIDE, error_of, run, tiny_schedule
from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    StepTable,
    ThesisUNet,
    UNetEngine,
    accelerate,
    load,
    optimize_module,
    save,
)
from thesis_cases import DEEPER, inputs, listing, thesis
from unet_cases import (
    assert_activations_channels_last,
    assert_contiguous_weights_do_not_spread,
    assert_weights_stay_channels_last,
    in_layout,
    relative_error,
)

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

    @pytest.mark.parametrize(("num", "size"), [(0, (16, 16)), (1, (16, 48)), (3, (64, 32))])
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

    def test_labels_and_their_order_matter(self):
        unet = thesis(num_classes=3)
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            a, b = unet(x, t, torch.tensor([0, 1, 2])), unet(x, t, torch.tensor([0, 2, 1]))
        torch.testing.assert_close(a[0], b[0])
        assert relative_error(a[1], b[1]) > 1e-2
        assert relative_error(a[2], b[2]) > 1e-2

    @pytest.mark.parametrize("level", [0, 1])
    def test_skip_connections_matter(self, level):
        unet = thesis(**DEEPER)
        x, t, _ = inputs(unet.config)

        def forget(module, args):
            joined, *others = args
            own = joined.shape[1] // 2
            return (torch.cat([joined[:, :own], torch.zeros_like(joined[:, own:])], 1), *others)

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
            baseline = listing(unet.config, unet.state_dict(), x.to(dtype), t)
        assert got.dtype == dtype
        errors = [(y.double() - exact).square().mean().sqrt() for y in (got, baseline)]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.parametrize(
        ("weights", "images"),
        [(torch.float32, torch.float64), (torch.bfloat16, torch.float16)],
    )
    def test_output_has_the_dtype_of_x(self, weights, images):
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

    @pytest.mark.slow
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
        unet = thesis()
        x, t, _ = inputs(unet.config)
        with torch.no_grad():
            want = unet(x, t)
            unet.train()(3 * x, t)
            assert torch.equal(unet.eval()(x, t), want)
        assert list(unet.state_dict()) == [name for name, _ in unet.named_parameters()]


class TestChannelsLast:
    @pytest.mark.parametrize(
        ("change", "layout", "smallest"),
        [
            ({}, "contiguous", 1),
            ({}, "channels_last", 2),
            ({}, "sliced", 2),
            (DEEPER, "sliced", 1),
            (DEEPER | {"num_classes": 5}, "contiguous", 1),
            ({"norm": None}, "contiguous", 1),
        ],
    )
    def test_every_activation(self, change, layout, smallest):
        unet = thesis(**change)
        side = unet.config.size_multiple * smallest
        x, t, labels = inputs(unet.config, size=(side, side))
        arguments = in_layout(x, layout), t, labels
        assert assert_activations_channels_last(unet, arguments, "conv1") > 20

    def test_weights_are_and_stay(self):
        assert_weights_stay_channels_last(thesis(), thesis(1).state_dict())

    @pytest.mark.parametrize("channels", [1, 2])
    def test_contiguous_weights_do_not_spread(self, channels):
        unet = thesis(img_channels=channels)
        x, _, _ = inputs(unet.config)
        assert_contiguous_weights_do_not_spread(unet, x, unet.downsampling[0])


LINEAR = NoiseSchedule.linear(20, 1e-4, 0.5)
SHAPE = (1, SIDE, SIDE)


class TestSampler:
    def test_chain_against_the_listing_in_float64(self):
        unet = thesis()
        sampler = Sampler(unet, StepTable.ddpm(LINEAR), SHAPE, micro_batch=3)
        images = sampler.sample(5, seed=1, progress=False)
        assert images.shape == (5, *SHAPE)
        assert images.isfinite().all()
        assert torch.equal(sampler.sample(1, 1, 4, progress=False)[0], images[4])
        state = thesis().double().state_dict()

        def exact(x, t):
            return listing(unet.config, state, x, t)

        other = Sampler(exact, sampler.table, SHAPE, 3, "cpu", torch.float64)
        want = other.sample(5, seed=1, progress=False)
        assert relative_error(images, want) < 1e-5

    def test_guided_by_labels(self):
        """Guidance is scale * conditional + (1 - scale) * unconditional output."""
        unet = thesis(num_classes=4).double()
        labels = torch.tensor([0, 1, 2])

        def combined(x, t):
            null = torch.full_like(labels, 3)
            return 2.5 * unet(x, t, labels) - 1.5 * unet(x, t, null)

        table = StepTable.ddim(LINEAR, 5)
        guided = Sampler(unet, table.with_guidance(2.5), SHAPE, 3, null_label=3)
        got = guided.sample(3, seed=2, labels=labels, progress=False)
        plain = Sampler(combined, table, SHAPE, 3, "cpu", torch.float64)
        want = plain.sample(3, seed=2, progress=False)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        unguided = Sampler(unet, table, SHAPE, 3).sample(3, 2, labels=labels, progress=False)
        assert relative_error(unguided, want) > 1e-3


class TestWithoutEngine:
    def test_accelerate_names_the_alternative(self):
        with pytest.raises(TypeError, match=r"got ThesisUNet\..*ddpm_fast.optimize_module"):
            accelerate(thesis())
        with pytest.raises(TypeError, match=r"unet must be a ddpm_fast.UNet; got ThesisUNet"):
            UNetEngine(thesis(), 1, (SIDE, SIDE), torch.float32)

    def test_optimize_module(self):
        unet = thesis(sequence_channels=(16, 32))
        arguments = inputs(unet.config)
        with torch.no_grad():
            want = unet(*arguments)
            report = optimize_module(unet, arguments[:2], backend="cpu")
            assert report.counts == {"fused with SiLU": 0, "norm only": 4, "left alone": 0}
            assert relative_error(unet(*arguments), want) < 1e-5
            report.restore()
            assert torch.equal(unet(*arguments), want)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**options):
        return save("model", thesis(**options), tiny_schedule())

    return make


def sample(*args, status=0):
    options = ("--device", "cpu", "--no-progress", "--num", 3, "--batch", 2, "--out", "a.npy")
    return run("sample", "--model", "model", *options, *args, status=status)


def lines_of(result):
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


class TestCommandLine:
    @pytest.mark.parametrize(("engine", "dtype"), [(True, "float32"), (False, "bfloat16")])
    def test_sample_runs_the_network_itself(self, model, engine, dtype):
        model()
        options = ("--dtype", dtype, "--steps", 4)
        lines = lines_of(sample(*options, *([] if engine else ["--no-engine"])))
        assert lines["backend"].endswith(f"network in {dtype}")
        expected = {"engine": "none for a ThesisUNet, which runs as it is"} if engine else {}
        assert {k: v for k, v in lines.items() if k == "engine"} == expected
        checkpoint = load("model", getattr(torch, dtype))
        table = StepTable.ddpm(checkpoint.schedule, 4, clip=checkpoint.clip)
        want = Sampler(checkpoint.unet, table, SHAPE, 2).sample(3, progress=False)
        assert np.array_equal(np.load("a.npy"), want.numpy())

    def test_labels_and_guidance(self, model):
        model(num_classes=3)
        sample("--steps", 4, "--label", "0,1", "--guidance", 2)
        checkpoint = load("model")
        table = StepTable.ddpm(checkpoint.schedule, 4, clip=checkpoint.clip).with_guidance(2)
        sampler = Sampler(checkpoint.unet, table, SHAPE, 2, null_label=2)
        want = sampler.sample(3, labels=torch.tensor([0, 1, 0]), progress=False)
        assert np.array_equal(np.load("a.npy"), want.numpy())
        assert "--label must be 0 to 2" in error_of(sample(status=2))

    def test_weights_out_of_range_of_the_dtype(self, model):
        unet = thesis()
        with torch.no_grad():
            unet.conv1.bias[0] = 1e5
        save("model", unet, tiny_schedule())
        assert "torch.float16 cannot represent" in error_of(sample("--dtype", "float16", status=2))

    def test_bound_and_codes(self, model):
        model()
        np.save("data.npy", torch.zeros(2, *SHAPE, dtype=torch.uint8).numpy())
        common = ("--model", "model", "--data", "data.npy", "--device", "cpu", "--no-progress")
        lines = lines_of(run("bpd", *common, "--steps", 4))
        assert lines["engine"] == "none for a ThesisUNet, which runs as it is"
        assert lines["device"].endswith("network in float32")
        run("encode", *common, "--steps", 4, "--out", "codes.npy")
        run("decode", "codes.npy", *common[:2], *common[4:], "--steps", 4, "--out", "b.npy")
        assert np.load("b.npy").shape == (2, *SHAPE)

    def test_a_folder_without_sample_size(self, model):
        model(sample_size=None)
        assert "no sample_size" in error_of(sample(status=2))


def test_exported_at_the_top():
    assert ddpm_fast.ThesisUNet is ThesisUNet is ddpm_fast.models.ThesisUNet
    assert {"ThesisUNet", "ThesisUNetConfig"} <= {*ddpm_fast.__all__} & {*ddpm_fast.models.__all__}
