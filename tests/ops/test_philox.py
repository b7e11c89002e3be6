"""Philox, its normals and their statistics: the same bits in every backend, pinned by a hash."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import (
    F16,
    F32,
    F64,
    SHAPES,
    BackendOnDevice,
    assert_named,
    backends,
    exact_normals,
    kernel_backends,
    philox,
    same_bits,
)
from ddpm_fast import _C, philox_normal, philox_rng
from ddpm_fast.ops import reference
from ddpm_fast.ops.philox import STREAM_STEPS, random_words

stats = pytest.importorskip("scipy.stats")

ON = pytest.mark.parametrize("on", backends(), ids=str)
PINNED = json.loads((Path(__file__).parents[1] / "helpers" / "noise_sha256.json").read_text())
KERNELS = _C.build_info()["cpu_kernels"].split()

# philox4x32 10 in kat_vectors of Random123: counter, key, expected words.
KNOWN_ANSWERS = [
    pytest.param([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
    pytest.param(
        [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"
    ),
    pytest.param(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
        id="pi",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_equal_the_known_answers_of_random123(counter, key, expected):
    words = [int(word, 16) for word in expected.split()]
    assert _C.philox4x32_10(counter, key) == words
    tensors = reference.philox4x32_10(
        tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
    )
    assert [int(t) for t in tensors] == words
    assert philox(counter, key) == words


def test_words_equal_an_independent_implementation():
    values = np.random.default_rng(0).integers(0, 1 << 32, (200, 6)).tolist()
    for row in values:
        assert _C.philox4x32_10(row[:4], row[4:]) == philox(row[:4], row[4:])
    columns = torch.tensor(values).unbind(dim=1)
    words = torch.stack(reference.philox4x32_10(columns[:4], columns[4:]), dim=1)
    assert words.tolist() == [philox(row[:4], row[4:]) for row in values]


def digest(normals: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(normals, dtype="<f4").tobytes()).hexdigest()


def pinned_by(on, num):
    """The first samples of the pinned noise, elements in channels-last order."""
    names = ("seed", "stream", "first_sample")
    where = [PINNED[name] for name in names]
    noise = philox_normal(num, PINNED["sample_shape"], *where, on.device, on.name)
    return noise.permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize("kernels", ["auto", *KERNELS])
def test_a_million_normals_are_pinned_in_every_instruction_set(kernels, cpu_kernels):
    cpu_kernels(kernels)
    assert digest(pinned_by(BackendOnDevice("cpu", "cpu"), PINNED["num"])) == PINNED["sha256"]


def test_a_million_normals_without_torch_are_pinned():
    elements = int(np.prod(PINNED["sample_shape"]))
    where = (PINNED["seed"], PINNED["stream"], PINNED["first_sample"])
    assert PINNED["num"] * elements == 1_000_000
    assert digest(_C.philox_normal(PINNED["num"], elements, *where)) == PINNED["sha256"]


INTERPRETED = BackendOnDevice("triton", "cpu")


FAST_KERNELS_ON = pytest.mark.parametrize(
    "on",
    [
        pytest.param(b, id=str(b), marks=[pytest.mark.slow] if b == INTERPRETED else [])
        for b in kernel_backends()
    ],
)


@FAST_KERNELS_ON
def test_a_million_normals_are_pinned(on):
    assert digest(pinned_by(on, PINNED["num"])) == PINNED["sha256"]


@FAST_KERNELS_ON
def test_the_first_sample_of_the_million_is_pinned(on):
    assert digest(pinned_by(on, 1)) == PINNED["sha256_of_first_sample"]


@ON
def test_normals_are_box_and_muller_of_the_numbered_words(on):
    """Element (c, h, w) of a sample is number (h W + w) C + c, four to a block."""
    seed, stream, first, shape = (1 << 64) - 3, (1 << 32) - 1, (1 << 32) - 1, (3, 5, 7)
    noise = philox_normal(2, shape, seed, stream, first, on.device, on.name)
    for n in range(2):
        blocks = [exact_normals(b, stream, first + n, seed) for b in range(27)]
        expected = torch.tensor(blocks, dtype=F64).flatten()[:105].view(5, 7, 3)
        ours = noise[n].permute(1, 2, 0).cpu().double()
        torch.testing.assert_close(ours, expected, rtol=4e-7, atol=3e-7)


@ON
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_dtype_and_layout(on, shape):
    noise = philox_normal(shape[0], shape[1:], 7, device=on.device, backend=on.name)
    assert noise.shape == shape
    assert noise.dtype == F32
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory = channels_last.get(noise.ndim, torch.contiguous_format)
    assert noise.is_contiguous(memory_format=memory)


@ON
def test_samples_do_not_depend_on_their_batch(on):
    together = philox_normal(6, (3, 5, 7), 7, 1, 10, on.device, on.name)
    for first, num in ((10, 1), (11, 3), (15, 1)):
        apart = philox_normal(num, (3, 5, 7), 7, 1, first, on.device, on.name)
        assert same_bits(apart, together[first - 10 : first - 10 + num])


@ON
def test_an_images_noise_begins_a_larger_images_noise_of_more_lines(on):
    """The number of an element depends on its place and on the width and channels alone."""
    small, large = (
        philox_normal(1, (3, lines, 7), 7, device=on.device, backend=on.name) for lines in (5, 9)
    )
    assert same_bits(small, large[:, :, :5])


@ON
def test_halves_are_the_float32_normals_rounded(on):
    noise = philox_normal(2, (3, 5, 7), 7, device=on.device, backend=on.name)
    rounded = torch.empty_like(noise, dtype=F16)
    on.ops.philox_normal_(rounded, philox_rng(7, 0, 0, on.device))
    assert same_bits(rounded, noise.half())


def test_numpy_noise_is_that_of_torch():
    ours = _C.philox_normal(num=2, elements=15, seed=9, stream=4, first_sample=3)
    theirs = philox_normal(2, (15,), 9, 4, 3, backend="cpu")
    assert np.array_equal(ours, theirs.numpy())
    assert _C.philox_normal(0, 5, 1, 1).shape == (0, 5)
    assert _C.philox_normal(5, 0, 1, 1).shape == (5, 0)


@pytest.mark.parametrize("built", [True, False], ids=["built", "not-built"])
def test_random_words_are_the_first_philox_words_of_their_counters(monkeypatch, built):
    seed, stream, first = (1 << 64) - 3, (1 << 32) - 1, (1 << 32) - 2
    if not built:
        monkeypatch.setitem(sys.modules, "ddpm_fast._C", None)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    expected = [
        philox([0, stream, k & 0xFFFFFFFF, k >> 32], key)[0] for k in range(first, first + 4)
    ]
    words = random_words(seed, stream, first, 4)
    assert words.dtype == torch.int64
    assert words.tolist() == expected
    assert random_words(seed, stream, first, 0).shape == (0,)


def test_numpy_words_are_those_of_the_normals():
    counter, key = [1, 4, 3, 0], [9, 0]
    words = _C.philox_words(num=2, words=7, seed=9, stream=4, first_sample=3)
    assert words.dtype == np.uint32
    assert words.shape == (2, 7)
    assert words[0, 4:].tolist() == philox(counter, key)[:3]
    assert words[1, :4].tolist() == philox([0, 4, 4, 0], key)
    with pytest.raises(ValueError, match=r"words must be in \[0, 17179869184\]; got -1"):
        _C.philox_words(1, -1, 9, 4)


SIGMAS = 4  # a correct generator fails one such check in 16,000


@pytest.fixture(
    scope="module",
    params=[1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)],
    ids=["1e6", "1e7"],
)
def draws(request):
    """Draws of 100 samples."""
    return _C.philox_normal(100, request.param // 100, 2024, 1).astype(np.float64)


def test_moments(draws):
    z = draws.ravel()
    error = np.sqrt(1 / z.size)
    assert abs(z.mean()) < SIGMAS * error
    assert abs(z.var() - 1) < SIGMAS * np.sqrt(2) * error
    assert abs((z**3).mean()) < SIGMAS * np.sqrt(15) * error
    assert abs((z**4).mean() - 3) < SIGMAS * np.sqrt(96) * error
    assert abs(stats.skew(z)) < SIGMAS * np.sqrt(6) * error
    assert abs(stats.kurtosis(z)) < SIGMAS * np.sqrt(24) * error


def test_kolmogorov_and_smirnov(draws):
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3


def test_tails(draws):
    """A KS test does not see them: counts beyond 3, 4 and 5 are Poisson."""
    for bound in (3, 4, 5):
        expected = draws.size * 2 * stats.norm.sf(bound)
        count = int((np.abs(draws) > bound).sum())
        assert abs(count - expected) < SIGMAS * np.sqrt(expected)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors of the correlation of independent normals."""
    return float((a * b).mean() * np.sqrt(a.size))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 1024])
def test_neighbours_in_a_sample_are_independent(draws, lag):
    assert abs(correlation(draws[:, lag:], draws[:, :-lag])) < SIGMAS
    assert abs(correlation(draws[:, lag:] ** 2 - 1, draws[:, :-lag] ** 2 - 1) / 2) < SIGMAS


@pytest.mark.parametrize(
    "counters",
    [
        pytest.param([(5, 1, first) for first in range(4)], id="samples"),
        pytest.param([(5, stream, 0) for stream in range(4)], id="streams"),
        pytest.param([(seed, 1, 0) for seed in range(4)], id="seeds"),
        pytest.param([(5 + (bit << 32), 1, 0) for bit in (0, 1, 2, 4)], id="high-words-of-seeds"),
        pytest.param([(5, 1, bit << 32) for bit in (0, 1, 2, 4)], id="high-words-of-samples"),
        pytest.param([(1, 2, 3), (3, 2, 1), (2, 1, 3)], id="exchanged"),
    ],
)
def test_neighbouring_counters_are_independent(counters):
    noise = [_C.philox_normal(1, 1_000_000, *counter).astype(np.float64) for counter in counters]
    for a, b in pairwise(noise):
        assert abs(correlation(a, b)) < SIGMAS
        assert abs(correlation(a[:, 1:], b[:, :-1])) < SIGMAS
        assert abs(correlation(a**2 - 1, b**2 - 1) / 2) < SIGMAS


def noise(num=2, sample_shape=(3,), seed=1, stream=0, first_sample=0, device=None, backend="auto"):
    return philox_normal(num, sample_shape, seed, stream, first_sample, device, backend)


@pytest.mark.parametrize(
    "bad",
    [
        ("num", -1, ValueError, "[0, ", "-1"),
        ("num", 2.0, TypeError, "int", "float"),
        ("num", True, TypeError, "int", "bool"),
        ("sample_shape", 3, TypeError, "sequence of ints", "3"),
        ("sample_shape", (3, 0.5), TypeError, "sequence of ints", "0.5"),
        ("sample_shape", (3, -1), ValueError, "negative", "-1"),
        ("sample_shape", (1 << 20, 1 << 20), ValueError, "2^34", "1048576"),
        ("seed", 1 << 64, ValueError, "[0, 18446744073709551615]", "18446744073709551616"),
        ("seed", "1", TypeError, "int", "str"),
        ("stream", -1, ValueError, "[0, 4294967295]", "-1"),
        ("first_sample", 1 << 63, ValueError, "[0, 9223372036854775807]", "9223372036854775808"),
        ("device", "nowhere", ValueError, "nowhere"),
        ("backend", "cupy", ValueError, "auto, reference, cpu, triton, cuda", "'cupy'"),
        ("backend", "cuda", RuntimeError, "cannot run", "CUDA tensors"),
    ],
    ids=lambda c: f"{c[0]}-{c[-1]}",
)
def test_bad_arguments_are_named_with_what_is_accepted(bad):
    assert_named(noise, bad)


def test_rng_holds_seeds_of_64_bits():
    assert philox_rng((1 << 64) - 1, 5, 6).tolist() == [-1, 5, 6]
    assert philox_rng(1 << 63).tolist() == [-(1 << 63), STREAM_STEPS, 0]
    assert philox_rng(np.uint64(3), np.int32(2)).tolist() == [3, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"num": -1}, ValueError, id="num"),
        pytest.param({"elements": -1}, ValueError, id="elements"),
        pytest.param({"seed": -1}, ValueError, id="seed"),
        pytest.param({"stream": 1 << 32}, ValueError, id="stream"),
        pytest.param({"first_sample": 1.5}, TypeError, id="first-sample"),
    ],
)
def test_bad_arguments_without_torch(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        _C.philox_normal(**{"num": 1, "elements": 4, "seed": 1, "stream": 1, **arguments})
