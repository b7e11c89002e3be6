"""Checkpoints that are corrupt, foreign or missing, and disks that fail under a save."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint_cases import (
    CONFIG,
    OPTIONS,
    SCHEDULER,
    UNET_FILE,
    contents,
    edit,
)
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint import checkpoint, weights
from ddpm_fast.models.checkpoint.checkpoint import load, save
from ddpm_fast.utils import files


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(**OPTIONS).eval()


@pytest.fixture
def folder(tmp_path, unet):
    return save(tmp_path / "model", unet, NoiseSchedule.linear())


def edit_json(name, **change):
    return lambda folder: edit(folder / name, change)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit_weights(change):
    def apply(folder):
        state = load_file(folder / UNET_FILE)
        change(state)
        save_file(state, folder / UNET_FILE)

    return apply


def other_kind(folder):
    (folder / UNET_FILE).rename(folder / "unet/model.ckpt")


BIAS = "conv_out.bias"
CORRUPTIONS = [
    pytest.param(write("model_index.json", b"{"), "model_index.json.*JSON", id="index-cut"),
    pytest.param(
        edit_json("model_index.json", _class_name="StableDiffusionPipeline"),
        "model_index.json.*DDPMPipeline.*StableDiffusion",
        id="other-pipeline",
    ),
    pytest.param(
        edit_json("model_index.json", unet=["diffusers", "UNet2DConditionModel"]),
        "model_index.json.*UNet2DConditionModel",
        id="other-unet",
    ),
    pytest.param(
        edit_json("model_index.json", scheduler=["diffusers", "LMSDiscreteScheduler"]),
        "model_index.json.*LMSDiscreteScheduler",
        id="other-scheduler",
    ),
    pytest.param(edit_json("model_index.json", unet=None), "unet is None", id="index-no-unet"),
    pytest.param(write(CONFIG, b"\x80\x04\xff"), "config.json.*JSON", id="config-bytes"),
    pytest.param(write(CONFIG, b"[" * 100_000), "config.json.*JSON", id="config-nested"),
    pytest.param(write(CONFIG, b"[1]"), "config.json.*object.*list", id="config-list"),
    pytest.param(
        edit_json(CONFIG, _class_name="VQModel"), "config.json.*VQModel", id="config-class"
    ),
    pytest.param(
        edit_json(CONFIG, norm_eps=float("nan")), "config.json.*NaN is not", id="config-nan"
    ),
    pytest.param(
        write(CONFIG, b'{"act_fn": "silu", "act_fn": "gelu"}'),
        "config.json.*'act_fn' is repeated",
        id="config-key-twice",
    ),
    pytest.param(
        edit_json(CONFIG, norm_eps=float("inf")),
        "config.json.*norm_eps must .*got inf",
        id="config-infinite",
    ),
    pytest.param(
        edit_json(CONFIG, act_fn="gelu"), "config.json.*act_fn must .*got 'gelu'", id="config-value"
    ),
    pytest.param(edit_json(CONFIG, extra=1), "config.json.*got 'extra'", id="config-unknown-key"),
    pytest.param(truncate(SCHEDULER, 40), "scheduler_config.json.*JSON", id="scheduler-cut"),
    pytest.param(
        edit_json(SCHEDULER, _class_name="LMSDiscreteScheduler"),
        "scheduler_config.json.*LMSDiscrete",
        id="scheduler-class",
    ),
    pytest.param(
        edit_json(SCHEDULER, beta_schedule="laplace"),
        "scheduler_config.json.*beta_schedule .*must be .*; got 'laplace'",
        id="beta-schedule",
    ),
    pytest.param(
        edit_json(SCHEDULER, trained_betas=[0.1, 1.5], num_train_timesteps=2),
        "scheduler_config.json.*1.5",
        id="beta-above-one",
    ),
    pytest.param(
        edit_json(SCHEDULER, trained_betas=[0.1, 0.999]),
        "num_train_timesteps .*must be .*; got 1000",
        id="betas-and-length",
    ),
    pytest.param(
        edit_json(SCHEDULER, beta_end="0.02"), "scheduler_config.json.*beta_end", id="beta-string"
    ),
    pytest.param(
        edit_json(SCHEDULER, num_train_timesteps=10.5), "scheduler_config.json.*10.5", id="steps"
    ),
    pytest.param(
        edit_json(SCHEDULER, prediction_type="flow"),
        "prediction_type .*must be .*; got 'flow'",
        id="prediction",
    ),
    pytest.param(
        edit_json(SCHEDULER, variance_type="big"),
        "variance_type .*must be .*; got 'big'",
        id="variance",
    ),
    pytest.param(
        edit_json(SCHEDULER, timestep_spacing=3),
        "timestep_spacing .*must be .*; got 3",
        id="spacing",
    ),
    pytest.param(edit_json(SCHEDULER, clip_sample=1), "clip_sample .*must be .*; got 1", id="clip"),
    pytest.param(
        edit_json(SCHEDULER, clip_sample_range=-1),
        "clip_sample_range .*must be .*; got -1",
        id="range",
    ),
    pytest.param(
        edit_json(SCHEDULER, steps_offset=-1), "steps_offset .*must be .*; got -1", id="offset"
    ),
    pytest.param(write(UNET_FILE, b""), "safetensors.*not a whole", id="weights-empty"),
    pytest.param(truncate(UNET_FILE, 3000), "safetensors.*not a whole", id="weights-header-cut"),
    pytest.param(truncate(UNET_FILE, -4), "safetensors.*not a whole", id="weights-cut"),
    pytest.param(
        write(UNET_FILE, b"\x80\x02}q\x00." * 1000), "safetensors.*not a whole", id="weights-pickle"
    ),
    pytest.param(edit_weights(lambda s: s.pop(BIAS)), f"missing: {BIAS}", id="key-missing"),
    pytest.param(
        edit_weights(lambda s: s.update(lora=torch.ones(1))), "does not have: lora", id="key-extra"
    ),
    pytest.param(
        edit_weights(lambda s: s.update({BIAS: torch.ones(2)})),
        rf"{BIAS} is F32 \[2\], expected \[1\]",
        id="shape",
    ),
    pytest.param(
        edit_weights(lambda s: s.update({BIAS: torch.ones(1, dtype=torch.int8)})),
        f"{BIAS} is I8",
        id="integer-weights",
    ),
    pytest.param(
        edit_weights(lambda s: s.update({BIAS: torch.full((1,), torch.nan)})),
        f"{BIAS} has values that are not finite",
        id="nan-weights",
    ),
    pytest.param(
        edit_weights(lambda s: s.update({f"module.{BIAS}": s.pop(BIAS)})),
        f"missing: {BIAS}",
        id="key-renamed",
    ),
    pytest.param(
        edit_weights(
            lambda s: s.update(
                {"mid_block.attentions.0.query.bias": s["mid_block.attentions.0.to_q.bias"].clone()}
            )
        ),
        "are the same weight",
        id="old-and-new-key",
    ),
    pytest.param(
        edit_json(CONFIG, block_out_channels=[1 << 20, 1 << 21]),
        "safetensors: .* expected",
        id="config-for-larger-weights",
    ),
]


class TestRefusedOnLoad:
    @pytest.mark.parametrize(("corrupt", "match"), CORRUPTIONS)
    def test_corrupt_or_foreign(self, folder, corrupt, match):
        corrupt(folder)
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize(
        ("corrupt", "match"),
        [
            pytest.param(remove(CONFIG), "missing.*unet/config.json", id="config"),
            pytest.param(remove(SCHEDULER), "missing.*scheduler_config.json", id="scheduler"),
            pytest.param(remove(UNET_FILE), "missing.*safetensors", id="weights"),
            pytest.param(other_kind, r"missing; model\.ckpt is of another kind", id="ckpt-instead"),
        ],
    )
    def test_missing_file(self, folder, corrupt, match):
        corrupt(folder)
        with pytest.raises(FileNotFoundError, match=match):
            load(folder)

    def test_no_folder_and_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such checkpoint folder.*google"):
            load(tmp_path / "google/ddpm-cifar10-32")
        with pytest.raises(FileNotFoundError, match=r"missing.*config.json"):
            load(tmp_path)

    @pytest.mark.parametrize("name", ["model.ckpt", "diffusion_pytorch_model.bin", "ema.pt"])
    def test_file_instead_of_a_folder(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x80\x02.")
        with pytest.raises(ValueError, match=rf"{name}: is a file; expected a folder"):
            load(tmp_path / name)

    def test_dtype(self, folder):
        with pytest.raises(ValueError, match=r"dtype must .*torch.bfloat16.*torch.int8"):
            load(folder, dtype=torch.int8)

    def test_device(self, folder):
        with pytest.raises(ValueError, match=r"device must .*'gpu'"):
            load(folder, device="gpu")

    def test_weights_beyond_the_dtype(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv_in.bias[0] = 1e5
        folder = save(tmp_path / "model", unet)
        with pytest.raises(ValueError, match=r"conv_in.bias has values torch.float16 cannot hold"):
            load(folder, dtype=torch.float16)
        assert load(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(state, path, metadata):
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def fails_at_last_rename(monkeypatch):
    rename = Path.rename

    def guarded(self, target):
        if self.suffix == ".tmp":
            full_disk()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", guarded)
    cannot_swap_names(monkeypatch)


def cannot_swap_names(monkeypatch):
    monkeypatch.setattr(files, "swap_names", lambda a, b: False)


def fails_after_last_rename(monkeypatch):
    monkeypatch.setattr(files, "fsync_path", full_disk)


def fails_after_renames_one_by_one(monkeypatch):
    cannot_swap_names(monkeypatch)
    fails_after_last_rename(monkeypatch)


FAILURES = [
    pytest.param(lambda m: m.setattr(checkpoint, "write_weights", full_disk), id="weights"),
    pytest.param(
        lambda m: m.setattr(weights, "save_file", full_disk_in_safetensors), id="safetensors"
    ),
    pytest.param(lambda m: m.setattr(checkpoint, "fsync_path", full_disk), id="fsync"),
    pytest.param(lambda m: m.setattr(checkpoint, "write_json", full_disk), id="json"),
    pytest.param(fails_at_last_rename, id="rename"),
    pytest.param(fails_after_last_rename, id="fsync-of-parent"),
    pytest.param(fails_after_renames_one_by_one, id="fsync-of-parent-without-swap"),
]


class TestFailureOnSave:
    @pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
    @pytest.mark.parametrize("fail", FAILURES)
    def test_disk_error_leaves_all_as_it_was(self, folder, unet, monkeypatch, fail, exists):
        before = contents(folder.parent)
        target = folder if exists else folder.with_name("other")
        fail(monkeypatch)
        with pytest.raises(OSError, match=rf"No space left.*{target.name}") as caught:
            save(target, unet, NoiseSchedule.cosine(10), overwrite=exists)
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert contents(folder.parent) == before

    def test_replaced_at_no_moment_without_a_checkpoint(self, folder, unet, monkeypatch):
        """Where names can be exchanged nothing is renamed; where not, the end is the same."""
        exchanged = []
        swap_names = files.swap_names
        monkeypatch.setattr(
            files, "swap_names", lambda a, b: exchanged.append(swap_names(a, b)) or exchanged[-1]
        )
        for T in (10, 20):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", full_disk)
                try:
                    save(folder, unet, NoiseSchedule.cosine(T), overwrite=True)
                except OSError:
                    assert exchanged == [False]
                    pytest.skip("needs a file system that exchanges names")
            assert load(folder).schedule.T == T
        assert exchanged == [True, True]
        cannot_swap_names(monkeypatch)
        save(folder, unet, NoiseSchedule.cosine(30), overwrite=True)
        assert load(folder).schedule.T == 30
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_interrupt_leaves_all_as_it_was(self, folder, unet, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        before = contents(folder.parent)
        monkeypatch.setattr(checkpoint, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(folder, unet, overwrite=True)
        assert contents(folder.parent) == before

    def test_file_size_limit(self, tmp_path):
        """A real write error in the middle of the weights, in a process of its own."""
        code = f"""
import resource, signal, sys
from ddpm_fast import UNet, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save({str(tmp_path / "model")!r}, UNet(**{OPTIONS!r}))
except OSError as error:
    sys.exit(f"{{error.errno}} {{error}}")
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"{errno.EFBIG} " in result.stderr
        assert "model" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_cannot_be_made(self, tmp_path, unet):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"cannot be saved.*file/model"):
            save(tmp_path / "file/model", unet)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_file_in_the_way(self, tmp_path, unet):
        (tmp_path / "model").write_text("mine")
        with pytest.raises(FileExistsError, match=r"a file has the checkpoint's name.*model"):
            save(tmp_path / "model", unet, overwrite=True)
        assert (tmp_path / "model").read_text() == "mine"

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            pytest.param({"schedule": [0.1]}, TypeError, "schedule must .*list", id="schedule"),
            pytest.param(
                {"prediction": "flow"}, ValueError, "prediction must .*'flow'", id="predict"
            ),
            pytest.param(
                {"variance": "fixed_small"}, ValueError, "variance must .*fixed", id="variance"
            ),
            pytest.param({"spacing": "quad"}, ValueError, "spacing must .*'quad'", id="spacing"),
            pytest.param({"clip": -1.0}, ValueError, "clip must .*-1.0", id="clip"),
            pytest.param({"scheduler_config": {}}, ValueError, "either", id="both"),
            pytest.param(
                {"schedule": None, "scheduler_config": {"beta_schedule": "?"}},
                ValueError,
                "beta_schedule .*must be .*; got '",
                id="config",
            ),
            pytest.param(
                {"schedule": None, "scheduler_config": {"_note": float("nan")}},
                ValueError,
                "NaN is not",
                id="config-nan",
            ),
        ],
    )
    def test_arguments(self, tmp_path, unet, arguments, error, match):
        arguments = {"schedule": NoiseSchedule.cosine(10)} | arguments
        with pytest.raises(error, match=match):
            save(tmp_path / "model", unet, **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_module_of_another_kind(self, tmp_path):
        with pytest.raises(TypeError, match="unet must be a UNet or ThesisUNet; got Linear"):
            save(tmp_path / "model", torch.nn.Linear(1, 1))

    def test_weights_that_are_not_finite(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv_in.bias[0] = torch.inf
        with pytest.raises(ValueError, match=r"unet: conv_in.bias has values that are not finite"):
            save(tmp_path / "model", unet)
        assert list(tmp_path.iterdir()) == []
