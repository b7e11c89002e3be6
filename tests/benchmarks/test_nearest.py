"""Distance to the nearest training image: copies, flips, known distances, verdicts."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_fast.training.data import make_triangles

nearest = importlib.import_module("quality.nearest")
quality = importlib.import_module("sample_quality")

Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def training() -> Images:
    return make_triangles(300, seed=0, canvas=64)


def reference_distances(image: Images, training: Images) -> float:
    """Distances in float64, one pair at a time, over all eight symmetries."""
    turned = [np.rot90(other[0], k) for other in training for k in range(4)]
    turned += [np.fliplr(other) for other in turned]
    return min(np.sqrt(np.square(image[0] - other.astype(float)).sum()) for other in turned)


def test_distances_are_those_of_every_pair(
    training: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 32, 32)).astype(np.float32)
    images = np.concatenate([make_triangles(8, seed=1), images])
    monkeypatch.setattr(nearest, "CHUNK", 5)
    got = nearest.nearest_distances(images, training)
    assert got.dtype == np.float64
    np.testing.assert_allclose(
        got, [reference_distances(image, training) for image in images], rtol=1e-9
    )


def test_a_flipped_or_transposed_copy_has_distance_0(training: Images) -> None:
    chosen = training[[5, 250]]
    copies = [chosen, chosen.swapaxes(2, 3), chosen[:, :, :, ::-1], chosen[:, :, ::-1]]
    copies += [np.rot90(chosen, k, (2, 3)) for k in range(1, 4)]
    copies.append(np.rot90(chosen, 1, (2, 3))[:, :, ::-1])
    for copy in copies:
        assert nearest.nearest_distances(np.ascontiguousarray(copy), training).tolist() == [0, 0]


def test_a_small_distance_is_exact(training: Images) -> None:
    image = training[7:8].copy()
    image[0, 0, :2, :2] += np.float32(2**-10)
    assert nearest.nearest_distances(image, training)[0] == pytest.approx(2**-9, rel=1e-3)


def test_distance_is_over_all_pixels() -> None:
    black, white = -np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 4, 4), np.float32)
    assert nearest.nearest_distances(white, black).tolist() == [8]
    half = white.copy()
    half[0, 0, :2] = -1
    assert nearest.nearest_distances(white, np.concatenate([black, half])).tolist() == [32**0.5]
    grey = np.concatenate([0 * white, white])
    assert nearest.nearest_distances(white * np.float32(0.625), grey).tolist() == [1.5]


@pytest.mark.parametrize(
    ("images", "ratio", "novel"),
    [
        pytest.param([4, 4, 0], 1.0, True, id="as-far"),
        pytest.param([3.625, 3.625, 5], 0.9062, True, id="a-little-nearer"),
        pytest.param([3.5625, 3.5625, 5], 0.8906, False, id="nearer"),
        pytest.param([8, 8, 0], 2.0, True, id="farther"),
        pytest.param([0, 0, 8], 0.0, False, id="remembered"),
        pytest.param([np.nan] * 3, np.nan, False, id="nan"),
    ],
)
def test_verdict_compares_medians(images: list[float], ratio: float, novel: bool) -> None:
    """Constant images: the distance from the blank training image is 4 times the value."""
    training = np.zeros((1, 1, 4, 4), np.float32)

    def constant(distances: list[float]) -> Images:
        values = np.array(distances, np.float32)[:, None, None, None] / 4
        return np.broadcast_to(values, (len(distances), 1, 4, 4)).copy()

    asked = []

    def make_fresh(n: int) -> Images:
        asked.append(n)
        return constant([4.0, 0.0, 4.0][:n])

    check = nearest.Memorisation(training, make_fresh)
    row = check.columns(constant(images))
    assert list(row) == list(nearest.NEAREST_COLUMNS)
    assert row["nearest_fresh"] == 4
    assert row["nearest_of_fresh"] == pytest.approx(ratio, abs=1e-9, nan_ok=True)
    assert row["novel"] is novel
    check.columns(constant(images))
    assert asked == [3]


def test_a_fresh_distance_of_0_gives_no_verdict() -> None:
    blank = np.ones((2, 1, 4, 4), np.float32)
    row = nearest.Memorisation(blank, lambda n: blank[:n]).columns(blank)
    assert np.isnan(row["nearest_of_fresh"])
    assert row["novel"] is False


@pytest.mark.parametrize(
    ("images", "training", "message"),
    [
        pytest.param((2, 4, 4), (2, 1, 4, 4), "images must", id="no-channel"),
        pytest.param((0, 1, 4, 4), (2, 1, 4, 4), "images must", id="empty"),
        pytest.param((2, 1, 4, 4), (0, 1, 4, 4), "training must", id="no-training"),
        pytest.param((2, 1, 4, 6), (2, 1, 4, 6), "images must", id="not-square"),
        pytest.param((2, 1, 8, 8), (2, 1, 4, 4), "shape of training", id="sizes"),
    ],
)
def test_bad_shapes_raise(images: tuple[int, ...], training: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest.nearest_distances(np.ones(images, np.float32), np.ones(training, np.float32))


def test_the_benchmark_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored samples that are training images of another seed."""
    remembered = make_triangles(20, seed=5)
    np.save(tmp_path / "ddpm_fast-ddpm-25.npy", remembered[:, :, ::-1])
    np.save(tmp_path / "ddpm_fast-ddim-5.npy", make_triangles(20, seed=6))
    options = argparse.Namespace(
        model=None, num=20, steps=25, seed=0, training=20, training_seed=5, device="cpu",
        solver=[("ddim", 5)], peer=False, samples=tmp_path,
    )  # fmt: skip
    training, copied, fresh = quality.measure(options)
    assert list(training) == list(copied)
    assert [training[name] for name in nearest.NEAREST_COLUMNS] == [""] * 4
    assert copied["nearest"] == copied["nearest_of_fresh"] == 0
    assert copied["novel"] is False
    assert fresh["nearest"] == fresh["nearest_fresh"] == copied["nearest_fresh"] > 1
    assert fresh["novel"] is True
