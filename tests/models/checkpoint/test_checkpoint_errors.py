"""Checkpoints that are damaged, of another format or missing, and disks that fail during `save`."""

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint_cases import (
    CONFIG,
    INDEX,
    OPTIONS,
    SCHEDULER,
    UNET_FILE,
    contents,
    edit_json,
    truncate,
    write,
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


def edit_weights(change):
    def apply(folder):
        state = load_file(folder / UNET_FILE)
        change(state)
        save_file(state, folder / UNET_FILE)

    return apply


def set_bias(value):
    return edit_weights(lambda state: state.update({BIAS: value}))


def add_old_key(state):
    key = "mid_block.attentions.0.{}.bias"
    state[key.format("query")] = state[key.format("to_q")].clone()


BIAS = "conv_out.bias"
TRUNCATED = "safetensors: truncated or not a safetensors file"
# fmt: off
CORRUPTIONS = {
    "index-cut": (write(INDEX, b"{"), "model_index.json.*JSON"),
    "other-pipeline": (
        edit_json(INDEX, _class_name="StableDiffusionPipeline"),
        "model_index.json: _class_name must be DDPMPipeline.*got 'StableDiffusion"),
    "other-unet": (
        edit_json(INDEX, unet=["diffusers", "UNet2DConditionModel"]),
        "model_index.json.*UNet2DConditionModel"),
    "other-scheduler": (
        edit_json(INDEX, scheduler=["diffusers", "LMSDiscreteScheduler"]),
        "model_index.json.*LMSDiscreteScheduler"),
    "index-no-unet": (edit_json(INDEX, unet=None), "unet must .*got None"),
    "config-bytes": (write(CONFIG, b"\x80\x04\xff"), "config.json.*JSON"),
    "config-nested": (write(CONFIG, b"[" * 100_000), "config.json.*JSON"),
    "config-list": (write(CONFIG, b"[1]"), "config.json.*object.*list"),
    "config-class": (edit_json(CONFIG, _class_name="VQModel"), "config.json.*VQModel"),
    "config-nan": (edit_json(CONFIG, norm_eps=float("nan")), "config.json.*NaN is not"),
    "config-key-twice": (
        write(CONFIG, b'{"act_fn": "silu", "act_fn": "gelu"}'),
        "config.json.*'act_fn' is repeated"),
    "config-infinite": (
        edit_json(CONFIG, norm_eps=float("inf")), "config.json.*norm_eps must .*got inf"),
    "config-value": (edit_json(CONFIG, act_fn="gelu"), "config.json.*act_fn must .*got 'gelu'"),
    "config-of-another-network": (
        edit_json(CONFIG, cross_attention_dim=8), "config.json.*got 'cross_attention_dim'"),
    "scheduler-cut": (truncate(SCHEDULER, 40), "scheduler_config.json.*JSON"),
    "scheduler-class": (
        edit_json(SCHEDULER, _class_name="LMSDiscreteScheduler"),
        "scheduler_config.json.*LMSDiscrete"),
    "beta-schedule": (
        edit_json(SCHEDULER, beta_schedule="exp"),
        "scheduler_config.json.*beta_schedule must .*got 'exp'"),
    "beta-above-one": (
        edit_json(SCHEDULER, trained_betas=[0.1, 1.5], num_train_timesteps=2),
        "scheduler_config.json.*1.5"),
    "betas-and-length": (
        edit_json(SCHEDULER, trained_betas=[0.1, 0.999]), "num_train_timesteps must .*got 1000"),
    "beta-string": (edit_json(SCHEDULER, beta_end="0.02"), "scheduler_config.json.*beta_end"),
    "steps": (edit_json(SCHEDULER, num_train_timesteps=10.5), "scheduler_config.json.*10.5"),
    "prediction": (
        edit_json(SCHEDULER, prediction_type="flow"), "prediction_type must .*got 'flow'"),
    "variance": (edit_json(SCHEDULER, variance_type="big"), "variance_type must .*got 'big'"),
    "spacing": (edit_json(SCHEDULER, timestep_spacing=3), "timestep_spacing must .*got 3"),
    "clip": (edit_json(SCHEDULER, clip_sample="no"), "clip_sample must .*got 'no'"),
    "range": (edit_json(SCHEDULER, clip_sample_range=-1), "clip_sample_range must .*got -1"),
    "offset": (edit_json(SCHEDULER, steps_offset=-1), "steps_offset must .*got -1"),
    "weights-empty": (write(UNET_FILE, b""), TRUNCATED),
    "weights-header-cut": (truncate(UNET_FILE, 3000), TRUNCATED),
    "weights-cut": (truncate(UNET_FILE, -4), TRUNCATED),
    "weights-pickle": (write(UNET_FILE, b"\x80\x02}q\x00." * 1000), TRUNCATED),
    "key-missing": (edit_weights(lambda s: s.pop(BIAS)), f"missing: {BIAS}"),
    "key-extra": (edit_weights(lambda s: s.update(lora=torch.ones(1))), "does not have: lora"),
    "shape": (
        set_bias(torch.ones(2)), rf"{BIAS} must be \[1\] in one of F64, F32, .*; got F32 \[2\]"),
    "integer-weights": (set_bias(torch.ones(1, dtype=torch.int8)), f"{BIAS} must .*got I8"),
    "nan-weights": (set_bias(torch.full((1,), torch.nan)), f"{BIAS} has values .* not finite"),
    "key-renamed": (
        edit_weights(lambda s: s.update({f"renamed.{BIAS}": s.pop(BIAS)})), f"missing: {BIAS}"),
    "old-and-new-key": (edit_weights(add_old_key), "are the same weight"),
    "config-for-larger-weights": (
        edit_json(CONFIG, block_out_channels=[1 << 20, 1 << 21]),
        r"safetensors: conv_in.weight must be \[1048576, .*got F32 \[8"),
}
# fmt: on


class TestLoad:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_damaged_or_unsupported_file(self, folder, name):
        corrupt, match = CORRUPTIONS[name]
        corrupt(folder)
        with pytest.raises(ValueError, match=match) as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize("name", [CONFIG, SCHEDULER, UNET_FILE])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"missing.*{name}"):
            load(folder)

    def test_weights_of_another_format(self, folder):
        (folder / UNET_FILE).rename(folder / "unet/model.ckpt")
        with pytest.raises(FileNotFoundError, match=r"missing; model\.ckpt has another format"):
            load(folder)

    def test_no_folder_and_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such checkpoint folder.*google"):
            load(tmp_path / "google/ddpm-cifar10-32")
        with pytest.raises(FileNotFoundError, match=r"missing.*config.json"):
            load(tmp_path)

    def test_file_instead_of_a_folder(self, tmp_path):
        (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
        with pytest.raises(ValueError, match=r"model.ckpt: is a file; must be a folder"):
            load(tmp_path / "model.ckpt")

    def test_dtype_and_device(self, folder):
        with pytest.raises(ValueError, match=r"dtype must .*torch.bfloat16.*torch.int8"):
            load(folder, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"device must .*'gpu'"):
            load(folder, device="gpu")

    def test_weights_out_of_range_of_the_dtype(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv_in.bias[0] = 1e5
        folder = save(tmp_path / "model", unet)
        match = r"conv_in.bias has values that torch.float16 cannot represent"
        with pytest.raises(ValueError, match=match):
            load(folder, dtype=torch.float16)
        assert load(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(state, path, metadata):
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def cannot_swap_names(monkeypatch):
    monkeypatch.setattr(files, "swap_names", lambda a, b: False)


def fails_at_last_rename(monkeypatch):
    rename = Path.rename

    def guarded(self, target):
        return full_disk() if self.suffix == ".tmp" else rename(self, target)

    monkeypatch.setattr(Path, "rename", guarded)
    cannot_swap_names(monkeypatch)


def fails_after_last_rename(monkeypatch):
    monkeypatch.setattr(files, "fsync_path", full_disk)


def fails_after_two_renames(monkeypatch):
    cannot_swap_names(monkeypatch)
    fails_after_last_rename(monkeypatch)


FAILURES = {
    "weights": lambda m: m.setattr(checkpoint, "write_weights", full_disk),
    "safetensors": lambda m: m.setattr(weights, "save_file", full_disk_in_safetensors),
    "fsync": lambda m: m.setattr(checkpoint, "fsync_path", full_disk),
    "json": lambda m: m.setattr(checkpoint, "write_json", full_disk),
    "rename": fails_at_last_rename,
    "fsync-of-parent": fails_after_last_rename,
    "fsync-of-parent-without-swap": fails_after_two_renames,
}


class TestSave:
    @pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
    @pytest.mark.parametrize("fail", FAILURES)
    def test_nothing_changes_after_an_error(self, folder, unet, monkeypatch, fail, exists):
        before = contents(folder.parent)
        target = folder if exists else folder.with_name("other")
        FAILURES[fail](monkeypatch)
        with pytest.raises(OSError, match=rf"No space left.*{target.name}") as caught:
            save(target, unet, NoiseSchedule.cosine(10), overwrite=exists)
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert contents(folder.parent) == before

    def test_replacement_is_atomic_where_names_can_be_swapped(self, folder, unet, monkeypatch):
        swapped = []
        swap_names = files.swap_names
        monkeypatch.setattr(
            files, "swap_names", lambda a, b: swapped.append(swap_names(a, b)) or swapped[-1]
        )
        for T in (10, 20):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", full_disk)
                try:
                    save(folder, unet, NoiseSchedule.cosine(T), overwrite=True)
                except OSError:
                    assert swapped == [False]
                    pytest.skip("needs a file system that swaps names")
            assert load(folder).schedule.T == T
        assert swapped == [True, True]
        cannot_swap_names(monkeypatch)
        save(folder, unet, NoiseSchedule.cosine(30), overwrite=True)
        assert load(folder).schedule.T == 30
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_nothing_changes_after_an_interrupt(self, folder, unet, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        before = contents(folder.parent)
        monkeypatch.setattr(checkpoint, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(folder, unet, overwrite=True)
        assert contents(folder.parent) == before

    def test_file_size_limit(self, tmp_path, unet):
        """A write error of the operating system in the middle of the weights."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(OSError, match=r"cannot be saved.*model") as caught:
                save(tmp_path / "model", unet)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert caught.value.errno == errno.EFBIG
        assert list(tmp_path.iterdir()) == []

    def test_file_in_the_path(self, tmp_path, unet):
        (tmp_path / "model").write_text("mine")
        with pytest.raises(OSError, match=r"cannot be saved.*model/part"):
            save(tmp_path / "model/part", unet)
        with pytest.raises(FileExistsError, match=r"a file has the checkpoint's name.*model"):
            save(tmp_path / "model", unet, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model").read_text() == "mine"

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"schedule": [0.1]}, TypeError, "schedule must .*list"),
            ({"prediction": "flow"}, ValueError, "prediction must .*'flow'"),
            ({"variance": "fixed_small"}, ValueError, "variance must .*fixed"),
            ({"spacing": "quad"}, ValueError, "spacing must .*'quad'"),
            ({"clip": -1.0}, ValueError, "clip must .*-1.0"),
            ({"scheduler_config": {}}, ValueError, "None with a schedule; got both"),
            (
                {"schedule": None, "scheduler_config": {"beta_schedule": "?"}},
                ValueError,
                "beta_schedule must .*got '",
            ),
            (
                {"schedule": None, "scheduler_config": {"_note": float("nan")}},
                ValueError,
                "NaN is not",
            ),
        ],
    )
    def test_arguments(self, tmp_path, unet, arguments, error, match):
        arguments = {"schedule": NoiseSchedule.cosine(10)} | arguments
        with pytest.raises(error, match=match):
            save(tmp_path / "model", unet, **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_network_of_another_class(self, tmp_path):
        with pytest.raises(TypeError, match="unet must be a UNet or ThesisUNet; got Linear"):
            save(tmp_path / "model", torch.nn.Linear(1, 1))

    def test_weights_that_are_not_finite(self, tmp_path, unet):
        with torch.no_grad():
            unet.conv_in.bias[0] = torch.inf
        with pytest.raises(ValueError, match=r"unet: conv_in.bias has values that are not finite"):
            save(tmp_path / "model", unet)
        assert list(tmp_path.iterdir()) == []
