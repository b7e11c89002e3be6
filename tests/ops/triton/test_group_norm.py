"""The Triton kernels of `group_norm_` on a GPU or, without one, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from cases import BF16, F16, F32
from ddpm_fast.ops.triton import group_norm_plan as plans
from group_norm_cases import (
    HALVES_AND_SINGLE,
    OUT,
    NormCase,
    arguments,
    assert_as_good_as_torch,
    exact,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.ddpm_fast.triton_group_norm_
X = 1  # among the arguments


@pytest.fixture
def in_shares(monkeypatch):
    """Every map is too large for registers, and its tiles and shares are small."""
    monkeypatch.setattr(plans, "HELD_ELEMENTS", 1)
    monkeypatch.setattr(plans, "TILE_ELEMENTS", 128)
    monkeypatch.setattr(plans, "WANTED_PROGRAMS", 1)
    plans.plan_of.cache_clear()
    yield
    plans.plan_of.cache_clear()


SLOW = {  # like another case, but for what other backends' tests cover
    *("no-silu", "cifar", "one-sample", "group-of-12", "odd-channels", "vector-unaligned"),
    *("residual", "total", "vector", "modulation", "two-sources", "vector-two-sources"),
    *("layout-channels-last", "layout-transposed", "layout-unaligned", "modulation-unaligned"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.name in SLOW else [])
        for case in HALVES_AND_SINGLE
    ],
)
def test_every_case_is_as_good_as_torch(case):
    assert_as_good_as_torch(arguments(case, DEVICE), OP)


SHARED = [
    NormCase("vector", (16,), (7, 9), vector=True, total="x"),
    NormCase("cropped", (16,), (5, 11), batch=1, layout="cropped", dtype=BF16),
    NormCase("huge-mean", (16,), (9, 7), batch=1, mean=3000.0),
    NormCase("two-sources-straddled", (32, 16), (5, 4), groups=4, dtype=F16),
    NormCase("two-sources-odd", (10, 5), (5, 7), groups=3),
    NormCase("everything", (16,), (5, 7), vector=True, modulation=True, residual=True, total="new"),
    NormCase("row-outside", (8,), (5, 9), modulation=True, row="outside", batch=3),
    NormCase("one-pixel", (64,), (1, 1), dtype=F16),
]


@pytest.mark.usefixtures("in_shares")
def test_the_shares_tested_are_several_tiles():
    plan = plans.plan_of(2, 16, 63, 4, 4, True, False)
    assert plan.shares > 1
    assert plan.share > plan.slab.pixels


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.usefixtures("in_shares")
def test_shares_of_a_large_map_are_as_good_as_torch(case):
    assert_as_good_as_torch(arguments(case, DEVICE), OP)


def test_every_channel_and_pixel_is_in_one_slab_and_share():
    for samples in (1, 64, 512):
        for channels, groups in ((128, 32), (384, 32), (21, 7), (48, 4), (5000, 1), (512, 32)):
            for pixels in (1, 15, 64, 1024, 65536, 2**31 + 5):
                plan = plans.plan_of(samples, channels, pixels, groups, 2, True, False)
                slab, size = plan.slab, channels // groups
                assert slab.valid % size == 0
                assert slab.valid // size <= slab.groups
                assert slab.valid <= slab.channels
                assert (plan.slabs - 1) * slab.valid < channels <= plan.slabs * slab.valid
                assert {n.bit_count() for n in slab[:3]} == {1}
                if plan.shares == 0:
                    assert pixels <= slab.pixels
                else:
                    assert plan.share % slab.pixels == 0
                    assert (plan.shares - 1) * plan.share < pixels <= plan.shares * plan.share


def test_the_maps_of_cifar32_are_read_once():
    for channels in (128, 256, 384, 512):
        for pixels in (1024, 256, 64, 16):
            plan = plans.plan_of(512, channels, pixels, 32, 2, True, False)
            assert plan.shares == 0
            assert plan.slab.channels * 2 >= plans.MIN_BYTES


def assert_a_nan_stays_in_its_group() -> None:
    case = NormCase("nan", (32, 16), (4, 4), groups=4)
    args = arguments(case, DEVICE)
    args[X][1, 20, 2, 3] = torch.nan  # group 1: channels 12 to 23
    OP(*args)
    got, want = args[OUT].cpu(), exact(args)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().sum() == 12 * 16
    assert got[1, 12:24].isnan().all()


def test_a_nan_stays_in_its_group():
    assert_a_nan_stays_in_its_group()


@pytest.mark.usefixtures("in_shares")
def test_a_nan_stays_in_its_group_of_shares():
    assert_a_nan_stays_in_its_group()


def test_an_infinity_makes_its_group_nan():
    args = arguments(NormCase("infinity", dtype=F16), DEVICE)
    args[X][0, 3, 1, 1] = torch.inf
    OP(*args)
    assert torch.equal(args[OUT].cpu().isnan(), exact(args)[0].isnan())


@pytest.mark.parametrize(
    "case",
    [
        NormCase("plain", (8,), (2, 3), dtype=F16),
        NormCase("everything", (8,), (2, 3), vector=True, modulation=True, total="new"),
        NormCase("two-sources", (8, 4), (2, 3), dtype=BF16, layout="contiguous"),
        NormCase("no-samples", batch=0),
    ],
    ids=str,
)
def test_opcheck(case):
    torch.library.opcheck(OP.default, arguments(case, DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a sparse file in CPU memory")
@pytest.mark.parametrize("shared", [False, True], ids=["held", "shares"])
def test_elements_beyond_2_to_the_31(sparse, request, shared):
    if shared:
        request.getfixturevalue("in_shares")
    case = NormCase("wide", (8,), (1, 4), batch=1, groups=2, total="x", residual=True, dtype=F16)
    near = arguments(case)
    far = list(near)
    strides = (1, 1, 1, 1 << 30)
    far[X] = sparse(F16, (3 << 30) + 8).as_strided(near[X].shape, strides).copy_(near[X])
    far[6] = far[X]
    OP(*near)
    OP(*far)
    assert torch.equal(far[OUT], near[OUT])
    assert torch.equal(far[X], near[X])


CIFAR = [
    NormCase("128@32", (128,), (32, 32), groups=32, dtype=F16),
    NormCase("384@32", (256, 128), (32, 32), groups=32, dtype=F16),
    NormCase("512@16", (256, 256), (16, 16), groups=32, dtype=F16),
    NormCase("256@16", (256,), (16, 16), groups=32, dtype=F16, residual=True, total="residual"),
    NormCase("768@8", (512, 256), (8, 8), groups=32, dtype=F16, vector=True),
    NormCase("512@4", (256, 256), (4, 4), groups=32, dtype=BF16, modulation=True),
    NormCase("128@256", (128,), (256, 256), groups=32, dtype=F16, vector=True, total="new"),
    NormCase("384@128", (256, 128), (128, 128), groups=32, dtype=F16),
    NormCase("128@32", (128,), (32, 32), groups=32, dtype=F32, residual=True, total="x"),
]


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("case", CIFAR, ids=str)
def test_real_sizes_on_a_gpu(case, batch):
    assert_as_good_as_torch(arguments(NormCase(**{**vars(case), "batch": batch}), DEVICE), OP)


@pytest.mark.cuda
def test_a_graph_replays_what_ran():
    args = arguments(NormCase("128@64", (128,), (64, 64), groups=32, vector=True), DEVICE)
    OP(*args)
    expected = args[OUT].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OP(*args)
    args[OUT].fill_(torch.nan)
    graph.replay()
    assert torch.equal(args[OUT], expected)


def test_a_table_without_rows_is_refused():
    x = torch.zeros(1, 4, 2, 2, device=DEVICE)
    affine = torch.zeros(4, device=DEVICE)
    empty = affine[None][:0]
    with pytest.raises(ValueError, match="at least one row; got none"):
        OP(x, x.clone(), None, empty, None, None, None, affine, affine, None, 2, 1e-5, False)
