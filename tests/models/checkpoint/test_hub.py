"""Checkpoints in repositories of the Hub, read from huggingface_hub's cache without a network."""

import errno
import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_cases import CONFIG, INDEX, OPTIONS, SCHEDULER, UNET_FILE, edit, same_state
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load, save
from ddpm_fast.models.checkpoint.hub import is_repository_id

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
constants, errors, utils = (
    pytest.importorskip(f"huggingface_hub.{name}") for name in ("constants", "errors", "utils")
)

NAME = "google/ddpm-cifar10-32"
COMMITS = {"main": "a" * 40, "old": "b" * 40}
FP16 = UNET_FILE.replace(".safe", ".fp16.safe")
BIN = "unet/diffusion_pytorch_model.bin"
CONFIGS = [INDEX, CONFIG, SCHEDULER]


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    return {branch: UNet(**OPTIONS).eval() for branch in COMMITS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the working directory is empty as well."""
    home = tmp_path / "cache"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def put(cache, name, branch, folder):
    """Store files as huggingface_hub does: blobs, and a snapshot of links to them."""
    root = cache / f"models--{name.replace('/', '--')}"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = root / "blobs" / f"{branch}-{path.name}"
        link = root / "snapshots" / COMMITS[branch] / path.relative_to(folder)
        for path_in_cache in (blob, link):
            path_in_cache.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(COMMITS[branch])


@pytest.fixture
def cached(cache, tmp_path, unets):
    for branch, unet in unets.items():
        folder = save(tmp_path / branch, unet, NoiseSchedule.linear())
        put(cache, NAME, branch, folder)
    return cache


class TestFromTheCache:
    def test_pipeline(self, cached, unets):
        found = load(NAME)
        assert same_state(found.unet, unets["main"])
        assert found.schedule == NoiseSchedule.linear()

    @pytest.mark.parametrize("revision", ["old", COMMITS["old"]])
    def test_revision(self, cached, unets, revision):
        assert same_state(load(NAME, revision=revision).unet, unets["old"])

    def test_a_name_without_an_owner(self, cache, tmp_path, unets):
        put(cache, "ddpm", "main", save(tmp_path / "a", unets["main"]))
        assert same_state(load("ddpm").unet, unets["main"])

    def test_variant(self, cache, tmp_path, unets):
        folder = save(tmp_path / "a", unets["main"], NoiseSchedule.linear(), variant="fp16")
        put(cache, NAME, "main", folder)
        assert same_state(load(NAME, variant="fp16").unet, unets["main"])
        with pytest.raises(FileNotFoundError, match=r"there are weights variant='fp16'"):
            load(NAME)

    def test_files_in_the_root_and_a_bin(self, cache, tmp_path, unets):
        folder = save(tmp_path / "a", unets["main"], NoiseSchedule.linear())
        for path in folder.glob("*/*.json"):
            path.rename(folder / path.name)
        torch.save(unets["main"].state_dict(), folder / Path(BIN).name)
        for name in ("unet", "scheduler"):
            shutil.rmtree(folder / name)
        put(cache, NAME, "main", folder)
        assert same_state(load(NAME).unet, unets["main"])

    @pytest.mark.slow
    def test_in_an_offline_process(self, cached):
        code = f"import ddpm_fast; print(ddpm_fast.load({NAME!r}).sample_shape)"
        env = {**os.environ, "HF_HUB_CACHE": str(cached), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
        assert result.stdout == b"(1, 4, 8)\n", result.stderr

    def test_a_folder_of_that_name_precedes(self, cached, unets):
        other = UNet(**OPTIONS)
        save(NAME, other)
        assert same_state(load(NAME).unet, other)


@pytest.fixture
def remote(cache, tmp_path, unets, monkeypatch):
    """Return a repository with every kind of file, and the (revision, files) of all downloads."""
    source = save(tmp_path / "remote", unets["main"], NoiseSchedule.linear())
    for name in ("README.md", "unet/training.pt", "vae/diffusion_pytorch_model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    shutil.copy(source / UNET_FILE, source / FP16)
    torch.save(unets["main"].state_dict(), source / BIN)
    downloads = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        assert name == NAME
        target = tmp_path / "snapshots" / COMMITS["main"]
        fetched = []
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            inside = path.relative_to(source).as_posix()
            if any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / inside)
                fetched.append(inside)
        downloads.append((revision, fetched))
        return str(target)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return source, downloads


class TestDownloads:
    @pytest.mark.parametrize(("variant", "weights"), [(None, UNET_FILE), ("fp16", FP16)])
    def test_safetensors_of_the_variant(self, remote, unets, variant, weights):
        _, downloads = remote
        assert same_state(load(NAME, variant=variant, revision="main").unet, unets["main"])
        assert downloads == [("main", sorted(CONFIGS)), (COMMITS["main"], [weights])]

    def test_a_pickle_without_safetensors(self, remote, unets):
        source, downloads = remote
        (source / UNET_FILE).unlink()
        assert same_state(load(NAME).unet, unets["main"])
        assert downloads[1:] == [(COMMITS["main"], []), (COMMITS["main"], [BIN])]

    def test_a_pickle_that_is_partly_in_the_cache(self, remote, tmp_path):
        source, downloads = remote
        (source / UNET_FILE).unlink()
        index = tmp_path / "snapshots" / COMMITS["main"] / f"{BIN}.index.json"
        index.parent.mkdir(parents=True)
        index.write_text('{"weight_map": {}}')
        with pytest.raises(ValueError, match="weight_map must be"):
            load(NAME)
        assert downloads[2:] == [(COMMITS["main"], [BIN])]

    def test_shards(self, remote, diffusers):
        source, downloads = remote
        (source / UNET_FILE).unlink()
        model = diffusers.UNet2DModel(**OPTIONS)
        model.save_pretrained(source / "unet", max_shard_size="20KB")
        model.save_pretrained(source / "unet", max_shard_size="20KB", variant="bf16")
        load(NAME)
        assert len(downloads) == 2
        assert len(downloads[1][1]) == 13
        assert not [name for name in downloads[1][1] if "bf16" in name]

    def test_no_weights_for_an_unsupported_pipeline(self, remote):
        source, downloads = remote
        edit(source / INDEX, {"_class_name": "StableDiffusionPipeline"})
        with pytest.raises(ValueError, match="StableDiffusionPipeline"):
            load(NAME)
        assert len(downloads) == 1

    def test_nothing_for_an_argument_that_is_not_accepted(self, remote):
        _, downloads = remote
        for wrong in (
            {"variant": "../a"},
            {"dtype": torch.int8},
            {"revision": ""},
            {"revision": 3},
        ):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
                load(NAME, **wrong)
        assert downloads == []


def failing(monkeypatch, online, cached):
    """Make downloads fail with one error, and reads of the cache with another."""

    def snapshot_download(*_, local_files_only=False, **__):
        raise cached if local_files_only else online

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)


def http_error(name):
    """Return an error of huggingface_hub, without the response in it."""
    kind = getattr(errors, name)
    return kind.__new__(kind, "404")


class TestMissing:
    def test_offline_and_not_in_the_cache(self, cache):
        match = rf"no repository in the cache; the Hugging Face Hub cannot be reached \(.*'{NAME}'"
        with pytest.raises(FileNotFoundError, match=match):
            load(NAME)

    def test_weights_that_were_not_cached(self, cached):
        next(cached.rglob("*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match=r"weights are missing.*ddpm-cifar10-32"):
            load(NAME)

    @pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "GatedRepoError"])
    def test_repository(self, cache, monkeypatch, kind):
        error = http_error(kind)
        failing(monkeypatch, error, error)
        with pytest.raises(FileNotFoundError, match=rf"no such repository.*hf auth.*{NAME}") as got:
            load(NAME)
        assert got.value.__cause__ is error

    def test_revision(self, cache, monkeypatch):
        error = http_error("RevisionNotFoundError")
        failing(monkeypatch, error, error)
        with pytest.raises(FileNotFoundError, match=rf"no revision='v9'.*{NAME}"):
            load(NAME, revision="v9")

    def test_the_cache_serves_after_any_connection_error(self, cached, unets, monkeypatch):
        download = hub.snapshot_download

        def proxied(*args, local_files_only=False, **kwargs):
            if not local_files_only:
                raise RuntimeError("no proxy")
            return download(*args, local_files_only=True, **kwargs)

        monkeypatch.setattr(hub, "snapshot_download", proxied)
        assert same_state(load(NAME).unet, unets["main"])

    def test_a_full_disk_is_not_a_connection_error(self, cache, monkeypatch):
        full = OSError(errno.ENOSPC, "No space left on device")
        failing(monkeypatch, full, OSError("not cached"))
        with pytest.raises(OSError, match="No space left") as got:
            load(NAME)
        assert got.value is full

    def test_without_huggingface_hub(self, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(FileNotFoundError, match=rf"pip install .huggingface_hub.*{NAME}"):
            load(NAME)


@pytest.mark.parametrize(
    "path",
    [
        *("./google/ddpm", "../ddpm", "/ddpm", "~/ddpm", "a/b/c", "a//b", "google/", ".ddpm"),
        *("a--b", "a..b", "a.git", "-a", "a b", "ä", "a" * 97, Path(NAME), Path("ddpm")),
    ],
    ids=str,
)
def test_paths_that_are_no_repository(cache, path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint folder: "):
        load(path)


@pytest.mark.parametrize("name", [NAME, "ddpm", "a", "a/b", "A.b_c-d/1.0", "_a", "a" * 96])
def test_names_of_repositories(name):
    utils.validate_repo_id(name)
    assert is_repository_id(name)


def test_existing_names_are_no_repository(cached):
    Path("ddpm").write_text("")
    with pytest.raises(ValueError, match="ddpm: is a file"):
        load("ddpm")
    Path("latest").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder: 'latest'"):
        load("latest")


def test_revision_of_a_folder(tmp_path, unets):
    folder = save(tmp_path / "model", unets["main"])
    with pytest.raises(ValueError, match=r"revision must be None .*model; got 'main'"):
        load(folder, revision="main")
