"""The thesis' U-Net in the sampler, on the command line, and where there is no plan for it."""

import numpy as np
import pytest
import torch

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
from thesis_cases import inputs, listing, thesis
from unet_cases import relative_error

LINEAR = NoiseSchedule.linear(20, 1e-4, 0.5)
SHAPE = (1, SIDE, SIDE)


class TestSampler:
    def test_a_whole_chain(self):
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
        """scale * conditional + (1 - scale) * unconditional, of a network with a null label."""
        unet = thesis(num_classes=4).double()
        labels = torch.tensor([0, 1, 2])

        def combined(x, t):
            null = torch.full_like(labels, 3)
            return 2.5 * unet(x, t, labels) - 1.5 * unet(x, t, null)

        table = StepTable.ddim(LINEAR, 5)
        kept = Sampler(unet, table.with_guidance(2.5), SHAPE, 3, null_label=3)
        got = kept.sample(3, seed=2, labels=labels, progress=False)
        plain = Sampler(combined, table, SHAPE, 3, "cpu", torch.float64)
        want = plain.sample(3, seed=2, progress=False)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        unguided = Sampler(unet, table, SHAPE, 3).sample(3, 2, labels=labels, progress=False)
        assert relative_error(unguided, want) > 1e-3


class TestNoPlan:
    def test_accelerate_says_what_to_use(self):
        with pytest.raises(TypeError, match=r"got ThesisUNet\..*ddpm_fast.optimize_module"):
            accelerate(thesis())
        with pytest.raises(TypeError, match=r"unet must be a ddpm_fast.UNet; got ThesisUNet"):
            UNetEngine(thesis(), 1, (SIDE, SIDE), torch.float32)

    def test_optimize_module_takes_it(self):
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
    @pytest.mark.parametrize("engine", [True, False])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_sample_runs_the_network_itself(self, model, engine, dtype):
        model()
        options = ("--dtype", dtype, "--steps", 4)
        lines = lines_of(sample(*options, *([] if engine else ["--no-engine"])))
        assert lines["backend"].endswith(f"network in {dtype}")
        said = {"engine": "none for a ThesisUNet, which runs as it is"} if engine else {}
        assert {k: v for k, v in lines.items() if k == "engine"} == said
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

    def test_weights_beyond_the_dtype(self, model):
        """With the engine as without, nothing is rounded to infinity."""
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
    import ddpm_fast.models

    assert ddpm_fast.ThesisUNet is ThesisUNet is ddpm_fast.models.ThesisUNet
    assert {"ThesisUNet", "ThesisUNetConfig"} <= {*ddpm_fast.__all__} & {*ddpm_fast.models.__all__}
