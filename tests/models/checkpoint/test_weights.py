"""Weights in every form in which diffusers saves them, and in forms that are refused."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import OPTIONS, UNET_FILE, contents, same_state
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load, save

SAFE, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX = f"{SAFE}.index.json"


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("diffusers", reason="parity needs diffusers")


@pytest.fixture(scope="module")
def theirs(peer):
    torch.manual_seed(0)
    return peer.UNet2DModel(**OPTIONS).eval()


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


def same_output(ours, theirs):
    x = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 800])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [None, "fp16", "non-ema"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "unet"])
def test_what_diffusers_saves(peer, theirs, tmp_path, pipeline, size, safe, variant):
    saved = peer.DDPMPipeline(theirs, peer.DDPMScheduler()) if pipeline else theirs
    home = tmp_path / "unet" if pipeline else tmp_path
    saved.save_pretrained(tmp_path, safe_serialization=safe, variant=variant, max_shard_size=size)
    kind = "safetensors" if safe else "bin"
    assert len([*home.glob(f"*.{kind}")]) == (1 if size == "10GB" else 12)
    same_output(load(tmp_path, variant=variant).unet, theirs)


def test_half_precision_variant(theirs, peer, tmp_path):
    half = peer.UNet2DModel(**OPTIONS)
    half.load_state_dict(theirs.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16")
    theirs.save_pretrained(tmp_path)
    same_output(load(tmp_path).unet, theirs)
    same_output(load(tmp_path, variant="fp16").unet, half.float())
    assert load(tmp_path, torch.float16, variant="fp16").unet.dtype == torch.float16


def test_shards_of_a_variant_under_older_names(shards, theirs):
    index = json.loads((shards / INDEX).read_text())
    for path in shards.glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    for key, name in index["weight_map"].items():
        index["weight_map"][key] = name.replace(".safetensors", ".fp16.safetensors")
    (shards / INDEX).unlink()
    (shards / f"{SAFE}.fp16.index.json").write_text(json.dumps(index))
    same_output(load(shards, variant="fp16").unet, theirs)


def test_safetensors_come_first(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / BIN).write_bytes(b"not read")
    same_output(load(tmp_path).unet, theirs)


def test_the_format_before_zip(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    write_old(theirs.state_dict(), tmp_path / BIN)
    same_output(load(tmp_path).unet, theirs)


def old_names(state, axes):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, former in old.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{former}.")
                value = value[(...,) + (None,) * (axes if value.dim() == 2 else 0)]
        renamed[name] = value.contiguous()
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    return renamed


@pytest.mark.parametrize("axes", [0, 2], ids=["linear", "convolution"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_old_attention_keys(theirs, tmp_path, safe, axes):
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    state = old_names(theirs.state_dict(), axes)
    if safe:
        save_file(state, tmp_path / SAFE)
    else:
        torch.save(state, tmp_path / BIN)
    same_output(load(tmp_path).unet, theirs)


def test_only_a_projection_may_be_a_convolution(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / SAFE)
    key = "time_embedding.linear_1.weight"
    save_file(state | {key: state[key][..., None, None].contiguous()}, tmp_path / SAFE)
    with pytest.raises(ValueError, match=rf"{key} is F32 \[32, 8, 1, 1\], expected \[32, 8\]"):
        load(tmp_path)


class TestMissing:
    @pytest.mark.parametrize("shape", ["plain", "sharded"])
    def test_variant(self, theirs, shards, shape, tmp_path):
        folder = shards if shape == "sharded" else tmp_path / "plain"
        theirs.save_pretrained(folder, variant="bf16")
        theirs.save_pretrained(folder, variant="non-ema", max_shard_size="20KB")
        if shape == "plain":
            theirs.save_pretrained(folder, safe_serialization=False)
        match = (
            r"missing, variant='fp16'; there are weights variant='bf16', variant='non-ema', "
            r"without a variant: .*model\.fp16\.safetensors"
        )
        with pytest.raises(FileNotFoundError, match=match):
            load(folder, variant="fp16")

    def test_plain_weights(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(FileNotFoundError, match="missing; there are weights variant='fp16': "):
            load(tmp_path)

    def test_shard(self, shards):
        name = "diffusion_pytorch_model-00002-of-00012.safetensors"
        (shards / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"index.json names is missing.*{name}"):
            load(shards)

    @pytest.mark.parametrize("name", ["", "a.b", "../fp16", "fp16/", "-", "bin", "ä", 16])
    def test_variant_that_is_no_name(self, tmp_path, unet, name):
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


def name_twice(folder):
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
    reindex(lambda m: m.update({old: other}))(folder)


def extra_key(folder):
    name = "diffusion_pytorch_model-00001-of-00012.safetensors"
    save_file(load_file(folder / name) | {"lora": torch.ones(1)}, folder / name)


SHARDS = [
    pytest.param(name_twice, f"{INDEX}.*'conv_in.bias' is repeated", id="key-twice"),
    pytest.param(both_names, "query.bias.*are the same weight", id="key-under-both-names"),
    pytest.param(
        reindex(lambda m: m.pop("conv_in.bias")),
        rf"-of-00012.safetensors: holds conv_in.bias, which {INDEX} places nowhere",
        id="key-unnamed",
    ),
    pytest.param(
        extra_key, f"00001-of.*: holds lora, which {INDEX} places nowhere", id="key-extra"
    ),
    pytest.param(
        reindex(lambda m: m.update({"lora": m["conv_in.bias"]})),
        f"keys are missing that {INDEX} places there: lora",
        id="key-lost",
    ),
    pytest.param(
        reindex(
            lambda m: m.update(
                {"conv_in.bias": "diffusion_pytorch_model-00012-of-00012.safetensors"}
            )
        ),
        rf"00001-of.*: holds conv_in.bias, which {INDEX} places in .*00012-of-00012",
        id="key-in-another-file",
    ),
    *(
        pytest.param(
            reindex(lambda m, name=name: m.update({"conv_in.bias": name})),
            rf"{INDEX}: {re.escape(repr(name))} is not the name of a file beside it",
            id=f"path-{name}",
        )
        for name in (f"../{SAFE}", f"/tmp/{SAFE}", f"a/{SAFE}", rf"..\{SAFE}", "..", "", None, 1)
    ),
    pytest.param(
        reindex(lambda m: m.update({"conv_in.bias": BIN})),
        rf"{INDEX}: '{BIN}' is not a .safetensors file",
        id="other-format",
    ),
    pytest.param(
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
        f"{INDEX}: expected a weight_map",
        id="no-map",
    ),
    pytest.param(
        lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: not valid JSON", id="cut"
    ),
]


@pytest.mark.parametrize(("corrupt", "match"), SHARDS)
def test_index_that_does_not_fit(shards, corrupt, match):
    corrupt(shards)
    with pytest.raises(ValueError, match=match):
        load(shards)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write_zip(value, path):
    torch.save(value, path)


def write_old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_plain(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


class TestPickles:
    @pytest.fixture
    def folder(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path / "model", safe_serialization=False)
        return tmp_path / "model"

    @pytest.mark.parametrize("write", [write_zip, write_old, write_plain])
    def test_code_is_refused_and_never_runs(self, folder, tmp_path, write):
        made = tmp_path / "made"
        write({"conv_in.bias": Command(f"touch {made}")}, folder / BIN)
        with pytest.raises(ValueError, match=rf"{BIN}: refused: it asks for posix.system"):
            load(folder)
        assert not made.exists()
        if write is write_plain:
            pickle.loads((folder / BIN).read_bytes())
        else:
            torch.load(folder / BIN, weights_only=False)
        assert made.exists(), "a file that runs no code shows nothing"

    def test_values_are_mapped_where_they_can_be(self, folder, theirs, monkeypatch):
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
            pytest.param(lambda data: b"", "not a whole file of tensors", id="empty"),
            pytest.param(lambda data: data[:-60], "not a whole file of tensors", id="cut"),
            pytest.param(
                lambda data: data[:36509],
                "not a whole file of tensors",
                id="cut-so-that-a-seek-fails",
            ),
            pytest.param(lambda data: data[:2000], "not a whole file of tensors", id="header-cut"),
            pytest.param(
                lambda data: b"version https://git-lfs.github.com/spec/v1\n",
                "refused: it is not a pickle of tensors",
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
            pytest.param([torch.ones(1)], "a dict of tensors, found list", id="list"),
            pytest.param({"state_dict": {}}, "found 'state_dict': dict", id="nested"),
            pytest.param({0: torch.ones(1)}, "found 0: a tensor", id="number-for-key"),
            pytest.param({"a": torch.eye(2).to_sparse()}, "'a': a tensor.*sparse", id="sparse"),
            pytest.param({"a": torch.ones(1, device="meta")}, "a tensor on meta", id="meta"),
            pytest.param({"a": torch.ones(1)}, "keys are missing", id="other-keys"),
        ],
    )
    def test_of_something_else(self, folder, value, match):
        torch.save(value, folder / BIN)
        with pytest.raises(ValueError, match=f"{BIN}: .*{match}"):
            load(folder)

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            pytest.param(torch.ones(2), r"is F32 \[2\], expected \[1\]", id="shape"),
            pytest.param(torch.ones(1, dtype=torch.int8), "is torch.int8", id="integers"),
            pytest.param(torch.full((1,), torch.nan), "not finite", id="nan"),
        ],
    )
    def test_a_weight_that_does_not_fit(self, folder, theirs, value, match):
        torch.save(theirs.state_dict() | {"conv_out.bias": value}, folder / BIN)
        with pytest.raises(ValueError, match=f"{BIN}: conv_out.bias .*{match}"):
            load(folder)


class TestSave:
    @pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "unet"])
    def test_variant_is_what_diffusers_reads(self, peer, unet, tmp_path, pipeline):
        schedule = NoiseSchedule.linear() if pipeline else None
        folder = save(tmp_path / "model", unet, schedule, variant="fp16")
        names = {path.name for path in folder.rglob("*.safetensors")}
        assert names == {"diffusion_pytorch_model.fp16.safetensors"}
        kind = peer.DDPMPipeline if pipeline else peer.UNet2DModel
        read = kind.from_pretrained(folder, variant="fp16", use_safetensors=True)
        same_output(unet, read.unet if pipeline else read)
        assert same_state(load(folder, variant="fp16").unet, unet)

    def test_overwrite_spares_another_variant(self, unet, tmp_path):
        folder = save(tmp_path / "model", unet, NoiseSchedule.linear())
        before = contents(folder)
        with pytest.raises(FileExistsError, match=rf"not part of .*\({UNET_FILE}\)"):
            save(folder, unet, overwrite=True, variant="fp16")
        assert contents(folder) == before

    def test_overwrite_replaces_every_form_of_the_same_weights(self, unet, shards):
        (shards / BIN).write_bytes(b"")
        save(shards, unet, overwrite=True)
        assert contents(shards).keys() == {"config.json", SAFE}
