"""Arithmetic, tiles and interpreter of the Triton backend.

That it agrees with the other backends in every layout is tested where they are. Without a GPU the
kernels run in the interpreter, repaired by triton_interpreter.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cases import BF16, F16, F32, exact_normals, philox
from ddpm_fast.ops.row import ROW_WIDTH, RowFlag, column
from triton_cases import DEVICE, patterns, same, there
from triton_interpreter import bfloat16_bits, fma32

pytest.importorskip("triton")
import triton
import triton.language as tl

from ddpm_fast.ops.triton import arithmetic as core
from ddpm_fast.ops.triton import diffusion as kernels
from ddpm_fast.ops.triton import tiles
from ddpm_fast.ops.triton.tiles import Shape, Tile, View

CPP = torch.ops.ddpm_fast
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
SEED, STREAM, FIRST = (1 << 63) + 12345, 3, (1 << 33) - 2
RNG = torch.tensor([SEED - (1 << 64), STREAM, FIRST])
STEPS = 50


# Arithmetic


def fma_inputs() -> np.ndarray:
    """float32 [3, n]: random bits, exact sums just off a tie, cancellation, both ends of range."""
    step = np.arange(1, 500, dtype=np.float32) * np.float32(2.0**-23)
    one, power = np.ones_like(step), np.float32(2.0)
    families = [
        # The product is 2^-24 (1 - step^2): z plus it is 2^-70 or more below a tie.
        (1 + step, (1 - step) * power**-24, 1 + step),
        # The same among the subnormals, whose spacing is 2^-149.
        ((1 + step) * power**-75, (1 - step) * power**-75, step * power**-126),
        (1 + step, 1 - step, -one),
        (1 + step, one * power**127, (1 - step) * power**127),
    ]
    signs = itertools.product((np.float32(1), np.float32(-1)), repeat=3)
    signed = [[s * v for s, v in zip(sign, f, strict=True)] for sign in signs for f in families]
    special = list(itertools.product((0.0, -0.0, 1.0, np.inf, np.nan), repeat=3))
    parts = [patterns((3, 5000), F32, 1).numpy(), *map(np.stack, signed)]
    return np.concatenate([*parts, np.array(special, dtype=np.float32).T], axis=1)


def libm_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    return np.array(
        [fmaf(*v) for v in zip(*(v.tolist() for v in (x, y, z)), strict=True)], dtype=np.float32
    )


def test_the_repaired_fma_rounds_once():
    inputs = fma_inputs()
    exact = libm_fma(*inputs)
    assert same(torch.from_numpy(fma32(*inputs)), torch.from_numpy(exact))
    with np.errstate(all="ignore"):
        x, y, z = inputs.astype(np.float64)
        twice = (x * y + z).astype(np.float32)
    assert not same(torch.from_numpy(twice), torch.from_numpy(exact)), "the inputs are too easy"


def test_the_repaired_bfloat16_rounds_to_nearest_even():
    ties = (torch.arange(1 << 16, dtype=torch.int32) << 16) + 0x8000
    values = torch.cat([patterns((50000,), F32, 2), *((ties + k).view(F32) for k in (-1, 0, 1))])
    ours = torch.from_numpy(bfloat16_bits(values.numpy()).view(np.int16)).view(BF16)
    assert same(ours, values.to(BF16))


@triton.jit
def _language_kernel(x, y, z, fma, root, half, brain, single, size, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    mask = at < size
    a = tl.load(x + at, mask=mask)
    tl.store(fma + at, tl.fma(a, tl.load(y + at, mask=mask), tl.load(z + at, mask=mask)), mask)
    tl.store(root + at, tl.sqrt_rn(a), mask)
    tl.store(half + at, a.to(tl.float16), mask)
    tl.store(brain + at, a.to(tl.bfloat16), mask)
    tl.store(single + at, a.to(tl.uint32, bitcast=True).to(tl.float32), mask)


def test_the_language_rounds_as_the_core_assumes():
    """fma, square root and every conversion, each rounded once to nearest even."""
    x, y, z = torch.from_numpy(fma_inputs())
    outputs = [torch.empty_like(x, dtype=dtype) for dtype in (F32, F32, F16, BF16, F32)]
    args = there(x, y, z, *outputs)
    _language_kernel[(triton.cdiv(len(x), 1024),)](*args, len(x), N=1024)
    words = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    exact = torch.from_numpy(libm_fma(x.numpy(), y.numpy(), z.numpy()))
    expected = (exact, x.double().sqrt().to(F32), x.half(), x.bfloat16(), words.double().to(F32))
    assert all(map(same, args[3:], expected))


@triton.jit
def _words_kernel(out, counters, N: tl.constexpr):
    at = tl.arange(0, N)
    words = core.philox4x32_10(
        tl.load(counters + 6 * at).to(tl.uint32),
        tl.load(counters + 6 * at + 1).to(tl.uint32),
        tl.load(counters + 6 * at + 2).to(tl.uint32),
        tl.load(counters + 6 * at + 3).to(tl.uint32),
        tl.load(counters + 6 * at + 4).to(tl.uint32),
        tl.load(counters + 6 * at + 5).to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out + 4 * at + i, words[i].to(tl.int64))


def test_philox_words_are_those_of_random123():
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    random = torch.randint(0, 1 << 32, (13, 6), generator=torch.Generator().manual_seed(3))
    counters = torch.tensor([[0] * 6, [0xFFFFFFFF] * 6, pi, *random.tolist()])
    out, counters_there = there(torch.empty(16, 4, dtype=torch.int64), counters)
    _words_kernel[(1,)](out, counters_there, N=16)
    out = out.tolist()
    # kat_vectors of Random123 1.14, philox4x32 with 10 rounds
    assert out[:3] == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    assert out[3:] == [philox(row[:4], row[4:]) for row in random.tolist()]


@DTYPES
def test_a_quarter_of_a_million_normals_are_those_of_cpp(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 15)  # the interpreter is slow by the tile
    tiles.plan_of.cache_clear()
    shape = (4, 3, 149, 147) if dtype == F32 else (2, 3, 79, 81)
    ours, rng = there(torch.empty(shape, dtype=dtype), RNG)
    theirs = torch.empty(shape, dtype=dtype)
    kernels.philox_normal_(ours, rng)
    CPP.philox_normal_(theirs, RNG)
    tiles.plan_of.cache_clear()
    assert same(ours, theirs)


# The updates on random bits


@DTYPES
def test_q_sample_and_q_posterior_on_random_bits(dtype):
    x0, other = patterns((3, 2, 19, 31), dtype, 1), patterns((3, 2, 19, 31), dtype, 2)
    t = torch.tensor([0, 49, 7])
    for op, width in (("q_sample", 2), ("q_posterior", 4)):
        coefs = torch.randn(STEPS, width, generator=torch.Generator().manual_seed(4))
        args = (x0, t, other, coefs) if op == "q_sample" else (x0, other, t, coefs)
        ours, theirs = getattr(kernels, op)(*there(*args)), getattr(CPP, op)(*args)
        pairs = ([ours], [theirs]) if op == "q_sample" else (ours, theirs)
        assert all(map(same, *pairs))


@DTYPES
def test_conversions_of_every_half(dtype):
    """1 * x + 0: all 2^16 patterns of a half, read and written."""
    x = patterns((1, 1 << 16), F32, 1)
    if dtype != F32:
        x = torch.arange(1 << 16).to(torch.int16).view(1, -1).view(dtype)
    t, coefs = torch.zeros(1, dtype=torch.int64), torch.tensor([[1.0, -0.0]])
    assert same(kernels.q_sample(*there(x, t, torch.zeros_like(x), coefs)), x)


FLAGS = [RowFlag(0), RowFlag.CLIP, RowFlag.RAW_OUT, RowFlag.SCALE_IN, RowFlag(7)]


def step_inputs(dtype: torch.dtype, noise: str, stored: bool) -> list[Any]:
    """Arguments of reverse_step_ but for its flags, of random bits but for the row."""
    shape = (5, 3, 11, 13)
    last = {"memory_format": torch.channels_last}
    x, noise_input, pred_x0 = (patterns(shape, F32, s).contiguous(**last) for s in (1, 2, 3))
    out, model_input = (patterns(shape, dtype, s).contiguous(**last) for s in (4, 5))
    rows = torch.randn(STEPS, ROW_WIDTH, generator=torch.Generator().manual_seed(6))
    rows[:, column("clip")] = 1.0
    step = torch.tensor([0, 49, -1, 50, 1 << 40])  # three of them outside the table
    return [
        *(x, out, rows, step, noise_input if noise == "input" else None),
        *(RNG if noise == "generated" else None, model_input if stored else None),
        pred_x0 if stored else None,
    ]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: f"flags{int(flags)}")
@pytest.mark.parametrize("noise", ["none", "input", "generated"])
@DTYPES
def test_reverse_step_on_random_bits(dtype, noise, flags):
    """NaN and infinities included; a sample whose step is outside the table is left alone."""
    before = step_inputs(dtype, noise, stored=flags != RowFlag.RAW_OUT)
    theirs = step_inputs(dtype, noise, stored=flags != RowFlag.RAW_OUT)
    ours = there(*before)
    kernels.reverse_step_(*ours, int(flags))
    CPP.reverse_step_(*theirs, int(flags))
    for i in (0, 6, 7):
        if before[i] is not None:
            assert same(ours[i], theirs[i])
            assert same(ours[i][2:], before[i][2:])
            assert not same(ours[i][:2], before[i][:2])


def test_t_outside_the_table_is_clamped():
    x0, noise = torch.randn(2, 4, 2, 3).unbind()
    x0, noise = x0[..., None], noise[..., None]
    t = torch.tensor([-1, STEPS, -(1 << 63), (1 << 63) - 1])
    inside = t.clamp(0, STEPS - 1)
    coefs = torch.randn(STEPS, 4)
    ours = kernels.q_posterior(*there(x0, noise, t, coefs))
    assert all(map(same, ours, CPP.q_posterior(x0, noise, inside, coefs)))
    coefs = coefs[:, :2].contiguous()
    ours = kernels.q_sample(*there(x0, t, noise, coefs))
    assert same(ours, CPP.q_sample(x0, inside, noise, coefs))


# Tiles and layouts


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (300, 2), (5, 147), (9, 513), (2, 1023), (2, 1024), (2, 1025), (1, 2049), (1030,)],
    ids=str,
)
def test_tiles_of_every_shape(shape):
    """Several samples in a tile, one that fills it, several tiles for a sample."""
    x, noise = torch.randn(2, *shape).unbind()
    rows, step = torch.randn(STEPS, ROW_WIDTH), torch.arange(shape[0]) % (STEPS + 1)
    generated, rng = there(torch.empty(shape), RNG)
    expected = torch.empty(shape)
    kernels.philox_normal_(generated, rng)
    CPP.philox_normal_(expected, RNG)
    assert same(generated, expected)
    ours = there(x, x, rows, step, noise)
    kernels.reverse_step_(*ours, None, None, None, 0)
    CPP.reverse_step_(x, x.clone(), rows, step, noise, None, None, None, 0)
    assert same(ours[0], x)


def test_dense_tensors_are_walked_in_a_straight_line():
    shape, dense, last = (2, 3, 8, 8), (192, 64, 8, 1), (192, 1, 24, 3)
    for strides, generated_noise in ((dense, False), (last, False), (last, True)):
        plan = tiles.plan_of(shape, (strides, strides), generated_noise, 4)
        assert plan.layouts == ((192, ()),) * 2
        assert plan.walk == ((), 192, 1)
    one_channel = tiles.plan_of((2, 1, 8, 8), ((64, 7, 8, 1),), True, 4)  # the stride of 1 is any
    assert one_channel.layouts == ((64, ()),)


def test_other_tensors_share_one_walk_of_merged_dimensions():
    shape, dense, last, crop = (2, 3, 8, 8), (192, 64, 8, 1), (192, 1, 24, 3), (1024, 256, 16, 1)
    plan = tiles.plan_of(shape, (last, dense), False, 4)
    assert plan.layouts == ((192, ()), (192, (1, 64)))
    assert plan.walk.sizes == (64, 3)
    plan = tiles.plan_of(shape, (last, dense, crop), False, 4)
    assert plan.layouts == ((192, ()), (192, (8, 1, 64)), (1024, (16, 1, 256)))
    assert plan.walk.sizes == (8, 8, 3)


@triton.jit
def _wide_kernel(offsets, normals, view, sizes, rng, sample, first, SHAPE: tl.constexpr):
    at = tl.arange(0, SHAPE.columns)
    tile = Tile(sample, first, first + at, sizes, at >= 0, at >= 0)
    tl.store(offsets + at, tiles.pointers(view, tile).to(tl.int64) - view.data.to(tl.int64))
    tl.store(normals + at, tiles.normals(rng, 0, tile, SHAPE))


def test_elements_beyond_2_to_the_31():
    sizes, strides = (3, 50000, 70000), (-5, 1 << 33, 100003)
    shape, sample, first = Shape(1, 16, 4, True), (1 << 31) + 5, (1 << 33) + 69992
    view = View(torch.empty(0, device=DEVICE), 1 << 26, strides)
    offsets, normals, rng = there(torch.empty(16, dtype=torch.int64), torch.empty(16), RNG)
    _wide_kernel[(1,)](offsets, normals, view, sizes, rng, sample, first, SHAPE=shape)
    index = np.unravel_index(np.arange(first, first + 16), sizes)
    expected = sample * (1 << 26) + sum(i * s for i, s in zip(index, strides, strict=True))
    assert offsets.tolist() == (4 * expected).tolist()
    blocks = range(first // 4, first // 4 + 4)
    exact = [z for b in blocks for z in exact_normals(b, STREAM, FIRST + sample, SEED)]
    torch.testing.assert_close(normals.cpu(), torch.tensor(exact), rtol=0, atol=2e-6)
    assert tiles.plan_of((1, 2**31), ((2**31, 1),), True, 4).tile.wide
    assert not tiles.plan_of((2**31, 1), ((1, 1),), True, 4).tile.wide
