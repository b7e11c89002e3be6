"""`ddpm-fast noise`: an image under several schedules."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_runs import error_of, run
from ddpm_fast import NoiseSchedule, philox_normal, q_sample
from ddpm_fast.cli import noise as noise_command
from ddpm_fast.ops.philox import STREAM_TRAINING
from ddpm_fast.utils.images import to_uint8

SIDE = 8  # pixels of an image's side


@pytest.fixture
def source() -> Path:
    pixels = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) * 4
    Image.fromarray(pixels).save("in.png")
    return Path("in.png")


def test_each_row_adds_the_noise_of_a_schedule(source: Path) -> None:
    schedules = "linear,power:2,cosine:0.01:0.99"
    args = ("--schedules", schedules, "--columns", 3, "--seed", 7, "--scale", 1)
    result = run("noise", source, *args)
    assert result.stdout == "wrote    out/noise.png\n"
    with Image.open("out/noise.png") as sheet:
        canvas = np.asarray(sheet)
    with Image.open(source) as image:
        x0 = torch.from_numpy(np.asarray(image, np.float32) / np.float32(127.5) - 1)
    x0 = x0.expand(3, 1, SIDE, SIDE).clone()
    z = philox_normal(3, (1, SIDE, SIDE), 7, STREAM_TRAINING)
    t = torch.tensor([0, 500, 999])
    cell = SIDE + 4
    grid = canvas[-3 * cell :, -3 * cell :]
    expected = (
        NoiseSchedule.linear(),
        NoiseSchedule.power(2),
        NoiseSchedule.cosine(1000, 0.01, 0.99),
    )
    for row, schedule in enumerate(expected):
        for column, x_t in enumerate(to_uint8(q_sample(x0, t, z, schedule)).numpy()):
            got = grid[row * cell :, column * cell :][:SIDE, :SIDE]
            np.testing.assert_array_equal(got, x_t[:, :, 0])


def test_a_warning_of_a_default_schedule_is_one_line(source: Path) -> None:
    result = run("noise", source, "--out", "deep/er/sheet.png")
    assert os.listdir("deep/er") == ["sheet.png"]
    (note,) = result.stderr.splitlines()
    assert note.startswith("note: schedule power(10): x_T keeps 0.382 of x_0's amplitude")


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        pytest.param(
            "linear,circle",
            "--schedules: no schedule 'circle'; accepted: linear, scaled_linear, cosine, sigmoid,"
            " sigmoid_cumprod, power:exponent, sine_wave",
            id="name",
        ),
        pytest.param("", "no schedule ''", id="empty"),
        pytest.param("power", "power takes 1 to 3 arguments (exponent, beta_start", id="missing"),
        pytest.param("cosine:1:2:3", "cosine takes 0 to 2 arguments (s, max_beta)", id="too-many"),
        pytest.param("power:two", "exponent must be a number; got 'two'", id="no-number"),
        pytest.param("power:-1", "power:-1: exponent must be a number in (0, inf)", id="range"),
        pytest.param("linear:0.1:nan", "linear:0.1:nan: beta_end must be", id="nan"),
    ],
)
def test_an_invalid_schedule_is_named(source: Path, schedules: str, message: str) -> None:
    assert message in error_of(run("noise", source, "--schedules", schedules, status=2))
    assert os.listdir() == ["in.png"]


@pytest.mark.parametrize(
    ("image", "mode", "value"),
    [
        pytest.param(Image.new("1", (8, 8), 1), "L", 255, id="bilevel"),
        pytest.param(Image.new("RGB", (8, 8), (255, 0, 64)), "RGB", (255, 0, 64), id="rgb"),
        pytest.param(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "RGB", (255, 255, 255), id="alpha"),
        pytest.param(Image.new("LA", (8, 8), (100, 255)), "L", 100, id="grey-alpha"),
        pytest.param(Image.fromarray(np.full((8, 8), 51399, np.uint16)), "L", 200, id="16-bit"),
        pytest.param(Image.fromarray(np.full((8, 8), 51200, np.uint16)), "L", 199, id="down"),
        pytest.param(Image.new("P", (8, 8), 3), "RGB", None, id="palette"),
    ],
)
def test_every_mode_of_images_is_read(image: Image.Image, mode: str, value: object) -> None:
    image.save("in.png")
    # At t = 0 these betas do not change the image at 8 bits.
    args = ("--schedules", "linear:1e-9:0.02", "--columns", 2, "--scale", 1)
    run("noise", "in.png", *args, "--out", "a.png")
    with Image.open("a.png") as sheet:
        assert sheet.mode == mode
        corner = sheet.width - 2 * (8 + 4), sheet.height - (8 + 4)
        if value is not None:
            assert sheet.getpixel(corner) == value


@pytest.mark.parametrize(
    ("args", "size"),
    [
        pytest.param((), (128, 64), id="large-images-shrink"),
        pytest.param(("--size", 20), (20, 10), id="reduced"),
        pytest.param(("--size", 400), (400, 200), id="enlarged"),
    ],
)
def test_the_longer_side_is_set(
    args: tuple[object, ...], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    draw = noise_command.sheet
    monkeypatch.setattr(noise_command, "sheet", lambda *a: calls.append(a) or draw(*a))
    Image.new("L", (300, 150)).save("in.png")
    run("noise", "in.png", "--columns", 2, "--schedules", "linear", *args)
    assert calls[0][0].shape == (2, 1, size[1], size[0])


def test_files_that_are_no_images_are_named(source: Path) -> None:
    whole = source.read_bytes()
    for name, content, message in (
        ("text.png", b"no image", "text.png: is no image that can be read"),
        ("cut.png", whole[:-30], "cut.png: cannot be read: image file is truncated"),
        ("empty.png", b"", "empty.png: is no image that can be read"),
    ):
        Path(name).write_bytes(content)
        assert message in error_of(run("noise", name, status=2))
    assert "none.png: No such file" in error_of(run("noise", "none.png", status=2))
    assert "--out must be a .png" in error_of(run("noise", source, "--out", "a.jpg", status=2))
