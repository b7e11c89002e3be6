"""Images, sheets and arrays on disk, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ddpm_fast.utils.images import (
    BACKGROUND,
    decode_image,
    open_image,
    read_image,
    save_images,
    save_npy,
    save_png,
    sheet,
    to_uint8,
)

INF, NAN = float("inf"), float("nan")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(-1.0, 0, id="black"),
        pytest.param(1.0, 255, id="white"),
        pytest.param(0.0, 128, id="middle-to-even"),
        pytest.param(-0.996, 1, id="nearest"),
        pytest.param(1.5, 255, id="above"),
        pytest.param(-7.0, 0, id="below"),
        pytest.param(INF, 255, id="inf"),
        pytest.param(-INF, 0, id="minus-inf"),
    ],
)
def test_a_value_becomes_eight_bits(value: float, expected: int) -> None:
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_eight_bits_are_those_of_the_formula(dtype: torch.dtype) -> None:
    images = noise(4, 3, 5, 6).to(dtype)
    expected = np.round(np.clip(images.float().numpy() / 2 + np.float32(0.5), 0, 1) * 255)
    got = to_uint8(images)
    assert got.dtype == torch.uint8
    assert got.shape == (4, 5, 6, 3)
    np.testing.assert_array_equal(got.numpy(), expected.transpose(0, 2, 3, 1))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_uint8(channels_last), got)


def test_nan_is_black_and_counted() -> None:
    images = torch.ones(3, 1, 2, 2)
    images[1, 0, 0] = NAN
    with pytest.warns(RuntimeWarning, match=r"1 of 3 images hold NaN \(2 values\)"):
        got = to_uint8(images)
    assert got[1, :, :, 0].tolist() == [[0, 0], [255, 255]]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        pytest.param(np.ones((1, 1, 2, 2)), TypeError, "images must be a torch.Tensor", id="numpy"),
        pytest.param(torch.ones(1, 1, 2, 2).byte(), TypeError, "images must be float32", id="int"),
        pytest.param(torch.ones(1, 2, 2), ValueError, r"\[N, C, H, W\]; got \[1, 2, 2\]", id="3-d"),
    ],
)
def test_what_is_no_batch_of_images_is_named(
    images: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        to_uint8(images)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_image_in_its_place(channels: int) -> None:
    images = noise(5, channels, 4, 6)
    pixels = to_uint8(images).numpy()
    drawn = sheet(images, padding=2, scale=2)
    assert drawn.mode == ("L" if channels == 1 else "RGB")
    assert drawn.size == (3 * 14 + 2, 2 * 10 + 2)
    canvas = np.asarray(drawn).reshape(22, 44, channels)
    seen = np.zeros((22, 44), bool)
    for i in range(5):
        top, left = 2 + i // 3 * 10, 2 + i % 3 * 14
        cell = canvas[top : top + 8, left : left + 12]
        np.testing.assert_array_equal(cell, np.kron(pixels[i], np.ones((2, 2, 1), np.uint8)))
        seen[top : top + 8, left : left + 12] = True
    assert (canvas[~seen] == BACKGROUND).all()


@pytest.mark.parametrize(
    ("shape", "columns", "size"),
    [
        pytest.param((1, 1, 32, 32), None, (98, 98), id="one"),
        pytest.param((64, 1, 32, 32), None, (8 * 98, 8 * 98), id="square"),
        pytest.param((10, 3, 128, 128), 5, (5 * 130, 2 * 130), id="large-images-stay"),
        pytest.param((3, 1, 32, 32), 8, (3 * 98, 98), id="fewer-than-columns"),
        pytest.param((2000, 1, 32, 32), None, (45 * 66, 45 * 66), id="many-grow-less"),
    ],
)
def test_a_sheet_is_of_a_size_to_look_at(
    shape: tuple[int, ...], columns: int | None, size: tuple[int, int]
) -> None:
    width, height = sheet(torch.zeros(shape), columns).size
    assert (width - 2, height - 2) == size


@pytest.mark.parametrize("channels", [1, 3])
def test_names_leave_the_grid_as_it_is(channels: int) -> None:
    images = noise(6, channels, 16, 16)
    plain = np.asarray(sheet(images, 3))
    named = np.asarray(sheet(images, 3, row_names=["a", "b"], column_names=["x", "y", "z"]))
    np.testing.assert_array_equal(named[-plain.shape[0] :, -plain.shape[1] :], plain)
    margin = named[: -plain.shape[0]], named[:, : -plain.shape[1]]
    assert all((part < 60).any() for part in margin)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        pytest.param((0, 1, 4, 4), {}, r"images must be .* got \[0, 1, 4, 4\]", id="none"),
        pytest.param((1, 2, 4, 4), {}, r"C 1 or 3; got \[1, 2, 4, 4\]", id="two-channels"),
        pytest.param((4, 1, 4, 4), {"columns": 0}, "columns must be an integer in", id="columns"),
        pytest.param((4, 1, 4, 4), {"padding": -1}, "padding must be an integer in", id="padding"),
        pytest.param((4, 1, 4, 4), {"scale": 0}, "scale must be an integer in", id="scale"),
        pytest.param(
            (4, 1, 4, 4), {"row_names": ["a"]}, "row_names must be 2 or none; got 1", id="rows"
        ),
        pytest.param(
            (4, 1, 4, 4), {"column_names": ["a"]}, "column_names must be 2 or none", id="names"
        ),
    ],
)
def test_a_sheet_that_cannot_be_drawn_is_named(
    shape: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sheet(torch.zeros(shape), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(12, dtype=np.float32).reshape(3, 4), id="c-order"),
        pytest.param(noise(2, 3, 4, 5).permute(0, 2, 3, 1).numpy(), id="permuted"),
        pytest.param(np.asfortranarray(noise(4, 5).numpy()), id="fortran-order"),
        pytest.param(np.float64(3.5), id="0-d"),
        pytest.param(np.zeros((0, 3, 4), np.float16), id="empty"),
        pytest.param(np.array([[True], [False]]), id="bool"),
    ],
)
def test_an_array_reads_back(array: np.ndarray, tmp_path: Path) -> None:
    save_npy(array, tmp_path / "a.npy")
    back = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array, strict=True)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_objects_are_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="array must hold numbers; got dtype object"):
        save_npy(np.array([{}]), tmp_path / "a.npy")
    assert not os.listdir(tmp_path)


def test_images_are_named_by_their_index(tmp_path: Path) -> None:
    images = noise(3, 3, 4, 5)
    paths = save_images(images, tmp_path, 99_998)
    assert [path.name for path in paths] == ["99998.png", "99999.png", "100000.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    for path, pixels in zip(paths, to_uint8(images).numpy(), strict=True):
        with Image.open(path) as drawn:
            np.testing.assert_array_equal(np.asarray(drawn), pixels)
    assert save_images(noise(1, 1, 4, 5), tmp_path)[0].name == "00000.png"
    with pytest.raises(ValueError, match="1 or 3 channels"):
        save_images(noise(1, 2, 4, 5), tmp_path)


def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 0x0181, 0x0182, 0xFE00, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[0, 1, 2, 253, 255]]
    image = read_image(tmp_path / "a.png", (3, 1, 5))
    assert to_uint8(image[None])[0, 0, :, 0].tolist() == [0, 1, 2, 253, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_decoded_image_is_grey_or_rgb_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (2, 1))
    suffix = "tiff" if mode == "CMYK" else "png"
    image.save(tmp_path / f"a.{suffix}")
    decoded = open_image(tmp_path / f"a.{suffix}")
    assert decoded.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    level = 255 if mode in ("LA", "RGBA", "CMYK") else 0  # transparent, or without ink
    assert (np.asarray(decoded) == level).all()


def test_formats_that_are_not_meant_are_not_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "TGA")
    with pytest.raises(UnidentifiedImageError):
        decode_image(buffer.getvalue())
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"a\.png: is no image that can be read"):
        open_image(tmp_path / "a.png")


WRITERS = [
    pytest.param(lambda path: save_png(Image.effect_noise((64, 64), 99.0), path), id="png"),
    pytest.param(lambda path: save_npy(noise(64, 64).numpy(), path), id="npy"),
]


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond the limit (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False], ids=["replaces", "new"])
def test_a_full_disk_leaves_all_as_it_was(
    write: Callable[[Path], None],
    call: str,
    existed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    if existed:
        path.write_text("before")
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_text() == "before"


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_cut_off_by_the_system_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file")
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "file")
    assert not os.listdir(tmp_path)
    write(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_an_interrupt_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_is_not_replaced_by_a_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_the_files_before_an_error_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def third_is_full(*args: Path) -> None:
        calls.append(args)
        (_full if len(calls) == 3 else replace)(*args)

    monkeypatch.setattr(os, "replace", third_is_full)
    with pytest.raises(OSError, match=r"No space left.*00002\.png"):
        save_images(noise(4, 1, 4, 4), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["00000.png", "00001.png"]
