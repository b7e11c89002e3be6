"""`ddpm-fast encode`, `decode` and `interpolate`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from cli_runs import SIDE, error_of, run, tiny_schedule, tiny_unet
from ddpm_fast import Codec
from ddpm_fast.utils.images import to_uint8

SHAPE = (1, SIDE, SIDE)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE), np.uint8)
IMAGES = torch.from_numpy(PIXELS[:, None].astype(np.float32) / np.float32(127.5) - 1)


@pytest.fixture(autouse=True)
def _model_and_data(tiny: Path, _in_a_temporary_folder: None) -> None:
    np.save("data.npy", PIXELS)
    for name, pixels in zip("ab", PIXELS, strict=False):
        Image.fromarray(pixels).save(f"{name}.png")
    shutil.copytree(tiny, "model")


def latents(command: str, *args: object, model: str = "model", status: int = 0) -> Any:
    options = ("--model", model, "--device", "cpu", "--no-progress", "--no-engine", "--batch", 2)
    return run(command, *args, *options, status=status)


def codec(steps: int = 7, **options: Any) -> Codec:
    unet = ddpm_fast.load("model").unet
    options |= {"device": "cpu", "micro_batch": 2}
    return Codec(unet, tiny_schedule(), SHAPE, steps, **options)


def test_codes_are_written_and_described() -> None:
    result = latents("encode", "--data", "data.npy", "--steps", 7, "--picture", "codes.png")
    codes = codec().encode(IMAGES, progress=False)
    np.testing.assert_array_equal(np.load("out/codes.npy"), codes.numpy())
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["data"] == "data.npy, 5 images"
    spread = f"mean {float(codes.mean()):.3f}, standard deviation {float(codes.std()):.3f}"
    assert lines["codes"] == spread
    back = codec().decode(codes, progress=False)
    error = float((back - IMAGES).square().mean().sqrt())
    assert lines["decoded"] == f"rms {error:.4f} from the images"
    with Image.open("codes.png") as image:
        assert image.width > 5 * SIDE


@pytest.mark.parametrize(
    ("args", "options", "t"),
    [
        pytest.param((), {}, None, id="defaults"),
        pytest.param(("--spacing", "trailing"), {"spacing": "trailing"}, None, id="spacing"),
        pytest.param(("--clip", "0.5"), {"clip": 0.5}, None, id="clip"),
        pytest.param(("--t", 9), {}, 9, id="t"),
    ],
)
def test_options_are_those_of_the_codec(
    args: tuple[object, ...], options: dict[str, Any], t: int | None
) -> None:
    # The default of 50 steps is limited to the 20 timesteps of the model.
    latents("encode", "--data", "data.npy", "--num", 2, *args)
    ours = codec(20, **options)
    codes = ours.encode(IMAGES[:2], t, progress=False)
    np.testing.assert_array_equal(np.load("out/codes.npy"), codes.numpy())
    latents("decode", "out/codes.npy", *args, "--out", "back.npy")
    back = ours.decode(codes, t, progress=False)
    np.testing.assert_array_equal(np.load("back.npy"), back.numpy())


@pytest.mark.parametrize("mode", ["latent-slerp", "latent-lerp", "stochastic"])
def test_frames_are_those_of_the_codec(mode: str) -> None:
    options = ("--frames", 4, "--steps", 7, "--mode", mode, "--out", "a.npy")
    latents("interpolate", "a.png", "b.png", *options)
    x_a, x_b = IMAGES[:1], IMAGES[1:2]
    weights = [0, 1 / 3, 2 / 3, 1]
    expected = codec().interpolate(x_a, x_b, weights, mode, progress=False)[:, 0]
    np.testing.assert_array_equal(np.load("a.npy"), expected.numpy())


def test_frames_are_one_row_or_a_folder_of_images() -> None:
    frames = ("--frames", 3, "--steps", 7)
    latents("interpolate", "a.png", "b.png", *frames)
    with Image.open("out/interpolation.png") as image:
        assert image.width > 2.5 * image.height
    latents("interpolate", "a.png", "b.png", *frames, "--out", "frames")
    assert sorted(path.name for path in Path("frames").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
    middle = codec().interpolate(IMAGES[:1], IMAGES[1:2], [0, 0.5, 1], progress=False)[1]
    with Image.open("frames/00001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), to_uint8(middle)[0].squeeze())


def test_labels_are_passed_to_the_model() -> None:
    config = {"num_train_timesteps": 20, "beta_end": 0.5}
    ddpm_fast.save("labels", tiny_unet(num_class_embeds=3), scheduler_config=config)
    args = ("--data", "data.npy", "--steps", 5)
    assert "--label must be 0 to 2" in error_of(latents("encode", *args, model="labels", status=2))
    found = []
    for label in ("0", "1", "0,1"):
        latents("encode", *args, "--label", label, model="labels")
        found.append(np.load("out/codes.npy"))
    assert not np.array_equal(found[0], found[1])
    mixed = np.stack([found[i % 2][i] for i in range(5)])
    np.testing.assert_allclose(found[2], mixed, rtol=0, atol=1e-5)


DATA = ("--data", "data.npy")
BAD = {
    "no-data": ("encode", ("--data", "none.npy"), "none.npy"),
    "num": ("encode", (*DATA, "--num", 6), "at least 6 images; got 5"),
    "out": ("encode", (*DATA, "--out", "a.png"), "--out must be a .npy"),
    "t": ("encode", (*DATA, "--t", 20), "t must be an integer in [0, 19]"),
    "steps": ("encode", (*DATA, "--steps", 21), "steps must"),
    "spacing": ("encode", (*DATA, "--spacing", "x"), "--spacing must"),
    "shape": ("decode", ("data.npy",), "data.npy: must be [N, 1, 8, 8]; got [5, 8, 8]"),
    "no-npy": ("decode", ("a.png",), "a.png: must be a readable .npy"),
    "no-image": ("interpolate", ("a.png", "c.png"), "c.png"),
    "size": ("interpolate", ("a.png", "big.png"), "big.png: must be 1 x 8 x 8; got 1 x 9 x 9"),
    "mode": ("interpolate", ("a.png", "b.png", "--mode", "slerp"), "mode must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_one_line(case: str) -> None:
    command, args, message = BAD[case]
    Image.new("L", (9, 9)).save("big.png")
    assert message in error_of(latents(command, *args, status=2))
    assert not [path for path in Path("out").glob("*") if path.is_file()]
