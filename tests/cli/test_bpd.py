"""`ddpm-fast bpd`: output, files, figure, data and errors."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from cli_runs import SIDE, T, error_of, run, tiny_schedule, tiny_unet
from ddpm_fast import DynamicThreshold
from ddpm_fast.cli import bpd as bpd_command
from ddpm_fast.cli.model import OpenModel
from ddpm_fast.diffusion.likelihood import variational_bound

SHAPE = (1, SIDE, SIDE)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE), np.uint8)


def saved(folder: str, *args: Any, **options: Any) -> Path:
    return ddpm_fast.save(folder, tiny_unet(0, *args), tiny_schedule(), **options)


@pytest.fixture(autouse=True)
def _model_and_data(tiny: Path, _in_a_temporary_folder: None) -> None:
    np.save("data.npy", PIXELS)
    shutil.copytree(tiny, "model")


def bpd(*args: object, model: object = "model", data: object = "data.npy", status: int = 0) -> Any:
    options = ("--device", "cpu", "--no-progress", "--no-engine")
    return run("bpd", "--model", model, "--data", data, *options, *args, status=status)


def lines_of(result: Any) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def expected(num: int = 5, model: str = "model", **options: Any) -> Any:
    checkpoint = ddpm_fast.load(model)
    x0 = torch.from_numpy(PIXELS[:num, None].astype(np.float32) / np.float32(127.5) - 1)
    defaults = {"variance": checkpoint.variance, "pad": False, "progress": False} | options
    return variational_bound(checkpoint.unet, checkpoint.schedule, x0, **defaults)


def rows_of(path: str = "out/bpd.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_parts_are_printed_and_a_row_is_written_for_each_timestep() -> None:
    lines = lines_of(bpd())
    bound = expected()
    assert lines["model"] == f"model, 1 x {SIDE} x {SIDE}"
    assert lines["data"] == "data.npy, 5 images"
    assert lines["steps"] == "20 of 20, variance posterior, decoder discretised"
    assert lines["wrote"] == "out/bpd.csv"
    for what, values in (
        ("prior", bound.prior_bpd),
        ("terms", bound.vb[:, :-1].sum(1)),
        ("L_0", bound.decoder_bpd),
        ("total", bound.total_bpd),
    ):
        error = float(values.std()) / 5**0.5
        assert lines[what] == f"{float(values.mean()):.5g} +- {error:.2g} bits/dim"
    rows = rows_of()
    assert [int(row["t"]) for row in rows] == list(range(T - 1, -1, -1))
    for column, values in (
        ("mean", bound.vb.mean(0)),
        ("standard_error", bound.vb.std(0) / 5**0.5),
        ("xstart_mse", bound.xstart_mse.mean(0)),
        ("mse", bound.mse.mean(0)),
    ):
        np.testing.assert_allclose([float(row[column]) for row in rows], values, rtol=1e-12)
    assert sorted(os.listdir("out")) == ["bpd.csv"]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        pytest.param(("--steps", 6), {"steps": 6}, id="respaced"),
        pytest.param(("--variance", "beta"), {"variance": "beta"}, id="variance"),
        pytest.param(("--decoder", "gaussian"), {"decoder": "gaussian"}, id="density"),
        pytest.param(("--seed", 3), {"seed": 3}, id="seed"),
        pytest.param(("--num", 2), {"num": 2}, id="num"),
        pytest.param(("--batch", 2), {"micro_batch": 2}, id="batch"),
    ],
)
def test_options_are_those_of_the_function(
    args: tuple[object, ...], options: dict[str, Any]
) -> None:
    lines = lines_of(bpd(*args, "--out", "deep/er/a.csv"))
    mean = float(expected(**options).total_bpd.mean())
    assert lines["total"].startswith(f"{mean:.5g} +- ")
    assert len(rows_of("deep/er/a.csv")) == options.get("steps", T)


def test_a_single_image_has_no_standard_error() -> None:
    lines = lines_of(bpd("--num", 1))
    assert lines["data"] == "data.npy, 1 image"
    assert "+-" not in lines["total"]
    assert rows_of()[0]["standard_error"] == ""


def test_a_learned_variance_is_that_of_the_model() -> None:
    options = {"variance": "learned_range", "prediction": "v", "clip": None}
    ddpm_fast.save("model2", tiny_unet(out_channels=2), tiny_schedule(), **options)
    totals = {}
    for args in ((), ("--variance", "beta")):
        lines = lines_of(bpd(*args, model="model2"))
        bound = expected(model="model2", **options | ({"variance": "beta"} if args else {}))
        assert f"variance {'beta' if args else 'learned_range'}" in lines["steps"]
        assert float(lines["total"].split()[0]) == pytest.approx(
            float(bound.total_bpd.mean()), 1e-3
        )
        totals[args] = lines["total"]
    assert len(set(totals.values())) == 2


def test_the_engine_runs_too() -> None:
    result = run("bpd", "--model", "model", "--data", "data.npy", "--device", "cpu",
                 "--no-progress")  # fmt: skip
    lines = lines_of(result)
    assert lines["engine"].startswith("5x1x8x8: ")
    mean = float(lines["total"].split()[0])
    assert mean == pytest.approx(float(expected().total_bpd.mean()), rel=1e-3)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_folder_of_images_is_read_in_the_order_of_names(ending: str) -> None:
    os.mkdir("folder")
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(f"folder/{i}.{ending}", quality=100)
    Path("folder/notes.txt").write_text("not an image")
    args = ("--num", 3, "--steps", 5)
    from_folder, from_array = (lines_of(bpd(*args, data=d)) for d in ("folder", "data.npy"))
    totals = [float(lines["total"].split()[0]) for lines in (from_folder, from_array)]
    if ending == "png":
        assert totals[0] == totals[1]
    else:
        assert totals[0] == pytest.approx(totals[1], rel=0.1)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(PIXELS[:, None], id="channels"),
        pytest.param(PIXELS / np.float32(127.5) - np.float32(1), id="float32"),
        pytest.param(PIXELS[:, None] / 127.5 - 1, id="float64"),
    ],
)
def test_dtypes_and_shapes_of_arrays(array: np.ndarray) -> None:
    np.save("other.npy", array)
    args = ("--steps", 3)
    assert lines_of(bpd(*args, data="other.npy"))["total"] == lines_of(bpd(*args))["total"]


def test_grey_images_are_converted_to_colour_and_back_if_nothing_is_lost() -> None:
    saved("rgb", 3)
    os.mkdir("grey")
    Image.fromarray(PIXELS[0]).save("grey/a.png")
    lines_of(bpd("--steps", 2, model="rgb", data="grey"))
    os.mkdir("equal")
    Image.fromarray(PIXELS[0]).convert("RGB").save("equal/a.png")
    first, second = (lines_of(bpd("--steps", 2, data=d))["total"] for d in ("grey", "equal"))
    assert first == second
    coloured = np.stack([PIXELS[0], PIXELS[1], PIXELS[2]], 2)
    os.mkdir("colours")
    Image.fromarray(coloured).save("colours/a.png")
    message = "colours/a.png: must be 1 x 8 x 8; got 3 x 8 x 8"
    assert message in error_of(bpd(data="colours", status=2))


def write_bad_data() -> None:
    os.mkdir("broken")
    Image.fromarray(PIXELS[0]).save("broken/0.png")
    whole = Path("broken/0.png").read_bytes()
    Path("broken/1.png").write_bytes(whole[:-30])
    os.mkdir("sizes")
    Image.fromarray(PIXELS[0]).save("sizes/0.png")
    Image.fromarray(PIXELS[0, :4]).save("sizes/1.png")
    os.mkdir("empty")
    Path("text.npy").write_text("no array")
    Path("cut.npy").write_bytes(Path("data.npy").read_bytes()[:-9])
    np.savez("several.npz", a=PIXELS)
    np.save("pickle.npy", np.array([{}]), allow_pickle=True)
    np.save("wide.npy", PIXELS / np.float32(255) * 3)
    np.save("nan.npy", np.full((2, *SHAPE), np.nan))
    np.save("ints.npy", PIXELS.astype(np.int32))
    np.save("last.npy", PIXELS[..., None])
    np.save("none.npy", PIXELS[:0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("broken", "broken/1.png: cannot be read: image file is truncated"),
        ("sizes", "sizes/1.png: must be 1 x 8 x 8; got 1 x 4 x 8"),
        ("empty", "empty: holds no images (.jpg, "),
        ("text.npy", "text.npy: is neither a .npy file"),
        ("cut.npy", "cut.npy: is neither a .npy file"),
        ("several.npz", "several.npz: must be one array (.npy); got several"),
        ("pickle.npy", "pickle.npy: is neither a .npy file"),
        ("wide.npy", "wide.npy: floats must lie in [-1, 1]; got 0 to 3"),
        ("nan.npy", "nan.npy: floats must lie in [-1, 1]; got nan"),
        ("ints.npy", "ints.npy: must be uint8 or floats in [-1, 1]; got int32"),
        ("last.npy", "last.npy: must be [N, 1, 8, 8] or [N, 8, 8], N >= 1; got [5, 8, 8, 1]"),
        ("none.npy", "none.npy: must be [N, 1, 8, 8] or [N, 8, 8], N >= 1; got [0, 8, 8]"),
        ("nowhere.npy", "nowhere.npy: No such file"),
    ],
)
def test_invalid_data_is_named_and_nothing_is_written(data: str, message: str) -> None:
    write_bad_data()
    assert message in error_of(bpd(data=data, status=2))
    assert not os.path.exists("out/bpd.csv")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("--num", 6), "data.npy: must hold at least 6 images; got 5", id="num"),
        pytest.param(("--steps", 21), "steps must be an integer in [1, 20]", id="steps"),
        pytest.param(("--variance", "x"), "variance must be one of posterior", id="variance"),
        pytest.param(("--variance", "learned"), "[5, 2, 8, 8]", id="channels"),
        pytest.param(("--decoder", "x"), "decoder must be one of discretised", id="decoder"),
        pytest.param(("--dtype", "int8"), "--dtype must be float32", id="dtype"),
        pytest.param(("--device", "tpu"), "--device must be cpu", id="device"),
        pytest.param(("--out", "a.txt"), "--out must be a .csv file; got 'a.txt'", id="out"),
        pytest.param(("--plot", "a.jpg"), "--plot must be a .png file; got 'a.jpg'", id="plot"),
        pytest.param(("--seed", 1 << 64), "seed must be an integer in", id="seed"),
    ],
)
def test_an_error_is_one_line(args: tuple[object, ...], message: str) -> None:
    assert message in error_of(bpd(*args, status=2))
    assert not os.path.exists("out/bpd.csv")


def test_a_model_without_a_schedule_or_a_size_is_rejected() -> None:
    ddpm_fast.save("alone", tiny_unet())
    message = "alone: cannot be used here: it holds a network alone"
    assert message in error_of(bpd(model="alone", status=2))
    config = {"num_train_timesteps": T, "beta_end": 0.5}
    ddpm_fast.save("sizeless", tiny_unet(sample_size=None), scheduler_config=config)
    assert "has no sample_size" in error_of(bpd(model="sizeless", status=2))


def test_labels_and_thresholding_of_the_model() -> None:
    config = {"num_train_timesteps": T, "beta_end": 0.5, "thresholding": True}
    config["sample_max_value"] = 3.0
    ddpm_fast.save("labels", tiny_unet(num_class_embeds=3), scheduler_config=config)
    assert "--label must be 0 to 2" in error_of(bpd(model="labels", status=2))
    bpd("--label", "0,2", model="labels")
    labels = {"class_labels": torch.tensor([0, 2, 0, 2, 0])}
    bound = expected(model="labels", model_kwargs=labels, clip=DynamicThreshold(0.995, 3.0))
    means = [float(row["mean"]) for row in rows_of()]
    np.testing.assert_allclose(means, bound.vb.mean(0), rtol=1e-6)


def test_missing_matplotlib_is_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(OpenModel, "open", lambda *_: pytest.fail("loaded"))
    message = error_of(bpd("--plot", "a.png", status=2))
    assert "needs the package matplotlib: `pip install 'matplotlib'`" in message


def test_the_terms_are_drawn() -> None:
    result = bpd("--plot", "new/terms.png")
    assert result.stdout.endswith("wrote    out/bpd.csv\nwrote    new/terms.png\n")
    with Image.open("new/terms.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    bound = expected()
    figure = bpd_command.draw(bound, "below")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    line = axes.lines[0]
    assert line.get_xdata().tolist() == list(range(T - 1, 0, -1))
    np.testing.assert_allclose(line.get_ydata(), bound.vb.mean(0)[:-1])
    (point,) = axes.collections
    assert point.get_offsets().tolist() == [[0, float(bound.decoder_bpd.mean())]]
    total, prior = float(bound.total_bpd.mean()), float(bound.prior_bpd.mean())
    assert f"{total:.4g} bits/dim, of which the prior is {prior:.2g}" in figure.get_suptitle()


def test_a_negative_term_is_named_in_the_legend() -> None:
    bound = expected(decoder="gaussian")
    bound.vb[:, -1] = -0.5
    (axes,) = bpd_command.draw(bound, "").axes
    assert not axes.collections
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "$L_{t-1}$",
        "$L_0$ = -0.5, not above 0",
    ]
