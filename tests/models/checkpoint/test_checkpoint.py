"""Checkpoint folders: exchange with diffusers, options, dtypes, and what `save` writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddpm_fast
from checkpoint_cases import (
    CONFIG,
    OPTIONS,
    SCHEDULER,
    UNET_FILE,
    assert_same_output,
    contents,
    edit,
    same_state,
)
from ddpm_fast import DynamicThreshold
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint import checkpoint
from ddpm_fast.models.checkpoint.checkpoint import load, save

TRIANGLES = Path(ddpm_fast.__file__).parent / "assets" / "triangles"


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(**OPTIONS).eval()


@pytest.fixture
def folder(tmp_path, unet):
    return save(tmp_path / "model", unet, NoiseSchedule.linear())


class TestWithDiffusers:
    def test_shipped_checkpoint(self, diffusers):
        ours, theirs = load(TRIANGLES), diffusers.DDPMPipeline.from_pretrained(TRIANGLES)
        assert_same_output(ours.unet, theirs.unet)
        assert torch.allclose(ours.schedule.betas.float(), theirs.scheduler.betas)
        assert (ours.prediction, ours.variance, ours.clip) == ("epsilon", "posterior", 1.0)
        assert (ours.spacing, ours.steps_offset) == ("leading", 0)
        assert ours.sample_shape == (1, 32, 32)
        assert ours.scheduler_config["beta_end"] == 0.02

    def test_diffusers_loads_a_saved_checkpoint(self, diffusers, folder, unet):
        theirs = diffusers.DDPMPipeline.from_pretrained(folder)
        assert_same_output(unet, theirs.unet)
        assert isinstance(theirs.scheduler, diffusers.DDPMScheduler)
        assert tuple(theirs.unet.config.sample_size) == (4, 8)
        theirs.set_progress_bar_config(disable=True)
        assert theirs(num_inference_steps=2, output_type="np").images.shape == (1, 4, 8, 1)

    @pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
    def test_checkpoint_saved_by_diffusers(self, diffusers, tmp_path, kind):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(
            num_train_timesteps=50, beta_end=0.3, clip_sample=False
        )
        model = diffusers.UNet2DModel(**OPTIONS).eval()
        getattr(diffusers, f"{kind}Pipeline")(model, scheduler).save_pretrained(tmp_path)
        ours = load(tmp_path)
        assert_same_output(ours.unet, model)
        assert (ours.schedule.T, ours.clip, ours.variance) == (50, None, "posterior")
        again = save(tmp_path / "again", ours.unet, scheduler_config=ours.scheduler_config)
        assert_same_output(
            ours.unet, getattr(diffusers, f"{kind}Pipeline").from_pretrained(again).unet
        )
        assert load(again).scheduler_config == ours.scheduler_config

    def test_unet_only_in_both_directions(self, diffusers, tmp_path, unet):
        assert_same_output(unet, diffusers.UNet2DModel.from_pretrained(save(tmp_path / "a", unet)))
        model = diffusers.UNet2DModel(**OPTIONS).eval()
        model.save_pretrained(tmp_path / "b")
        ours = load(tmp_path / "b")
        assert_same_output(ours.unet, model)
        assert (ours.schedule, ours.prediction, ours.scheduler_config) == (None, None, None)
        assert ours.sample_shape == (1, 4, 8)

    @pytest.mark.parametrize(
        "schedule",
        [
            pytest.param(NoiseSchedule.linear(30, 1e-3, 0.3), id="linear"),
            pytest.param(NoiseSchedule.scaled_linear(30, 1e-3, 0.6), id="scaled-linear"),
            pytest.param(NoiseSchedule.cosine(30), id="cosine"),
            pytest.param(NoiseSchedule.sigmoid(30, 1e-3, 0.6), id="sigmoid"),
            pytest.param(NoiseSchedule.power(2, 30, 1e-3, 0.6), id="power"),
            pytest.param(
                NoiseSchedule.linear(30, 1e-3, 0.3).rescale_zero_terminal_snr(), id="zero-snr"
            ),
            pytest.param(NoiseSchedule.from_betas([0.2, 0.9, 0.9], name="linear"), id="misnamed"),
        ],
    )
    def test_diffusers_reads_the_same_schedule(self, diffusers, tmp_path, unet, schedule):
        folder = save(tmp_path / "model", unet, schedule)
        torch.testing.assert_close(load(folder).schedule.betas, schedule.betas, rtol=0, atol=1e-15)
        theirs = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        torch.testing.assert_close(theirs.betas, schedule.betas.float(), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param({"beta_schedule": "linear"}, id="linear"),
            pytest.param({"beta_schedule": "scaled_linear"}, id="scaled-linear"),
            pytest.param({"beta_schedule": "squaredcos_cap_v2"}, id="cosine"),
            pytest.param({"beta_schedule": "sigmoid"}, id="sigmoid"),
            pytest.param({"rescale_betas_zero_snr": True}, id="zero-snr"),
            pytest.param(
                {"trained_betas": [0.3, 0.6, 0.99], "num_train_timesteps": 3}, id="trained-betas"
            ),
        ],
    )
    def test_schedule_saved_by_diffusers(self, diffusers, folder, config):
        scheduler = diffusers.DDPMScheduler(**config)
        scheduler.save_pretrained(folder / "scheduler")
        betas = load(folder).schedule.betas
        torch.testing.assert_close(betas.float(), scheduler.betas, rtol=1e-4, atol=1e-6)


class TestLoad:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            pytest.param(
                {"prediction": "x0", "variance": "beta", "clip": 2.5, "spacing": "trailing"},
                {"prediction_type": "sample", "variance_type": "fixed_large"},
                id="x0-beta",
            ),
            pytest.param(
                {
                    "prediction": "v",
                    "variance": "learned_range",
                    "clip": None,
                    "spacing": "linspace",
                },
                {"prediction_type": "v_prediction", "variance_type": "learned_range"},
                id="v-learned-range",
            ),
        ],
    )
    def test_options_round_trip(self, tmp_path, unet, options, expected):
        found = load(save(tmp_path / "model", unet, NoiseSchedule.cosine(10), **options))
        assert {name: getattr(found, name) for name in options} == options
        assert expected.items() <= found.scheduler_config.items()

    @pytest.mark.parametrize(
        ("change", "attribute", "value"),
        [
            ({"variance_type": "fixed_small_log"}, "variance", "posterior"),
            ({"variance_type": "fixed_large_log"}, "variance", "beta"),
            ({"thresholding": True}, "clip", DynamicThreshold(0.995, 1.0)),
            (
                {
                    "thresholding": True,
                    "dynamic_thresholding_ratio": 0.9,
                    "sample_max_value": 4.0,
                    "clip_sample_range": 3.0,
                },
                "clip",
                DynamicThreshold(0.9, 4.0),
            ),
            ({"steps_offset": 1}, "steps_offset", 1),
            ({"clip_sample": False, "clip_sample_range": 3.0}, "clip", None),
        ],
    )
    def test_scheduler_option(self, folder, change, attribute, value):
        edit(folder / "scheduler/scheduler_config.json", change)
        assert getattr(load(folder), attribute) == value

    def test_unknown_scheduler_option_warns(self, folder):
        edit(folder / "scheduler/scheduler_config.json", {"use_karras_sigmas": True})
        with pytest.warns(UserWarning, match="use_karras_sigmas"):
            load(folder)

    def test_files_in_the_folder_itself(self, folder, unet):
        for path in [*folder.glob("*/*")]:
            path.rename(folder / path.name)
        for name in ("unet", "scheduler"):
            (folder / name).rmdir()
        found = load(folder)
        assert found.schedule == NoiseSchedule.linear()
        assert same_state(found.unet, unet)

    def test_unet_is_ready_to_sample(self, folder, unet):
        random = torch.get_rng_state()
        found = load(folder).unet
        assert torch.equal(random, torch.get_rng_state())
        assert not found.training
        assert same_state(found, unet)
        assert all(
            p.is_contiguous(memory_format=torch.channels_last)
            for p in found.parameters()
            if p.dim() == 4
        )
        assert torch.equal(found.time_proj.frequencies, unet.time_proj.frequencies)

    @pytest.mark.parametrize(
        ("stored", "asked"),
        [
            (torch.float32, torch.float16),
            (torch.float16, None),
            (torch.bfloat16, torch.float64),
            (torch.float64, None),
        ],
    )
    def test_dtype(self, tmp_path, unet, stored, asked):
        folder = save(tmp_path / "model", unet.to(stored))
        assert {v.dtype for v in load_file(folder / Path(UNET_FILE).name).values()} == {stored}
        found = load(folder, dtype=asked).unet
        assert found.dtype == (asked or torch.float32)
        want = unet.state_dict()
        for name, value in found.state_dict().items():
            assert torch.equal(value, want[name].to(value.dtype)), name


class TestSave:
    def test_files_and_permissions(self, folder):
        assert contents(folder).keys() == {
            *("model_index.json", "unet", "scheduler", CONFIG, SCHEDULER, UNET_FILE)
        }
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        modes = {path.stat().st_mode for path in folder.rglob("*.*")}
        assert len(modes) == 1, "weights as readable as the rest"

    def test_same_bytes_every_time(self, folder, unet, tmp_path):
        again = save(tmp_path / "deep/er/model", unet, NoiseSchedule.linear())
        assert contents(folder) == contents(again)

    def test_schedules_of_diffusers_are_saved_by_name(self, folder):
        config = json.loads((folder / SCHEDULER).read_text())
        assert (config["beta_schedule"], config["trained_betas"]) == ("linear", None)

    def test_existing_folder(self, folder, unet):
        before = contents(folder)
        with pytest.raises(FileExistsError, match=r"overwrite=True.*model"):
            save(folder, unet)
        assert contents(folder) == before
        save(folder, unet, overwrite=True)
        assert contents(folder).keys() == {"config.json", Path(UNET_FILE).name}
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

    def test_overwrite_keeps_other_files(self, folder, unet):
        (folder / "notes.txt").write_text("mine")
        before = contents(folder)
        with pytest.raises(FileExistsError, match=r"not part of a checkpoint \(notes.txt\)"):
            save(folder, unet, overwrite=True)
        assert contents(folder) == before

    def test_overwrite_through_a_link(self, folder, unet):
        link = folder.with_name("latest")
        link.symlink_to(folder)
        save(link, unet, overwrite=True)
        assert link.is_symlink()
        assert same_state(load(folder).unet, unet)

    def test_relative_folder(self, tmp_path, unet, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert save("model", unet) == Path("model")
        assert same_state(load("model").unet, unet)

    @pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
    def test_the_folder_is_complete_at_every_moment(self, folder, unet, monkeypatch, exists):
        target = folder if exists else folder.with_name("other")
        before = contents(folder)

        def watch(function):
            def wrapped(*args):
                assert target.exists() == exists
                assert contents(folder) == before
                function(*args)
                assert target.exists() == exists
                assert contents(folder) == before

            return wrapped

        for name in ("write_json", "write_weights"):
            monkeypatch.setattr(checkpoint, name, watch(getattr(checkpoint, name)))
        save(target, unet, overwrite=exists)
        assert same_state(load(target).unet, unet)
