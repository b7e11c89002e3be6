"""Triangles: pixels of each form, seeds and the cache."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.training.data import load_data, make_triangles, triangles

FORMS = ("triangles", "triangles-lowres", "triangles-array")


def draw(form: str, corners: list[tuple[int, int]], size: int, canvas: int) -> np.ndarray:
    """Pixels of one triangle; black is 1, white 0."""
    pixels = triangles.FORMS[form](np.array(corners), size, canvas)
    return (255 - pixels.astype(int)) / 255


@pytest.mark.parametrize("form", FORMS)
def test_images_depend_only_on_the_seed(form: str) -> None:
    images = make_triangles(40, 0, form)
    assert images.shape == (40, 1, 32, 32)
    assert images.dtype == np.float32
    assert images.min() == -1
    assert images.max() == 1
    np.testing.assert_array_equal(make_triangles(10, 0, form), images[:10])
    assert not np.array_equal(make_triangles(40, 1, form), images)
    assert make_triangles(2, 0, form, size=16, canvas=64).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("corners", "rows"),
    [
        pytest.param([(0, 0), (3, 0), (0, 3)], ["####", "###.", "##..", "#..."], id="edges-count"),
        pytest.param([(3, 3), (0, 3), (3, 0)], ["...#", "..##", ".###", "####"], id="clockwise"),
        pytest.param([(1, 2), (1, 2), (1, 2)], ["....", "....", ".#..", "...."], id="a-point"),
        pytest.param([(0, 1), (2, 1), (1, 1)], ["....", "###.", "....", "...."], id="a-line"),
        pytest.param([(0, 0), (2, 1), (3, 3)], ["#...", ".##.", "..#.", "...#"], id="thin"),
    ],
)
def test_array_form_fills_pixels_whose_centres_are_inside(
    corners: list[tuple[int, int]], rows: list[str]
) -> None:
    expected = [[float(mark == "#") for mark in row] for row in rows]
    assert draw("triangles-array", corners, 4, 4).tolist() == expected


def test_array_form_agrees_with_barycentric_coordinates() -> None:
    """In floating point, on a canvas whose pixels never meet a centre on an edge by rounding."""
    rng = np.random.default_rng(5)
    x, y = np.meshgrid(np.arange(8) + 0.5, np.arange(8) + 0.5)
    for _ in range(50):
        corners = rng.integers(0, 91, (3, 2))
        a, b, c = (corners + 0.5) * 8 / 91
        matrix = np.array([b - a, c - a]).T
        if abs(np.linalg.det(matrix)) < 1e-3:
            continue
        u, v = np.linalg.solve(matrix, np.stack([x.ravel() - a[0], y.ravel() - a[1]]))
        margin = np.minimum(np.minimum(u, v), 1 - u - v).reshape(8, 8)
        decided = np.abs(margin) > 1e-9
        got = draw("triangles-array", corners.tolist(), 8, 91)
        np.testing.assert_array_equal(got[decided], (margin > 0)[decided])


def test_all_forms_have_the_same_triangles() -> None:
    smooth, drawn, array = (make_triangles(64, 3, form) for form in FORMS)
    assert np.unique(array).tolist() == [-1, 1]
    for other, differing in ((smooth, 0.004), (drawn, 0.03)):
        assert ((other < 0) != (array < 0)).mean() < differing
    # JPEG's grey dots are near the triangle only: blocks of 8 x 8 without it stay white.
    grey = (np.abs(drawn) < 0.99) & (np.abs(drawn) > 0)
    blocks = drawn.reshape(64, 4, 8, 4, 8)
    empty = (array.reshape(64, 4, 8, 4, 8) > 0).all((2, 4)) & (blocks > 0).all((2, 4))
    assert grey.mean() > 0.05
    assert blocks.swapaxes(2, 3)[empty].min() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n": -1}, "n must", id="negative-n"),
        pytest.param({"seed": -1}, "seed must", id="negative-seed"),
        pytest.param({"form": "squares"}, "form must be one of triangles,.*'squares'", id="form"),
        pytest.param({"size": 0}, "size must", id="no-size"),
        pytest.param({"canvas": 0}, "canvas must", id="no-canvas"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_triangles(**{"n": 1, "seed": 0} | arguments)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DDPM_FAST_CACHE", str(folder))
    return folder


def test_images_are_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = load_data("triangles-array", num=5, seed=2)
    (file,) = cache.iterdir()
    assert file.name.startswith("triangles-array-n5-seed2-size32-canvas720-")
    np.testing.assert_array_equal(np.load(file), make_triangles(5, 2, "triangles-array"))
    monkeypatch.setattr(triangles, "make_triangles", None)
    assert load_data("triangles-array", num=5, seed=2).fingerprint == generated.fingerprint


def test_other_arguments_have_another_file(cache: Path) -> None:
    for changed in ({}, {"num": 6}, {"seed": 1}, {"size": 8}):
        load_data("triangles-array", **{"num": 5} | changed)
    load_data("triangles-lowres", num=5)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("off", ["argument", "environment"])
def test_the_cache_can_be_disabled(cache: Path, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    if off == "environment":
        monkeypatch.setenv("DDPM_FAST_CACHE", "off")
    monkeypatch.setenv("HOME", str(cache))
    load_data("triangles-array", num=2, cache=off != "argument")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "shape", "dtype", "nan", "npz"])
def test_a_damaged_file_is_generated_again(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = load_data("triangles-array", num=3)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    images = np.load(file)
    if damage == "shape":
        np.save(file, images[:2])
    elif damage == "dtype":
        np.save(file, images.astype(np.float64))
    elif damage == "nan":
        np.save(file, images * np.nan)
    elif damage == "npz":
        with file.open("wb") as opened:
            np.savez(opened, images)
    else:
        contents = {"truncated": whole[:-1], "empty": b"", "text": b"not an array"}
        file.write_bytes(contents[damage])
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert load_data("triangles-array", num=3).fingerprint == expected.fingerprint
    assert str(file) in caplog.text
    assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_to_is_logged(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("no folder")
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert len(load_data("triangles-array", num=3)) == 3
    assert "images are not cached" in caplog.text
    assert cache.read_text() == "no folder"
