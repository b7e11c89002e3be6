"""Files that are written whole, folders, JSON objects and the folder of the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm_fast.utils import files
from ddpm_fast.utils.files import (
    atomic_write,
    cache_dir,
    prepare_folder,
    read_json,
    replace_directory,
    write_json,
)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
        assert len(os.listdir(tmp_path)) == 2
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_in_the_block_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("text")  # type: ignore[arg-type]
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_has_the_mode_of_other_new_files(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "renames"])
@pytest.mark.parametrize("exists", [True, False], ids=["replaces", "new"])
def test_a_folder_takes_the_name_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, exists: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(files, "swap_names", lambda a, b: False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("after")
    if exists:
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "b").write_text("before")
    replace_directory(tmp_path / "new", tmp_path / "target", tmp_path / "aside")
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(tmp_path / "target") == ["a"]


def test_json_reads_back(tmp_path: Path) -> None:
    document = {"b": [1, 2.5, None, True], "a": {"x": float("inf")}}
    write_json(tmp_path / "folder" / "a.json", document)
    assert read_json(tmp_path / "folder" / "a.json") == document
    assert os.listdir(tmp_path / "folder") == ["a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[1]", "must be a JSON object; got list", id="list"),
        pytest.param('{"a": NaN}', "NaN is not a JSON number", id="nan"),
        pytest.param('{"a": 1, "a": 2}', "the key 'a' is repeated", id="repeated-key"),
        pytest.param("{", "not valid JSON", id="cut"),
        pytest.param("[" * 100_000, "not valid JSON", id="nested"),
    ],
)
def test_json_that_is_not_accepted_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json")


def test_json_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DDPM_FAST_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"DDPM_FAST_CACHE": "~/plans", "HOME": "/h"}, "/h/plans"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/ddpm_fast"),
        ({"HOME": "/h"}, "/h/.cache/ddpm_fast"),
        ({"DDPM_FAST_CACHE": "off"}, None),
        ({"DDPM_FAST_CACHE": "OFF"}, None),
    ],
)
def test_the_environment_chooses_the_cache(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str | None
) -> None:
    for name in ("DDPM_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == (None if folder is None else Path(folder))


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    prepare_folder(tmp_path / "a" / "b")
    assert not os.listdir(tmp_path / "a" / "b")


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="folder cannot be written to") as caught:
            prepare_folder(folder)
        assert caught.value.filename == str(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, who may write all")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="folder cannot be written to"):
        prepare_folder(tmp_path)
