"""`ddpm-fast sample`: files, options and errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from cli_runs import SIDE, T, error_of, run, sample, tiny_schedule, tiny_unet
from ddpm_fast import NoiseSchedule, Sampler, StepTable, philox_normal
from ddpm_fast.cli import methods
from ddpm_fast.cli import sample as sample_command
from ddpm_fast.ops.philox import STREAM_X_T
from ddpm_fast.utils.images import to_uint8
from engine_cases import small


def expected(model: Path, num: int, first: int = 0, batch: int = 2, **options: Any) -> np.ndarray:
    checkpoint = ddpm_fast.load(model)
    defaults = {"variance": checkpoint.variance, "clip": checkpoint.clip} | options
    table = StepTable.ddpm(checkpoint.schedule, **defaults)
    sampler = Sampler(checkpoint.unet, table, checkpoint.sample_shape, batch, "cpu")
    return sampler.sample(num, first_sample=first, progress=False).numpy()


def test_the_default_output_is_a_sheet(tiny: Path) -> None:
    result = sample(tiny, "--num", 3, "--batch", 2)
    with Image.open("out/tiny.png") as image:
        assert image.size == (2 * (96 + 2) + 2, 2 * (96 + 2) + 2)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines.keys() == {"model", "backend", "method", "steps", "images", "time", "wrote"}
    assert lines["model"] == f"{tiny}, 1 x {SIDE} x {SIDE}"
    assert lines["backend"].startswith("cpu on cpu (")
    assert lines["backend"].endswith("network in float32")
    assert lines["steps"] == "20 of 20, variance posterior"
    assert lines["images"] == "0 .. 2 of seed 0, 2 at a time"
    assert lines["wrote"] == "out/tiny.png"
    assert os.listdir("out") == ["tiny.png"]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        pytest.param((), {}, id="defaults"),
        pytest.param(("--steps", 7), {"steps": 7}, id="respaced"),
        pytest.param(("--variance", "beta"), {"variance": "beta"}, id="variance"),
        pytest.param(("--start", 9), {"start": 9}, id="start"),
        pytest.param(
            ("--start", "random", "--steps", 6), {"start": "random", "steps": 6}, id="random-start"
        ),
    ],
)
def test_an_array_has_the_samples_of_the_sampler(
    tiny: Path, args: tuple[object, ...], options: dict[str, Any]
) -> None:
    sample(tiny, "--num", 3, "--batch", 2, "--out", "a.npy", *args)
    array = np.load("a.npy", allow_pickle=False)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected(tiny, 3, **options), strict=True)


def test_options_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    model = ddpm_fast.save(
        "other", tiny_unet(1), tiny_schedule(), prediction="v", variance="beta", clip=None
    )
    result = sample(model, "--num", 2, "--batch", 2, "--out", "a.npy")
    assert "20 of 20, variance beta" in result.stdout
    np.testing.assert_array_equal(np.load("a.npy"), expected(model, 2, prediction="v"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_named_backend_runs(tiny: Path, backend: str) -> None:
    result = sample(tiny, "--num", 1, "--batch", 1, "--backend", backend, "--dtype", "bfloat16")
    assert f"{backend} on cpu (" in result.stdout
    assert "network in bfloat16" in result.stdout


def test_fewer_samples_are_the_same_samples(tiny: Path) -> None:
    sample(tiny, "--num", 4, "--batch", 4, "--seed", 5, "--out", "all.npy")
    args = ("--num", 2, "--batch", 4, "--seed", 5, "--first-sample", 2)
    result = sample(tiny, *args, "--out", "tail.npy")
    np.testing.assert_array_equal(np.load("tail.npy"), np.load("all.npy")[2:])
    assert "note: 2 images take as long as 4" in result.stderr
    sample(tiny, *args, "--seed", 6, "--out", "other.npy")
    assert not np.array_equal(np.load("tail.npy"), np.load("other.npy"))


@pytest.mark.parametrize("out", ["folder", "dotted.v1", "new/folder/", "here.png"])
def test_a_folder_has_a_file_for_each_image(tiny: Path, out: str) -> None:
    if out == "here.png":
        Path(out).mkdir()
    result = sample(tiny, "--num", 3, "--batch", 2, "--first-sample", 9, "--out", out)
    folder = Path(out)
    assert sorted(os.listdir(folder)) == ["00009.png", "00010.png", "00011.png"]
    pixels = to_uint8(torch.from_numpy(expected(tiny, 3, first=9))).numpy()
    for index, expected_pixels in enumerate(pixels, 9):
        with Image.open(folder / f"{index:05d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), expected_pixels[:, :, 0])
    assert result.stdout.endswith(f"{folder}/00009.png .. 00011.png\n")


def test_a_folder_has_one_array(tiny: Path) -> None:
    sample(tiny, "--num", 3, "--batch", 2, "--out", "folder", "--format", "npy")
    assert os.listdir("folder") == ["samples.npy"]
    np.testing.assert_array_equal(np.load("folder/samples.npy"), expected(tiny, 3))


@pytest.mark.parametrize(("first", "shown"), [(0, 1), (3, 3), (0, 8)])
def test_a_trajectory_shows_the_states_from_noise(tiny: Path, first: int, shown: int) -> None:
    args = ("--num", 6, "--batch", 2, "--scale", 1, "--first-sample", first, "--out", "a.npy")
    sample(tiny, *args, "--trajectory", "new/strip.png", "--trajectory-num", shown)
    array = np.load("a.npy")
    np.testing.assert_array_equal(array, expected(tiny, 6, first=first))
    with Image.open("new/strip.png") as image:
        strip = np.asarray(image)
    shown = min(shown, 6)
    cell = SIDE + 4
    grid = strip[-(shown * cell) :, -(10 * cell) :]
    x_T = to_uint8(philox_normal(shown, (1, SIDE, SIDE), 0, STREAM_X_T, first)).numpy()
    x_0 = to_uint8(torch.from_numpy(array)).numpy()
    for row in range(shown):
        cells = grid[row * cell :][:SIDE]
        np.testing.assert_array_equal(cells[:, :SIDE], x_T[row, :, :, 0])
        np.testing.assert_array_equal(cells[:, 9 * cell :][:, :SIDE], x_0[row, :, :, 0])


@pytest.mark.parametrize(
    ("args", "columns"),
    [
        pytest.param((), ["t = 19", "t = 10", "t = 0", "x_0"], id="timesteps"),
        pytest.param(
            ("--start", "random"), ["0 steps", "1 steps", "2 steps", "3 steps"], id="random-start"
        ),
    ],
)
def test_a_trajectory_names_its_columns(
    tiny: Path, args: tuple[object, ...], columns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    draw = sample_command.sheet
    monkeypatch.setattr(sample_command, "sheet", lambda *a: calls.append(a) or draw(*a))
    options = ("--num", 3, "--batch", 2, "--steps", 3, "--first-sample", 5, "--out", "a.npy")
    sample(tiny, *options, *args, "--trajectory", "strip.png")
    assert calls[0][-2:] == (["5", "6", "7"], columns)


def test_a_cpu_has_fewer_steps_by_default(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.CPU_STEPS == 250
    monkeypatch.setattr(methods, "CPU_STEPS", 6)
    result = sample(tiny, "--num", 1, "--batch", 1, "--out", "a.npy")
    assert "6 of 20 (the default on a CPU; --steps 20 takes all)" in result.stdout
    np.testing.assert_array_equal(np.load("a.npy"), expected(tiny, 1, batch=1, steps=6))


def test_a_warning_is_a_note() -> None:
    with pytest.warns(ddpm_fast.ScheduleWarning):
        ddpm_fast.save("short", tiny_unet(), NoiseSchedule.linear(5))
    result = sample(Path("short"), "--num", 1, "--batch", 1)
    assert result.stderr.startswith("note: schedule linear: x_T keeps")
    assert len(result.stderr.splitlines()) == 1


def test_the_shipped_model_is_the_default() -> None:
    args = ("--num", 2, "--batch", 2, "--steps", 2, "--device", "cpu", "--no-progress")
    result = run("sample", *args)
    assert "triangles (shipped), 1 x 32 x 32" in result.stdout
    assert "2 of 1000, variance posterior" in result.stdout
    with Image.open("out/triangles.png") as image:
        assert image.mode == "L"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("--dtype", "float8"), "--dtype must be float32, float16", id="dtype"),
        pytest.param(("--device", "toaster"), "--device must be cpu, cuda or cuda:N", id="device"),
        pytest.param(("--device", "meta"), "--device must be cpu, cuda or cuda:N", id="meta"),
        pytest.param(("--backend", "fast"), "backend must be auto, reference", id="backend"),
        pytest.param(("--backend", "cuda"), "backend 'cuda' cannot run", id="backend-elsewhere"),
        pytest.param(("--variance", "huge"), "variance must be one of posterior", id="variance"),
        pytest.param(("--steps", 21), "steps must be an integer in [1, 20]", id="too-many-steps"),
        pytest.param(("--steps", 9, "--start", 8), "steps must be an integer in [1, 8]", id="both"),
        pytest.param(("--start", 21), "start must be an integer in [1, 20]", id="late-start"),
        pytest.param(("--start", "0"), "start must be an integer in [1, 20]", id="no-start"),
        pytest.param(("--start", "end"), "--start must be a step from 1 or random", id="start"),
        pytest.param(("--format", "gif"), "--format must be png or npy", id="format"),
        pytest.param(
            ("--format", "npy", "--out", "a.png"), "--format npy does not fit", id="mismatch"
        ),
        pytest.param(("--out", "a.jpg"), "--out must end in .png or .npy", id="jpeg"),
        pytest.param(("--trajectory", "a.npy"), "--trajectory must be a .png", id="strip-kind"),
        pytest.param(
            ("--out", "a.png", "--trajectory", "./a.png"), "must differ", id="strip-is-out"
        ),
        pytest.param(("--seed", 1 << 64), "seed must be an integer in", id="seed"),
        pytest.param(("--model", "nowhere"), "nowhere: no such checkpoint folder", id="model"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(
    tiny: Path, args: tuple[object, ...], message: str
) -> None:
    result = sample(tiny, "--num", 1, "--batch", 1, *args, status=2)
    assert message in error_of(result)
    assert not [path for path in Path().rglob("*") if path.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(tiny: Path) -> None:
    result = sample(tiny, "--device", "cuda:1", status=2)
    assert "--device cuda:1: torch finds no NVIDIA GPU" in error_of(result)


def test_a_variant_of_the_weights_is_sampled() -> None:
    ddpm_fast.save("model", tiny_unet(), tiny_schedule(), variant="bf16")
    result = sample(Path("model"), "--variant", "bf16", "--num", 1, "--batch", 1)
    assert f"model    model (bf16), 1 x {SIDE} x {SIDE}\n" in result.stdout


def test_a_model_may_be_a_repository(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: {"owner/shapes": tiny}[name])
    result = sample(Path("owner/shapes"), "--num", 1, "--batch", 1)
    assert f"model    owner/shapes, 1 x {SIDE} x {SIDE}\n" in result.stdout
    assert os.listdir("out") == ["shapes.png"]


def scheduler_with(**options: object) -> dict[str, object]:
    return {"num_train_timesteps": T, "beta_end": 0.5, **options}


@pytest.mark.parametrize(
    ("unet", "scheduler", "reason"),
    [
        pytest.param({}, None, "it holds a network alone", id="no-schedule"),
        pytest.param({"sample_size": None}, {}, "has no sample_size", id="no-size"),
        pytest.param({"class_embed_type": "timestep"}, {}, "embeds its labels", id="labels"),
    ],
)
def test_a_checkpoint_that_cannot_be_sampled_is_rejected(
    unet: dict[str, Any], scheduler: dict[str, object] | None, reason: str
) -> None:
    config = None if scheduler is None else scheduler_with(**scheduler)
    ddpm_fast.save("model", tiny_unet(**unet), scheduler_config=config)
    result = sample(Path("model"), status=2)
    assert error_of(result).startswith("error: model: cannot be used here: ")
    assert reason in error_of(result)
    assert os.listdir() == ["model"]


def test_only_arrays_can_have_two_channels() -> None:
    ddpm_fast.save("model", tiny_unet(channels=2), tiny_schedule())
    result = sample(Path("model"), status=2)
    assert "--format png needs 1 or 3 channels; model has 2" in error_of(result)
    sample(Path("model"), "--num", 1, "--batch", 1, "--format", "npy")
    assert np.load("out/model.npy").shape == (1, 2, SIDE, SIDE)


def test_an_invalid_output_is_found_before_sampling(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *_, **__: pytest.fail("sampled"))
    Path("file").write_text("")
    for args in (("--out", "file/a.png"), ("--trajectory", "file/a.png")):
        line = error_of(sample(tiny, *args, status=2))
        assert line == "error: file: folder cannot be written to: File exists"


@pytest.mark.parametrize("out", ["a.png", "a.npy", "folder/"])
def test_a_full_disk_is_one_line_and_leaves_no_file(
    tiny: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    result = sample(tiny, "--num", 1, "--batch", 1, "--out", out, status=2)
    name = "folder/00000.png" if out == "folder/" else out
    assert error_of(result) == f"error: {name}: file cannot be written: No space left on device"
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_nan_is_noted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Sampler, "sample", lambda *_, **__: torch.full((1, 1, SIDE, SIDE), float("nan"))
    )
    result = sample(tiny, "--num", 1, "--batch", 1)
    assert result.stderr == f"note: 1 of 1 images hold NaN ({SIDE * SIDE} values), drawn black\n"


@pytest.fixture
def long_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    unet = small(in_channels=1, out_channels=1, sample_size=8)
    return ddpm_fast.save(tmp_path / "model", unet, NoiseSchedule.linear(1200, 1e-4, 0.01))


def engine_run(model: Path, *options: str) -> tuple[np.ndarray, dict[str, str]]:
    args = ("--num", 3, "--batch", 2, "--steps", 4, "--device", "cpu", "--no-progress")
    result = run("sample", "--model", model, *args, "--out", "a.npy", *options)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    return np.load("a.npy"), lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_samples_the_same_images_and_is_reported(long_chain: Path, dtype: str) -> None:
    """Also for more than 1000 timesteps."""
    images, lines = engine_run(long_chain, "--dtype", dtype)
    names = ["module", "engine float32"] + (["engine bfloat16"] if dtype == "bfloat16" else [])
    shape, chosen = lines["engine"].split(": ")
    assert shape == "2x1x8x8"
    assert chosen.startswith(tuple(names))
    assert all(f"{name} " in chosen for name in names)
    plain, others = engine_run(long_chain, "--no-engine")
    assert "engine" not in others
    assert np.abs(images - plain).max() < (1e-3 if dtype == "float32" else 1)
