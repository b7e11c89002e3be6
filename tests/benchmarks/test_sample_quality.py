"""Measure of sample quality: enclosing triangle, verdicts, images, results file."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

quality = importlib.import_module("sample_quality")
enclosing = importlib.import_module("quality.enclosing")
results = importlib.import_module("ddpm_fast.bench.results")

Array = NDArray[np.float64]
CANVAS = 720
SCALE = CANVAS / 32
STAIRCASE = ["#", "##", "###", "####"]
POSITIONS = st.tuples(st.integers(0, 31), st.integers(0, 31))


def area(triangle: Array) -> float:
    (ax, ay), (bx, by), (cx, cy) = triangle
    return ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)) / 2


def support_triangles(points: Array, hull: Array) -> Array:
    """Areas of all triangles with sides at 60 even directions or along the hull's edges.

    Independent of the algorithm: every side at a direction is pushed against the points, and
    three sides bound a triangle where their directions span the plane.
    """
    edges = np.roll(hull, -1, 0) - hull
    angles = np.concatenate([np.arange(60) * np.pi / 30, np.arctan2(-edges[:, 0], edges[:, 1])])
    angles = np.sort(angles % (2 * np.pi))
    normals = np.stack([np.cos(angles), np.sin(angles)], 1)
    reach = (points @ normals.T).max(0)
    sines = np.sin(angles[None] - angles[:, None])
    i, j, k = (np.arange(len(angles)).reshape(s) for s in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    s_ij, s_jk, s_ki = sines[i, j], sines[j, k], sines[k, i]
    bounded = (i < j) & (j < k) & (np.minimum(np.minimum(s_ij, s_jk), s_ki) > 1e-6)
    i, j, k = np.nonzero(bounded)
    s_ij, s_jk, s_ki = sines[i, j], sines[j, k], sines[k, i]
    return (reach[i] * s_jk + reach[j] * s_ki + reach[k] * s_ij) ** 2 / (2 * s_ij * s_jk * s_ki)


def draw(corners: Array | None = None, disc: tuple[float, float, float] | None = None) -> Array:
    """Draw a filled polygon or disc, in pixels of the reduced image, like the training images."""
    bitmap = Image.new("L", (CANVAS, CANVAS), 255)
    pen = ImageDraw.Draw(bitmap)
    if corners is not None:
        pen.polygon([(x * SCALE, y * SCALE) for x, y in corners], fill=0)
    if disc is not None:
        x, y, r = (value * SCALE for value in disc)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=0)
    return np.asarray(bitmap.resize((32, 32), Image.Resampling.LANCZOS), float) / 127.5 - 1


def image_of(rows: list[str]) -> Array:
    image = np.ones((32, 32))
    for y, row in enumerate(rows):
        for x, mark in enumerate(row):
            image[y + 4, x + 4] = -1.0 if mark == "#" else 1.0
    return image


def swept_iou(foreground: NDArray[np.bool_]) -> float:
    """Compute the IoU for every growth at which some pixel becomes half covered."""
    triangle = enclosing.smallest_triangle(enclosing.convex_hull(np.argwhere(foreground)[:, ::-1]))
    points = (np.arange(96 * 8) + 0.5) / 8 - 32.5
    x, y = np.meshgrid(points, points)
    farthest = np.full(x.shape, -np.inf)
    for (ax, ay), (bx, by) in zip(triangle, np.roll(triangle, -1, 0), strict=True):
        beyond = ((by - ay) * (x - ax) - (bx - ax) * (y - ay)) / np.hypot(bx - ax, by - ay)
        farthest = np.maximum(farthest, beyond)
    blocks = farthest.reshape(96, 8, 96, 8).swapaxes(1, 2).reshape(96, 96, 64)
    half = np.sort(blocks)[:, :, 31]
    wanted = np.pad(foreground, 32)
    growths = np.append(half[(half > 0) & (half <= 0.75)], 0)
    covers = [half <= growth + 1e-12 for growth in growths]
    return max((cover & wanted).sum() / (cover | wanted).sum() for cover in covers)


@pytest.fixture(scope="module")
def training() -> NDArray[np.float32]:
    return quality.make_triangles(512, seed=0)


@given(st.lists(POSITIONS, min_size=3, max_size=40, unique=True))
def test_enclosing_triangle_is_the_smallest(positions: list[tuple[int, int]]) -> None:
    points = np.array(positions, float)
    hull = enclosing.convex_hull(points)
    if len(hull) < 3:
        assert np.linalg.matrix_rank(points - points[0]) < 2
        return
    triangle = enclosing.smallest_triangle(hull)
    edges = np.roll(triangle, -1, 0) - triangle
    for edge, corner in zip(edges, triangle, strict=True):
        offset = points - corner
        outside = (edge[1] * offset[:, 0] - edge[0] * offset[:, 1]) / np.hypot(*edge)
        assert outside.max() <= 1e-9
    others = support_triangles(points, hull)
    assert area(triangle) <= others.min() * (1 + 1e-9)
    assert others.min() <= area(triangle) * 1.05


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([(0, 0), (6, 0), (0, 4), (1, 1), (3, 2)], 12.0, id="a-triangle-is-its-own"),
        pytest.param([(0, 0), (5, 0), (5, 3), (0, 3)], 30.0, id="rectangle-twice-its-area"),
        pytest.param([(0, 0), (7, 0), (7, 1), (0, 8)], 32.0, id="cut-corner"),
    ],
)
def test_enclosing_triangle_of_known_shapes(points: list[tuple[int, int]], expected: float) -> None:
    hull = enclosing.convex_hull(points)
    assert area(enclosing.smallest_triangle(hull)) == pytest.approx(expected, rel=1e-12)


def test_convex_hull_drops_inner_and_collinear_points() -> None:
    hull = enclosing.convex_hull([(x, y) for x in range(4) for y in range(3)])
    assert hull.tolist() == [[0, 0], [3, 0], [3, 2], [0, 2]]
    assert len(enclosing.convex_hull([(2, 2)])) == 1
    assert len(enclosing.convex_hull([(0, 0), (1, 1), (5, 5)])) == 2


def test_images_follow_the_recipe(training: NDArray[np.float32]) -> None:
    assert training.shape == (512, 1, 32, 32)
    assert training.dtype == np.float32
    assert training.min() == -1
    assert training.max() == 1
    # A uniform random triangle covers 11/144 of the square on average.
    covered = (1 - training).mean() / 2
    assert covered == pytest.approx(11 / 144, abs=0.01)


def test_images_depend_on_the_seed_alone(training: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(quality.make_triangles(20, seed=0), training[:20])
    assert not np.array_equal(quality.make_triangles(20, seed=1), training[:20])
    assert quality.make_triangles(2, seed=0, size=16, canvas=64).shape == (2, 1, 16, 16)


def test_share_of_training_images(training: NDArray[np.float32]) -> None:
    areas = quality.foreground_areas(training)
    verdicts = np.array([quality.is_triangle(image) for image in training])
    assert 0.82 <= verdicts.mean() <= 0.94
    assert not verdicts[areas < 8].any()
    assert verdicts[areas >= 8].mean() >= 0.94
    assert verdicts[areas >= 50].mean() >= 0.99
    assert quality.triangle_share(training[:40]) == verdicts[:40].mean()


def test_verdict_ignores_flips_and_transposes(training: NDArray[np.float32]) -> None:
    for image in training[:60, 0]:
        if (image < 0).sum() >= 50:
            for turned in (image.T, image[::-1], image[:, ::-1]):
                assert quality.is_triangle(turned)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(draw(np.array([(4.0, 4.0), (28.0, 8.0), (10.0, 27.0)])), id="large"),
        pytest.param(draw(np.array([(3.0, 3.0), (30.0, 6.0), (3.0, 9.0)])), id="thin"),
        pytest.param(image_of(STAIRCASE), id="staircase"),
        pytest.param(-1 + 2.0 * (np.add.outer(np.arange(32), np.arange(32)) > 31), id="corner"),
    ],
)
def test_triangles_pass(image: Array) -> None:
    assert quality.triangle_iou(image) >= 0.85
    assert quality.is_triangle(image[None])


def test_axis_aligned_rectangles_fail() -> None:
    sides = (1, 2, 3, 4, 5, 8, 13, 21, 27, 31, 32)
    for height, width in ((h, w) for h in sides for w in sides if h <= w and h * w >= 8):
        for top, left in ((0, 0), ((32 - height) // 2, (32 - width) // 2)):
            image = np.ones((32, 32))
            image[top : top + height, left : left + width] = -1
            assert not quality.is_triangle(image), (height, width, top, left)


def test_rotated_rectangles_fail() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        short, angle = rng.uniform(5, 14), rng.uniform(0, np.pi)
        long = rng.uniform(short, 16)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        box = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (long / 2, short / 2)
        corners = box @ turn.T + rng.uniform(11.5, 20.5, 2)
        assert not quality.is_triangle(draw(corners)), (short, long, angle)


def test_discs_fail() -> None:
    rng = np.random.default_rng(0)
    for radius in np.linspace(3, 15.5, 80):
        disc = (*rng.uniform(radius, 32 - radius, 2), radius)
        assert not quality.is_triangle(draw(disc=disc)), disc


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(np.ones((32, 32)), id="blank"),
        pytest.param(-np.ones((32, 32)), id="all-foreground"),
        pytest.param(image_of(STAIRCASE).clip(0), id="zero-is-background"),
        pytest.param(np.where(image_of(STAIRCASE) < 0, np.nan, 1), id="nan"),
        pytest.param(image_of(["#", "##", "####"]), id="seven-pixels"),
        pytest.param(image_of(["##########"]), id="row"),
        pytest.param(-2 * np.eye(32) + 1, id="diagonal"),
        pytest.param(image_of(["# # # # #", "", "# # # # #"]), id="single-pixels"),
        pytest.param(image_of(["#       #", "##     ##", "###   ###", "#### ####"]), id="two"),
        pytest.param(image_of(["   #   ", "   #   ", "   #   ", "#######", "   #   ", "   #   "]),
                     id="cross"),
    ],
)  # fmt: skip
def test_other_foregrounds_fail(image: Array) -> None:
    assert not quality.is_triangle(image)


def test_noise_fails() -> None:
    noise = np.random.default_rng(0).standard_normal((32, 1, 32, 32))
    assert quality.triangle_share(noise) == 0
    assert quality.triangle_share(noise + 2) == 0


def test_iou_sees_the_whole_foreground() -> None:
    image = image_of(["#", "##", "###", "####", "#####", "######"])
    alone = quality.triangle_iou(image)
    image[25, 20:25] = -1
    assert quality.triangle_iou(image) == pytest.approx(alone * 21 / 26, abs=1e-6)


def test_iou_is_the_best_of_all_growths(training: NDArray[np.float32]) -> None:
    whole = [image < 0 for image in training[:12, 0] if (image < 0).sum() >= 50]
    for rows in (STAIRCASE, ["####"] * 4, ["#####"] * 3, ["  #", " ###", "#####", " ###", "  #"]):
        whole.append(image_of(rows) < 0)
    for foreground in whole:
        image = np.where(foreground, -1.0, 1.0)
        assert quality.triangle_iou(image) == pytest.approx(swept_iou(foreground), abs=1e-12)


def test_broken_tip_is_reached_by_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["# ", "  ", "#", "#", "#", "##", "##", "##", "##", "###", "###"]
    grown = quality.triangle_iou(image_of(rows))
    monkeypatch.setattr(quality, "MAX_GROWTH", 0.0)
    assert quality.triangle_iou(image_of(rows)) < grown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: quality.triangle_iou(np.ones((3, 32, 32))), "image", id="channels"),
        pytest.param(lambda: quality.triangle_share(np.ones((32, 32))), "images", id="no-batch"),
        pytest.param(lambda: quality.triangle_share(np.ones((0, 1, 4, 4))), "images", id="empty"),
        pytest.param(lambda: quality.make_triangles(-1, 0), "n must", id="negative-n"),
        pytest.param(lambda: quality.make_triangles(1, 0, size=0), "size must", id="no-size"),
        pytest.param(lambda: enclosing.smallest_triangle([(0, 0), (1, 1)]), "hull", id="segment"),
    ],
)
def test_bad_input_raises(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_results_are_written_to_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.csv"
    rows = [results.metadata() | {"source": name, "share": 0.5} for name in ("a", "b, c")]
    results.write_csv(path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["source"] for row in read] == ["a", "b, c"]
    assert list(read[0]) == list(rows[0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        results.write_csv(path, [{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match="got none"):
        results.write_csv(path, [])

    class Unprintable:
        def __str__(self) -> str:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        results.write_csv(path, [{"a": 1}, {"a": Unprintable()}])
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.csv"]
