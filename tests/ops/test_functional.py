"""group_norm and attention: values, layouts, gradients refused, aliases, compile, bad arguments."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cases import (
    BF16,
    F16,
    F32,
    F64,
    assert_named,
    backends,
    kernel_backends,
    normals,
    relative_error,
    same_bits,
)
from ddpm_fast.ops import functional as network
from ddpm_fast.ops.dispatch import DTYPES
from ddpm_fast.ops.functional import attention, group_norm

ON = pytest.mark.parametrize("on", backends(), ids=str)
LAYOUTS = ["contiguous", "channels-last", "transposed", "sliced", "gapped", "expanded"]


def image(channels, layout="channels-last", dtype=F32, seed=1, device="cpu", size=(3, 5, 7)):
    return normals((size[0], channels, *size[1:]), layout, dtype, seed, device)


def table(columns, device, seed, dtype=F32, rows=4):
    """Columns of a wide table, as a network makes all of its vectors at once."""
    wide = normals((rows, columns + 6), "contiguous", dtype, seed, device)
    return wide[:, 3 : 3 + columns] / 2


def terms(name, device, dtype=F32, layout="channels-last"):
    """Arguments of group_norm with these terms, groups of 12 channels (8 and 4 in two sources)."""
    wide = F64 if dtype == F64 else F32
    found = {"x": image(24, layout, dtype, 1, device), "groups": 2}
    if "x2" in name:
        found["x2"] = image(12, layout, dtype, 2, device)
        found["groups"] = 3
        if "straddling" in name:
            found["x"], found["x2"] = found["x"][:, :20], image(16, layout, dtype, 2, device)
    channels = found["x"].shape[1] + (found["x2"].shape[1] if "x2" in name else 0)
    if "affine" in name:
        found["weight"] = 1 + normals((channels,), "contiguous", wide, 3, device) / 2
        found["bias"] = normals((channels,), "contiguous", wide, 4, device)
        if "own" in name:
            found["weight"], found["bias"] = found["weight"].to(dtype), found["bias"].to(dtype)
    if "vector" in name:
        found["vector"] = table(channels, device, 5, wide)
    if "modulation" in name:
        found["modulation"] = table(2 * channels, device, 6, wide)
    if "row" in name:
        found["row"] = torch.tensor([3, 0, 2], device=device)
    if "residual" in name:
        found["residual"] = image(24, layout, dtype, 7, device)
    found["silu"] = "silu" in name
    return found


def composed(
    x, groups, weight=None, bias=None, eps=1e-5, silu=False, x2=None, vector=None, row=None,
    residual=None, modulation=None, dtype=F64,
):  # fmt: skip
    """The same by torch's functions, everything in ``dtype``: (out, sum)."""
    x, x2, weight, bias, vector, residual, modulation = (
        None if v is None else v.to(dtype)
        for v in (x, x2, weight, bias, vector, residual, modulation)
    )
    h = x if x2 is None else torch.cat([x, x2], 1)
    row = torch.zeros(len(x), dtype=torch.int64, device=x.device) if row is None else row
    if vector is not None:
        h = h + vector[row][:, :, None, None]
    if residual is not None:
        h = h + residual
    y = F.group_norm(h, groups, weight, bias, eps)
    if modulation is not None:
        scale, shift = modulation[row][:, :, None, None].chunk(2, 1)
        y = y * (1 + scale) + shift
    return (F.silu(y) if silu else y), h


def assert_close_as_torch(ours, exact, torchs):
    """At most twice torch's own error in the same dtype, or a few roundings."""
    bound = max(2 * relative_error(torchs, exact), 4 * torch.finfo(ours.dtype).eps)
    assert relative_error(ours, exact) <= bound


TERMS = [
    "plain",
    "affine",
    "silu",
    "affine-own-dtype silu",
    "x2 affine silu",
    "x2 straddling affine silu",
    "vector row affine silu",
    "vector silu",
    "residual affine silu",
    "modulation row silu",
    "vector modulation row residual affine silu",
    "x2 vector modulation row affine silu",
]


NAMES_AND_DTYPES = [
    *((name, F32) for name in TERMS),
    *((name, dtype) for name in TERMS[-2:] for dtype in (F16, BF16, F64)),
]


@pytest.mark.parametrize(
    ("on", "name", "dtype"),
    [
        pytest.param(on, name, dtype, id=f"{on}-{name.replace(' ', '-')}-{dtype}")
        for on in backends()
        for name, dtype in NAMES_AND_DTYPES
        if dtype in DTYPES[on.name]
    ],
)
def test_group_norm_is_what_torch_composes(on, dtype, name):
    args = terms(name, on.device, dtype)
    ours = group_norm(**args, backend=on.name)
    assert_close_as_torch(ours, composed(**args)[0], composed(**args, dtype=dtype)[0])
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)


@ON
@pytest.mark.parametrize("name", ["residual vector affine silu", "plain"])
def test_the_sum_is_returned_rounded_once(on, name):
    args = terms(name, on.device, F16)
    ours, total = group_norm(**args, return_sum=True, backend=on.name)
    exact = composed(**args)
    assert_close_as_torch(ours, exact[0], composed(**args, dtype=F16)[0])
    assert (total.double() - exact[1]).abs().max() <= 1e-3 * exact[1].abs().max()
    assert total.is_contiguous(memory_format=torch.channels_last)
    if name == "plain":
        assert same_bits(total, args["x"])


@ON
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("x2 affine silu", layout) for layout in LAYOUTS),
        *(("vector residual affine", layout) for layout in ("contiguous", "gapped")),
    ],
)
def test_every_layout_gives_the_same(on, layout, name):
    got = group_norm(**terms(name, on.device, F32, layout), backend=on.name)
    exact, _ = composed(**terms(name, on.device, F32, layout))
    assert relative_error(got, exact) <= 2e-6
    assert got.is_contiguous(memory_format=torch.channels_last)


@ON
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "gapped"])
def test_out_is_written_and_returned(on, layout):
    args = terms("x2 affine silu", on.device)
    out = image(36, layout, seed=9, device=on.device)
    strides = out.stride()
    assert group_norm(**args, out=out, backend=on.name) is out
    assert out.stride() == strides
    assert relative_error(out, composed(**args)[0]) <= 2e-6


@ON
@pytest.mark.parametrize("alias", ["x", "residual", "x-shifted", "weight"])
def test_out_may_share_the_memory_of_an_input(on, alias):
    args = terms("residual affine silu", on.device)
    exact, _ = composed(**args)
    memory = normals((4, 5, 7, 24), "contiguous", F32, 9, on.device)
    out = memory[:3].permute(0, 3, 1, 2)
    if alias == "x-shifted":
        args["x"] = memory[1:].permute(0, 3, 1, 2).copy_(args["x"])
    elif alias == "weight":
        args["weight"] = out[1, :, 2, 3].copy_(args["weight"])
    else:
        args[alias] = out.copy_(args[alias])
    group_norm(**args, out=out, backend=on.name)
    assert relative_error(out, exact) <= 2e-6


@pytest.mark.parametrize("alias", ["x", "residual"])
def test_no_kernel_gets_an_input_that_it_writes(alias, monkeypatch):
    passed = []
    ops = SimpleNamespace(group_norm_=lambda *args: passed.extend(args[:6]))
    monkeypatch.setattr(network, "get_backend", lambda *key: ops)
    args = terms("residual", "cpu")
    group_norm(**args, out=args[alias])
    out, *inputs = (value.data_ptr() for value in passed if value is not None)
    assert len(inputs) == 2
    assert out not in inputs


@ON
@pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7)])
def test_nothing_to_do(on, size):
    x = image(24, device=on.device, size=size)
    vector = table(24, on.device, 5)
    out, total = group_norm(x, 2, vector=vector, return_sum=True, backend=on.name)
    assert out.shape == total.shape == x.shape


@ON
def test_nan_and_infinity_spoil_their_group_alone(on):
    x = image(24, device=on.device)
    x[0, 3, 1, 1], x[2, 13, 4, 6] = math.nan, math.inf
    ours = group_norm(x, 2, silu=True, backend=on.name)
    torchs = F.silu(F.group_norm(x, 2))
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert int(ours.isnan().any(3).any(2).sum()) == 24


@ON
def test_forms_of_row(on):
    args = terms("vector modulation affine silu", on.device)
    plain = group_norm(**args, row=torch.full((3,), 2, device=on.device), backend=on.name)
    for row in (2, torch.tensor(2, device=on.device), torch.tensor([2, 2, 2], dtype=torch.int32)):
        row = row.to(on.device) if isinstance(row, torch.Tensor) else row
        assert same_bits(group_norm(**args, row=row, backend=on.name), plain)
    none = group_norm(**args, backend=on.name)
    assert same_bits(none, group_norm(**args, row=0, backend=on.name))


@ON
def test_a_row_outside_the_table(on):
    args = terms("vector affine", on.device)
    row = torch.tensor([0, 4, -1], device=on.device)
    if on.device == "cpu":
        with pytest.raises(ValueError, match=r"row must be an integer in \[0, 3\]; got -1"):
            group_norm(**args, row=row, backend=on.name)
        return
    out = group_norm(**args, row=row, backend=on.name)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


@ON
@pytest.mark.parametrize("name", ["x", "weight", "bias", "vector", "residual", "modulation", "x2"])
def test_a_gradient_is_refused_where_it_would_be_lost(on, name):
    kinds = "vector modulation affine " + ("x2" if name == "x2" else "residual")
    args = terms(kinds, on.device)
    args[name] = args[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires grad, and group_norm has no gradient"):
        group_norm(**args, backend=on.name)
    with torch.no_grad():
        got = group_norm(**args, backend=on.name)
    assert not got.requires_grad


@ON
def test_a_stale_graph_is_noticed(on):
    """Autograd learns that out was written."""
    a = torch.ones(3, 24, 5, 7, device=on.device, requires_grad=True)
    stored = (a * 1).exp()
    group_norm(image(24, device=on.device), 2, out=stored.detach(), backend=on.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stored.sum().backward()


@pytest.mark.parametrize("on", kernel_backends(), ids=str)
def test_in_inference_mode_and_compiled(on):
    args = terms("vector row residual affine silu", on.device)
    want, total = group_norm(**args, return_sum=True, backend=on.name)
    with torch.inference_mode():
        assert same_bits(group_norm(**args, backend=on.name), want)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(args):
        out, total = group_norm(**args, return_sum=True, backend=on.name)
        return out + 0, total

    got = compiled(args)
    assert same_bits(got[0], want)
    assert same_bits(got[1], total)
    assert got[1].stride() == total.stride()


X = torch.randn(2, 8, 4, 4)
X2 = torch.randn(2, 4, 4, 4)
VECTOR = torch.randn(3, 8)
QKV = torch.randn(2, 5, 24)


def normed(x=X, groups=4, weight=None, bias=None, eps=1e-5, backend="reference", **kwargs):
    return group_norm(x, groups, weight, bias, eps, backend=backend, **kwargs)


def looked_up(vector=VECTOR, row=1, modulation=None):
    return group_norm(X, 4, vector=vector, row=row, modulation=modulation, backend="reference")


def attended(qkv=QKV, heads=2, scale=None, out=None, backend="reference"):
    return attention(qkv, heads, scale, out, backend)


IMAGES = [
    ([1.0], TypeError, "torch.Tensor", "list"),
    (X.long(), TypeError, "float32", "int64"),
    (X[0], ValueError, "[N, C", "[8, 4, 4]"),
]
TABLES = [
    ([1.0], TypeError, "torch.Tensor", "list"),
    (torch.zeros(3, 8).half(), TypeError, "float32", "float16"),
    (torch.zeros(3, 7), ValueError, "[R, ", "[3, 7]"),
    (torch.zeros(8), ValueError, "[R, ", "[8]"),
    (torch.zeros(0, 8), ValueError, "at least one row", "[0, 8]"),
]
BAD_CALLS = [
    *[(normed, "x", *case) for case in IMAGES],
    (normed, "x2", X2.half(), TypeError, "float32", "float16"),
    (normed, "x2", X2[:1], ValueError, "[2, C2, 4, 4]", "[1, 4, 4, 4]"),
    (normed, "x2", X2[0], ValueError, "[2, C2, 4, 4]", "[4, 4, 4]"),
    (normed, "x2", X2.to("meta"), ValueError, "cpu", "meta"),
    (normed, "groups", 3, ValueError, "8", "3"),
    (normed, "groups", 0, ValueError, "[1, ", "0"),
    (normed, "groups", 2.0, TypeError, "int", "float"),
    (normed, "weight", torch.ones(4), ValueError, "[8]", "[4]"),
    (normed, "weight", torch.ones(8).half(), TypeError, "float32", "float16"),
    (normed, "weight", torch.ones(8, device="meta"), ValueError, "cpu", "meta"),
    (normed, "bias", torch.ones(8, 1), ValueError, "[8]", "[8, 1]"),
    (normed, "eps", "1", TypeError, "number", "str"),
    (normed, "eps", math.nan, ValueError, "[0, inf)", "nan"),
    (normed, "eps", -1e-5, ValueError, "[0, inf)", "-1e-05"),
    (normed, "row", 0, ValueError, "vector and modulation", "without vector and modulation"),
    (normed, "residual", X[:1], ValueError, "[2, 8, 4, 4]", "[1, 8, 4, 4]"),
    (normed, "residual", X.half(), TypeError, "float32", "float16"),
    (normed, "out", X[:1].clone(), ValueError, "[2, 8, 4, 4]", "[1, 8, 4, 4]"),
    (normed, "out", X.half(), TypeError, "float32", "float16"),
    (normed, "out", X[:, :1].expand(2, 8, 4, 4), ValueError, "must not be expanded"),
    (normed, "out", X.to("meta"), ValueError, "cpu", "meta"),
    (normed, "backend", "gpu", ValueError, "auto, reference, cpu, triton, cuda", "'gpu'"),
    (normed, "backend", "cuda", RuntimeError, "cannot run", "CUDA tensors", "cpu"),
    *[(looked_up, "vector", *case) for case in TABLES],
    *[(looked_up, "modulation", *case) for case in TABLES],
    (looked_up, "modulation", torch.zeros(2, 16), ValueError, "as many rows as vector, 3", "2"),
    (looked_up, "row", 3, ValueError, "[0, 2]", "3"),
    (looked_up, "row", torch.tensor([0, -1]), ValueError, "[0, 2]", "-1"),
    (looked_up, "row", torch.tensor([0, 1, 1]), ValueError, "2 samples", "[3]"),
    (looked_up, "row", 1.0, TypeError, "int64", "float"),
    (attended, "qkv", [1.0], TypeError, "torch.Tensor", "list"),
    (attended, "qkv", torch.zeros(2, 5, 23), ValueError, "3 * heads * D", "[2, 5, 23]"),
    (attended, "qkv", torch.zeros(5, 24), ValueError, "3 * heads * D", "[5, 24]"),
    (attended, "heads", 3, ValueError, "3 heads", "[2, 5, 24]"),
    (attended, "heads", 0, ValueError, "[1, ", "0"),
    (attended, "scale", "1", TypeError, "number", "str"),
    (attended, "out", torch.zeros(2, 5, 24), ValueError, "[2, 5, 8]", "[2, 5, 24]"),
    (attended, "out", torch.zeros(2, 8, 5).mT, ValueError, "dense in its last", "(40, 1, 5)"),
    (attended, "backend", "cuda", RuntimeError, "cannot run", "CUDA tensors", "cpu"),
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda c: f"{c[0].__name__}-{c[1]}-{c[-1]}")
def test_bad_arguments_are_named_with_what_is_accepted(bad):
    assert_named(bad[0], bad[1:])


@pytest.mark.parametrize("more", [{"residual": X}, {"return_sum": True}])
def test_two_sources_go_with_neither_residual_nor_sum(more):
    with pytest.raises(ValueError, match=f"{next(iter(more))} must not be passed together with x2"):
        group_norm(X, 4, x2=X2, **more)


def test_weight_and_bias_are_of_one_dtype():
    with pytest.raises(TypeError, match="bias must have the dtype of weight, float32; got float16"):
        group_norm(X.half(), 4, torch.ones(8), torch.ones(8).half())
