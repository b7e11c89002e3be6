"""PlanCache: round trips, concurrent writers, damaged files, unusable folders."""

import json
import multiprocessing
import os

import pytest
import torch

from ddpm_fast.engine.autotune.cache import PlanCache, TunerChoice, environment
from ddpm_fast.engine.autotune.tuner import Tuner

CPU = torch.device("cpu")
HERE = {"device": "a processor", "torch": "1"}


def cache(folder, **changes):
    return PlanCache(HERE | changes, folder)


def failing():
    raise RuntimeError("no such kernel\nand a long story")


def never():
    raise AssertionError("was run")


def test_round_trip(tmp_path):
    choice = TunerChoice("winner", {"winner": 1e-3, "other": 2e-3})
    assert cache(tmp_path / "new" / "folder").record("op", choice, ["winner"]) == choice
    assert cache(tmp_path / "new" / "folder").get("op") == choice
    assert cache(tmp_path / "new" / "folder").get("none") is None
    left = {path.suffix for path in (tmp_path / "new" / "folder").iterdir()}
    assert left <= {".json", ".lock"}


def test_without_a_folder_choices_stay_in_memory():
    memory = cache(None)
    memory.record("op", TunerChoice("a"), ["a"])
    assert memory.get("op") == TunerChoice("a")
    assert memory.path is None


def test_environments_have_separate_files(tmp_path):
    cache(tmp_path).record("op", TunerChoice("a"), ["a"])
    other = cache(tmp_path, torch="2")
    assert other.get("op") is None
    other.record("op", TunerChoice("b"), ["b"])
    assert cache(tmp_path).get("op") == TunerChoice("a")
    assert cache(tmp_path, torch="2").get("op") == TunerChoice("b")


def test_a_file_of_another_environment_is_ignored(tmp_path, caplog):
    mine, other = cache(tmp_path), cache(tmp_path, torch="2")
    other.record("op", TunerChoice("b"), ["b"])
    other.path.rename(mine.path)
    assert mine.get("op") is None
    assert "belongs to another environment" in caplog.text


def test_writers_keep_what_others_have_written(tmp_path):
    first, second = cache(tmp_path), cache(tmp_path)
    assert first.get("x") is None
    assert second.get("x") is None
    first.record("x", TunerChoice("a"), ["a"])
    second.record("y", TunerChoice("b"), ["b"])
    third = cache(tmp_path)
    assert (third.get("x"), third.get("y")) == (TunerChoice("a"), TunerChoice("b"))


def test_of_two_choices_the_first_recorded_is_valid(tmp_path):
    first, second = cache(tmp_path), cache(tmp_path)
    second.get("x")
    first.record("x", TunerChoice("a", {"a": 1.0}), ["a", "b"])
    assert second.record("x", TunerChoice("b"), ["a", "b"]) == TunerChoice("a", {"a": 1.0})
    assert second.get("x").name == "a"
    # unless the second cannot run it
    assert second.record("x", TunerChoice("b"), ["b"]) == TunerChoice("b")
    assert cache(tmp_path).get("x").name == "b"


def write(folder, name):
    shared = cache(folder)
    for i in range(30):
        shared.record(f"{name}{i}", TunerChoice("a", {"a": 1.0}), ["a"])


# Forking a process with threads warns from Python 3.12 on; the children only write files.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_two_processes_write_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=write, args=(tmp_path, name)) for name in ("x", "y")]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    both = cache(tmp_path)
    assert all(
        both.get(f"{name}{i}") == TunerChoice("a", {"a": 1.0}) for name in "xy" for i in range(30)
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"environment": {}}',
        b'{"environment": ENV, "choices": []}',
        b'{"environment": ENV, "choices": {"op": {"name": 3, "seconds": {}}}}',
        b'{"environment": ENV, "choices": {"op": {"name": "a", "seconds": {"a": "x"}}}}',
        b'{"environment": ENV, "choices": {"op": "a"}}',
        b"[" * 100_000,
    ],
    ids=[
        *("empty", "cut", "no-text", "list", "null", "no-choices", "list-of-choices"),
        *("name", "seconds", "choice", "deep"),
    ],
)
def test_a_damaged_file_is_reported_once_and_replaced(tmp_path, caplog, content):
    damaged = cache(tmp_path)
    damaged.path.write_bytes(content.replace(b"ENV", json.dumps(HERE).encode()))
    assert damaged.get("op") is None
    damaged.record("op", TunerChoice("a"), ["a"])
    assert len(caplog.records) == 1
    assert str(damaged.path) in caplog.text
    assert cache(tmp_path).get("op") == TunerChoice("a")


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("call", ["fcntl.flock", "os.replace", "os.fsync"])
def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, caplog, monkeypatch, call):
    stored = cache(tmp_path)
    monkeypatch.setattr(call, refuse)
    for key in ("x", "y"):
        stored.record(key, TunerChoice("a"), ["a"])
        assert stored.get(key) == TunerChoice("a")
    assert len(caplog.records) == 1
    assert "choices are not kept" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, caplog):
    tmp_path.chmod(0o500)
    stored = cache(tmp_path)
    stored.record("x", TunerChoice("a"), ["a"])
    assert stored.get("x") == TunerChoice("a")
    assert "choices are not kept" in caplog.text


def test_a_folder_that_is_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    stored = cache(tmp_path / "file")
    assert stored.get("x") is None
    assert stored.record("x", TunerChoice("a"), ["a"]) == TunerChoice("a")
    assert "choices are" in caplog.text


def test_the_environment_names_what_a_choice_depends_on(two_threads):
    found = environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == "2"
    assert found["device"]
    assert found["capability"]
    assert found["ddpm_fast"]
    assert all(isinstance(value, str) for value in found.values())


def test_by_default_a_tuner_keeps_its_choices_in_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path))
    created = Tuner(CPU, rounds=1)
    created.fastest("op", {"a": lambda: None})
    assert created.environment == environment(CPU)
    assert Tuner(CPU).fastest("op", {"b": never, "a": never}) == "a"
    monkeypatch.setenv("DDPM_FAST_CACHE", "off")
    assert Tuner(CPU, rounds=1).fastest("op", {"b": lambda: None, "a": failing}) == "b"
