"""`load_data`: digits, and folders with files of all kinds."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpm_fast.training.data import load_data, make_triangles
from ddpm_fast.utils.images import to_uint8


def random_image(width: int = 8, height: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(values[:, :, 0] if bands == 1 else values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of colour images, and other files."""
    top = tmp_path / "images"
    for i, name in enumerate(("cats/b.png", "cats/a.PNG", "dogs/deep/c.png", "dogs/d.bmp")):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(seed=i).save(path)
    (top / "notes.txt").write_text("no image")
    (top / ".hidden").mkdir()
    (top / ".hidden" / "e.png").write_bytes(b"")
    (top / "cats" / "._b.png").write_bytes(b"")
    return top


def test_triangles_equal_make_triangles() -> None:
    images = load_data("triangles-lowres", num=6, seed=4, size=16, channels=3)
    assert (images.name, len(images), images.sample_shape) == ("triangles-lowres", 6, (3, 16, 16))
    expected = make_triangles(6, 4, "triangles-lowres", 16)
    for image, wanted in zip(images, expected, strict=True):
        assert all(np.array_equal(channel, wanted[0]) for channel in image)


def test_digits_are_black_on_white() -> None:
    images = load_data("digits", labels=True)
    assert (len(images), images.sample_shape, images.num_classes) == (1797, (1, 8, 8), 10)
    assert images.class_names == tuple("0123456789")
    batch, labels = next(iter(DataLoader(images, batch_size=1797)))
    assert (batch.min(), batch.max()) == (-1, 1)
    assert batch.mean() > 0.3
    assert batch.unique().tolist() == [1 - i / 8 for i in range(16, -1, -1)]
    assert labels.bincount().min() > 170
    # A nought has a hole, a one does not.
    centre = batch[:, 0, 3:5, 3:5].mean((1, 2))
    assert centre[labels == 0].mean() > 0.7
    assert centre[labels == 1].mean() < -0.5


def test_digits_are_resized() -> None:
    small, large = load_data("digits"), load_data("digits", resize=32, channels=3)
    assert large.sample_shape == (3, 32, 32)
    for i in range(5):
        back = torch.nn.functional.avg_pool2d(large[i], 4)
        assert (back - small[i]).abs().mean() < 0.1
        assert large[i].abs().max() <= 1
    assert large.fingerprint != small.fingerprint


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path) -> None:
    images = load_data(folder)
    assert (images.name, len(images), images.sample_shape) == ("images", 4, (3, 8, 8))
    assert images.num_classes is None
    for image, seed in zip(images, (1, 0, 3, 2), strict=True):
        assert image.dtype == torch.float32
        expected = np.asarray(random_image(seed=seed))
        np.testing.assert_array_equal(to_uint8(image[None])[0], expected)
    assert load_data(str(folder)).fingerprint == images.fingerprint


def test_sub_folders_are_labels(folder: Path) -> None:
    images = load_data(folder, labels=True)
    assert images.class_names == ("cats", "dogs")
    assert [label for _, label in images] == [0, 0, 1, 1]
    random_image().save(folder / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png must be in a sub-folder"):
        load_data(folder, labels=True)


def test_labels_do_not_change_if_a_class_is_skipped(folder: Path) -> None:
    for path in (folder / "cats").glob("[ab].*"):
        path.write_bytes(b"")
    images = load_data(folder, labels=True, skip_broken=True)
    assert images.class_names == ("cats", "dogs")
    assert [label for _, label in images] == [1, 1]


def test_a_folder_is_pickled_for_spawned_workers(folder: Path) -> None:
    images = load_data(folder, labels=True, resize=4, flip=True)
    copy = pickle.loads(pickle.dumps(images))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(copy, images, strict=True))
    assert [label for _, label in copy] == [0, 0, 1, 1]


def test_channels_follow_the_files(tmp_path: Path) -> None:
    random_image(mode="L").save(tmp_path / "a.png")
    random_image(mode="L", seed=1).save(tmp_path / "b.jpg")
    assert load_data(tmp_path).sample_shape == (1, 8, 8)
    colour = load_data(tmp_path, channels=3)[0]
    assert colour.shape == (3, 8, 8)
    assert (colour == colour[0]).all()
    random_image().save(tmp_path / "c.png")
    assert load_data(tmp_path).sample_shape == (3, 8, 8)
    grey = load_data(tmp_path, channels=1)[2]
    expected = np.asarray(random_image().convert("L"))
    np.testing.assert_array_equal(to_uint8(grey[None])[0, :, :, 0], expected)


def test_resize_to_a_square_and_crop_of_the_centre(tmp_path: Path) -> None:
    values = np.zeros((8, 16), np.uint8)
    values[:, 4:12] = 255
    Image.fromarray(values).save(tmp_path / "wide.png")
    squeezed = load_data(tmp_path, resize=8)[0]
    assert squeezed.shape == (1, 8, 8)
    assert squeezed[0, 4].sign().tolist() == [-1, -1, 1, 1, 1, 1, -1, -1]
    assert (load_data(tmp_path, resize=8, crop=True)[0] == 1).all()
    smaller = load_data(tmp_path, resize=4, crop=True)
    assert smaller.sample_shape == smaller[0].shape == (1, 4, 4)
    assert load_data(tmp_path, resize=8).fingerprint != load_data(tmp_path).fingerprint


def test_mixed_sizes_need_resize(folder: Path) -> None:
    random_image(9, 7).save(folder / "cats" / "z.png")
    with pytest.raises(ValueError, match=r"a\.PNG has 8 x 8 pixels, .*z\.png 9 x 7 pixels"):
        load_data(folder)
    assert load_data(folder, resize=6).sample_shape == (3, 6, 6)
    assert len(list(load_data(folder, resize=6, crop=True))) == 5


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    random_image(8, 4).save(tmp_path / "a.png", exif=exif)
    (image,) = load_data(tmp_path)
    expected = np.asarray(random_image(8, 4).rotate(-90, expand=True))
    np.testing.assert_array_equal(to_uint8(image[None])[0], expected)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), np.uint8)
    values[0, 0] = (255, 0, 0, 255)
    Image.fromarray(values).save(tmp_path / "a.png")
    (image,) = load_data(tmp_path)
    assert image[:, 0, 0].tolist() == [1, -1, -1]
    assert (image[:, 1] == 1).all()


def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0x0181, 0x0182, 0x80FF, 0xFE00, 0xFFFF]], np.uint16)).save(
        tmp_path / "a.png"
    )
    (image,) = load_data(tmp_path)
    assert to_uint8(image[None]).flatten().tolist() == [0, 1, 2, 128, 253, 255]


def test_broken_files_are_named_or_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load_data(folder)
    encoded = (folder / "cats" / "b.png").read_bytes()
    (folder / "dogs" / "truncated.png").write_bytes(encoded[:-40])
    (folder / "dogs" / "text.jpg").write_text("not an image")
    Image.new("F", (8, 8)).save(folder / "dogs" / "floats.tiff")
    with pytest.raises(ValueError, match=r"^3 of 7 images in .*skip_broken") as caught:
        load_data(folder)
    for name in ("truncated.png", "text.jpg", "floats.tiff"):
        assert f"dogs/{name} (" in str(caught.value)
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        assert load_data(folder, skip_broken=True).fingerprint == whole.fingerprint
    assert len(caplog.records) == 3
    assert "truncated.png" in caplog.text


def test_an_error_names_the_first_few_of_many_broken_files(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"8 of 8 .*/4\.png \([^/]*and 3 more;"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="none of the 8 images"):
        load_data(tmp_path, skip_broken=True)


def test_a_file_that_changes_after_loading_is_named(folder: Path) -> None:
    images = load_data(folder)
    path = folder / "cats" / "a.PNG"
    random_image(9, 9).save(path)
    with pytest.raises(ValueError, match=r"a\.PNG must be \[3, 8, 8\] as before; got \[3, 9, 9\]"):
        images[0]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.PNG can no longer be read"):
        images[0]


def test_fingerprint_of_a_folder_depends_on_its_content_alone(folder: Path) -> None:
    before = load_data(folder).fingerprint
    moved = folder.parent / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    assert load_data(moved).fingerprint == before
    (moved / "cats" / "b.png").rename(moved / "cats" / "bb.png")
    renamed = load_data(moved).fingerprint
    random_image(seed=9).save(moved / "dogs" / "d.bmp")
    assert len({before, renamed, load_data(moved).fingerprint}) == 3


@pytest.mark.parametrize("labels", [False, True])
def test_a_folder_without_images_is_rejected(tmp_path: Path, labels: bool) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"must contain images \(\.jpg"):
        load_data(tmp_path, labels=labels)


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must be a folder or one of triangles, .*'triangle'"
    ):
        load_data("triangle")
    file = tmp_path / "a.png"
    random_image().save(file)
    with pytest.raises(NotADirectoryError, match=r"must be a folder: .*a\.png"):
        load_data(file)


def test_a_path_may_have_the_name_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    random_image().save("digits/a.png")
    assert len(load_data("./digits")) == len(load_data(Path("digits"))) == 1
    assert len(load_data("digits")) == 1797


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        pytest.param(3, {}, TypeError, "source must be a str or a path; got int", id="source"),
        pytest.param("digits", {"channels": 2}, ValueError, "channels must be 1, 3", id="channels"),
        pytest.param("digits", {"seed": -1}, ValueError, "seed must", id="seed"),
        pytest.param("digits", {"resize": 0}, ValueError, "resize must", id="resize"),
        pytest.param("digits", {"size": 8}, ValueError, "size must not be set", id="size"),
        pytest.param("triangles", {"num": 0}, ValueError, "num must", id="num"),
        pytest.param("triangles", {"size": 0}, ValueError, "size must", id="no-size"),
        pytest.param("triangles", {"labels": True}, ValueError, "labels must not", id="labels"),
        pytest.param(".", {"crop": True}, ValueError, "resize must be the side", id="crop"),
        pytest.param(".", {"size": 8}, ValueError, "size must not be set", id="size-of-folder"),
    ],
)
def test_invalid_options_are_named(
    source: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_data(source, **options)


@pytest.mark.parametrize(
    ("package", "source"),
    [pytest.param("torchvision.transforms.v2", ".", id="torchvision"),
     pytest.param("sklearn.datasets", "digits", id="scikit-learn")],
)  # fmt: skip
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs the package .*: `pip install .* in a checkout"):
        load_data(source)
