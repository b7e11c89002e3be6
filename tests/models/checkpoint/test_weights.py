"""Weights in every form in which diffusers saves them, and forms that are rejected."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import OPTIONS, UNET_FILE, assert_same_output, contents, same_state
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load, save

SAFE, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX = f"{SAFE}.index.json"
FIRST, LAST = (f"diffusion_pytorch_model-000{n}-of-00012.safetensors" for n in ("01", "12"))


@pytest.fixture(scope="module")
def theirs(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**OPTIONS).eval()


@pytest.fixture(scope="module")
def sharded(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    theirs.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def shards(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "shards")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(**OPTIONS).eval()


@pytest.mark.parametrize(
    ("pipeline", "size", "safe", "variant"),
    [
        (True, "10GB", True, "fp16"),
        (True, "20KB", False, None),
        (False, "10GB", True, None),
        (False, "10GB", False, "non-ema"),
        (False, "20KB", True, "fp16"),
        (False, "20KB", False, "non-ema"),
    ],
)
def test_forms_that_diffusers_saves(diffusers, theirs, tmp_path, pipeline, size, safe, variant):
    saved = diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()) if pipeline else theirs
    folder = tmp_path / "unet" if pipeline else tmp_path
    saved.save_pretrained(tmp_path, safe_serialization=safe, variant=variant, max_shard_size=size)
    kind = "safetensors" if safe else "bin"
    assert len([*folder.glob(f"*.{kind}")]) == (1 if size == "10GB" else 12)
    assert_same_output(load(tmp_path, variant=variant).unet, theirs)


def test_half_precision_variant(theirs, diffusers, tmp_path):
    half = diffusers.UNet2DModel(**OPTIONS)
    half.load_state_dict(theirs.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16")
    theirs.save_pretrained(tmp_path)
    assert_same_output(load(tmp_path).unet, theirs)
    assert_same_output(load(tmp_path, variant="fp16").unet, half.float())
    assert load(tmp_path, torch.float16, variant="fp16").unet.dtype == torch.float16


def test_shards_of_a_variant_under_older_names(shards, theirs):
    index = json.loads((shards / INDEX).read_text())
    for path in shards.glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    for key, name in index["weight_map"].items():
        index["weight_map"][key] = name.replace(".safetensors", ".fp16.safetensors")
    (shards / INDEX).unlink()
    (shards / f"{SAFE}.fp16.index.json").write_text(json.dumps(index))
    assert_same_output(load(shards, variant="fp16").unet, theirs)


def test_safetensors_precede_pickles(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / BIN).write_bytes(b"not read")
    assert_same_output(load(tmp_path).unet, theirs)


def test_pickle_in_the_format_before_zip(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    write_old(theirs.state_dict(), tmp_path / BIN)
    assert_same_output(load(tmp_path).unet, theirs)


@pytest.mark.parametrize(("safe", "axes"), [(True, 2), (False, 0)], ids=["conv", "linear"])
def test_old_attention_keys(theirs, tmp_path, safe, axes):
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    state = {}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, value in theirs.state_dict().items():
        part = next((new for new in old if f".{new}." in name), None)
        if part:
            name = name.replace(f".{part}.", f".{old[part]}.")
            value = value[(...,) + (None,) * (axes if value.dim() == 2 else 0)]
        state[name] = value.contiguous()
    assert "mid_block.attentions.0.proj_attn.bias" in state
    save_file(state, tmp_path / SAFE) if safe else torch.save(state, tmp_path / BIN)
    assert_same_output(load(tmp_path).unet, theirs)


def test_only_a_projection_may_be_a_convolution(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / SAFE)
    key = "time_embedding.linear_1.weight"
    save_file(state | {key: state[key][..., None, None].contiguous()}, tmp_path / SAFE)
    with pytest.raises(ValueError, match=rf"{key} must be \[32, 8\] .*got F32 \[32, 8, 1, 1\]"):
        load(tmp_path)


class TestMissing:
    @pytest.mark.parametrize("form", ["plain", "sharded"])
    def test_variant(self, theirs, shards, form, tmp_path):
        folder = shards if form == "sharded" else tmp_path / "plain"
        theirs.save_pretrained(folder, variant="bf16")
        theirs.save_pretrained(folder, variant="non-ema", max_shard_size="20KB")
        if form == "plain":
            theirs.save_pretrained(folder, safe_serialization=False)
        match = (
            r"missing, variant='fp16'; there are weights variant='bf16', variant='non-ema', "
            r"without a variant: .*model\.fp16\.safetensors"
        )
        with pytest.raises(FileNotFoundError, match=match):
            load(folder, variant="fp16")

    def test_weights_without_a_variant(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(FileNotFoundError, match="missing; there are weights variant='fp16': "):
            load(tmp_path)

    def test_shard(self, shards):
        (shards / LAST).unlink()
        with pytest.raises(FileNotFoundError, match=f"index.json lists is missing.*{LAST}"):
            load(shards)

    @pytest.mark.parametrize("name", ["", "a.b", "../fp16", "fp16/", "-", "bin", "ä", 16])
    def test_variant_must_be_a_plain_name(self, tmp_path, unet, name):
        match = rf"variant must be None or a plain name.*got {re.escape(repr(name))}"
        for attempt in (
            lambda: load(tmp_path, variant=name),
            lambda: save(tmp_path / "model", unet, variant=name),
        ):
            with pytest.raises(ValueError, match=match):
                attempt()
        assert [*tmp_path.iterdir()] == []


def reindex(change):
    def apply(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def assign_bias(name):
    return reindex(lambda keys: keys.update({"conv_in.bias": name}))


def key_twice(folder):
    text = (folder / INDEX).read_text()
    line = next(line for line in text.splitlines() if '"conv_in.bias"' in line)
    (folder / INDEX).write_text(text.replace(line, f"{line}\n{line}"))


def both_names(folder):
    key, old = "mid_block.attentions.0.to_q.bias", "mid_block.attentions.0.query.bias"
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(name for name in names.values() if name != names[key])
    save_file(
        load_file(folder / other) | {old: load_file(folder / names[key])[key]}, folder / other
    )
    reindex(lambda keys: keys.update({old: other}))(folder)


def extra_key(folder):
    save_file(load_file(folder / FIRST) | {"lora": torch.ones(1)}, folder / FIRST)


# fmt: off
INDICES = {
    "key-twice": (key_twice, f"{INDEX}.*'conv_in.bias' is repeated"),
    "key-under-both-names": (both_names, "query.bias.*are the same weight"),
    "key-unnamed": (
        reindex(lambda keys: keys.pop("conv_in.bias")),
        f"-of-00012.safetensors: holds conv_in.bias, which {INDEX} assigns to no file"),
    "key-extra": (extra_key, f"{FIRST}: holds lora, which {INDEX} assigns to no file"),
    "key-missing": (
        reindex(lambda keys: keys.update({"lora": keys["conv_in.bias"]})),
        f"lacks keys that {INDEX} assigns to it: lora"),
    "key-in-another-file": (
        assign_bias(LAST), f"{FIRST}: holds conv_in.bias, which {INDEX} assigns to {LAST}"),
    **{f"path-{name}": (
        assign_bias(name),
        rf"{INDEX}: {re.escape(repr(name))} must be the name of a file in the same folder")
       for name in (f"../{SAFE}", f"/tmp/{SAFE}", rf"..\{SAFE}", "..", "", None)},
    "other-format": (assign_bias(BIN), f"{INDEX}: '{BIN}' must be a .safetensors file"),
    "no-map": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
        f"{INDEX}: weight_map must be an object"),
    "cut": (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: not valid JSON"),
}
# fmt: on


@pytest.mark.parametrize("name", INDICES)
def test_index_that_does_not_match_the_shards(shards, name):
    corrupt, match = INDICES[name]
    corrupt(shards)
    with pytest.raises(ValueError, match=match):
        load(shards)


class Command:
    """Object whose unpickling runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write_old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_plain(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


TRUNCATED = "truncated or not a file of tensors"


class TestPickles:
    @pytest.fixture
    def folder(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path / "model", safe_serialization=False)
        return tmp_path / "model"

    @pytest.mark.parametrize("write", [torch.save, write_old, write_plain])
    def test_code_is_rejected_and_does_not_run(self, folder, tmp_path, write):
        marker = tmp_path / "marker"
        write({"conv_in.bias": Command(f"touch {marker}")}, folder / BIN)
        with pytest.raises(ValueError, match=rf"{BIN}: refers to posix.system; only tensors are"):
            load(folder)
        assert not marker.exists()
        if write is write_plain:
            pickle.loads((folder / BIN).read_bytes())
        else:
            torch.load(folder / BIN, weights_only=False)
        assert marker.exists(), "the file holds no code"

    def test_zip_files_are_memory_mapped(self, folder, theirs, monkeypatch):
        calls = []
        read = torch.load
        monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or read(*a, **k))
        load(folder)
        write_old(theirs.state_dict(), folder / BIN)
        load(folder)
        assert [call["mmap"] for call in calls] == [True, False]

    @pytest.mark.parametrize(
        ("damage", "match"),
        [
            pytest.param(lambda data: b"", TRUNCATED, id="empty"),
            pytest.param(lambda data: data[:-60], TRUNCATED, id="cut"),
            pytest.param(lambda data: data[:36509], TRUNCATED, id="cut-so-that-a-seek-fails"),
            pytest.param(lambda data: data[:2000], TRUNCATED, id="header-cut"),
            pytest.param(
                lambda data: b"version https://git-lfs.github.com/spec/v1\n",
                "not a pickle of tensors",
                id="lfs-pointer",
            ),
        ],
    )
    def test_damaged(self, folder, damage, match):
        (folder / BIN).write_bytes(damage((folder / BIN).read_bytes()))
        with pytest.raises(ValueError, match=f"{BIN}: {match}"):
            load(folder)

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            pytest.param(
                [torch.ones(1)], "must hold a dict of dense tensors .*got list", id="list"
            ),
            pytest.param({"state_dict": {}}, "got 'state_dict': dict", id="nested"),
            pytest.param({0: torch.ones(1)}, "got 0: a tensor", id="number-for-key"),
            pytest.param({"a": torch.eye(2).to_sparse()}, "'a': a tensor.*sparse", id="sparse"),
            pytest.param({"a": torch.ones(1, device="meta")}, "a tensor on meta", id="meta"),
            pytest.param({"a": torch.ones(1)}, "keys are missing", id="other-keys"),
        ],
    )
    def test_other_contents(self, folder, value, match):
        torch.save(value, folder / BIN)
        with pytest.raises(ValueError, match=f"{BIN}: .*{match}"):
            load(folder)

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            pytest.param(torch.ones(2), r"must be \[1\] in one of .*; got F32 \[2\]", id="shape"),
            pytest.param(torch.ones(1, dtype=torch.int8), "must .*got torch.int8", id="integers"),
            pytest.param(torch.full((1,), torch.nan), "not finite", id="nan"),
        ],
    )
    def test_weight_of_another_shape_or_dtype(self, folder, theirs, value, match):
        torch.save(theirs.state_dict() | {"conv_out.bias": value}, folder / BIN)
        with pytest.raises(ValueError, match=f"{BIN}: conv_out.bias .*{match}"):
            load(folder)


class TestSave:
    @pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "unet"])
    def test_diffusers_reads_a_variant(self, diffusers, unet, tmp_path, pipeline):
        schedule = NoiseSchedule.linear() if pipeline else None
        folder = save(tmp_path / "model", unet, schedule, variant="fp16")
        names = {path.name for path in folder.rglob("*.safetensors")}
        assert names == {"diffusion_pytorch_model.fp16.safetensors"}
        kind = diffusers.DDPMPipeline if pipeline else diffusers.UNet2DModel
        read = kind.from_pretrained(folder, variant="fp16", use_safetensors=True)
        assert_same_output(unet, read.unet if pipeline else read)
        assert same_state(load(folder, variant="fp16").unet, unet)

    def test_overwrite_keeps_another_variant(self, unet, tmp_path):
        folder = save(tmp_path / "model", unet, NoiseSchedule.linear())
        before = contents(folder)
        with pytest.raises(FileExistsError, match=rf"not part of .*\({UNET_FILE}\)"):
            save(folder, unet, overwrite=True, variant="fp16")
        assert contents(folder) == before

    def test_overwrite_replaces_every_form_of_the_same_weights(self, unet, shards):
        (shards / BIN).write_bytes(b"")
        save(shards, unet, overwrite=True)
        assert contents(shards).keys() == {"config.json", SAFE}
