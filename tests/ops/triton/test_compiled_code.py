"""Code of the updates' Triton kernels for sm_90, compiled without a GPU: vectors, spills, fusion.

Run as a script, this file prints what ptxas reports as JSON (triton_compiler).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.ops.row import FUNCTIONAL_FLAGS, ROW_WIDTH, RowFlag, history_depth
from reverse_step_cases import SOLVER_TERMS

pytest.importorskip("triton")

import triton_compiler
from ddpm_fast.ops.triton import diffusion as kernels
from triton_cases import PATHS
from triton_compiler import assert_lean

F32 = torch.float32


QUICK = {
    "linear-float32 q_sample",
    "linear-float16 q_sample",
    "linear-float32 reverse_step_ input 1",
    "linear-float16 reverse_step_ generated 1",
    "linear-float32 reverse_step input",
    "linear-float16 reverse_step input",
}

QUICK_TERMS = {
    "linear-float32 guided input",
    "linear-float32 thresholded input",
    "linear-float32 outputs-past input",
    "linear-float16 learned generated",
    "linear-float16 every input",
    "short-float16 every input",
}


def launches(path: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Return a call of each launcher for each of its kernels, with tensors on meta."""
    label, shape, layout, dtype = path
    x, z = (layout(torch.empty(shape, dtype=d, device="meta")) for d in (dtype, F32))
    t = torch.empty(1, dtype=torch.int64, device="meta").expand(shape[0])
    rng = torch.empty(3, dtype=torch.int64, device="meta")
    two, four, rows = (torch.empty(1000, w, device="meta") for w in (2, 4, ROW_WIDTH))
    step = partial(kernels.reverse_step_, z, x, rows, t)
    calls: dict[str, Callable[[], Any]] = {
        "q_sample": partial(kernels.q_sample, x, t, x, two),
        "q_sample_philox": partial(kernels.q_sample_philox, x, t, two, rng),
        "q_posterior": partial(kernels.q_posterior, x, x, t, four),
        "philox_normal_": partial(kernels.philox_normal_, x, rng),
    }
    for flags in (0, 1, 2, 3, 7) if label.startswith("linear") else (0, 7):
        calls[f"reverse_step_ none {flags}"] = partial(step, None, None, x, None, flags)
        calls[f"reverse_step_ input {flags}"] = partial(step, z, None, x, z, flags)
        calls[f"reverse_step_ generated {flags}"] = partial(step, None, rng, x, z, flags)
    functional, flags = partial(kernels.reverse_step, x, x, rows, t), int(FUNCTIONAL_FLAGS)
    bounds = torch.empty(shape[0], device="meta")
    calls["reverse_step none"] = partial(functional, None, flags, x, bounds)
    calls["reverse_step input"] = partial(functional, z, int(RowFlag.CLIP))
    calls["reverse_step more"] = partial(functional, z, flags, x, bounds)
    return [(f"{label} {name}", call) for name, call in calls.items()]


def term_launches(path: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Return a call for each set of terms, with input and generated noise.

    A learned variance is the second half of the channels of the output.
    """
    label, shape, layout, dtype = path

    def empty(*sizes: int, dtype: torch.dtype = F32) -> Tensor:
        return layout(torch.empty(sizes, dtype=dtype, device="meta"))

    x, out = empty(*shape), empty(*shape, dtype=dtype)
    first, second = empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype).chunk(2, dim=1)
    rows, bounds = (torch.empty(*s, device="meta") for s in ((1000, ROW_WIDTH), x.shape[:1]))
    step, rng = (torch.empty(n, dtype=torch.int64, device="meta") for n in (shape[0], 3))
    calls: dict[str, Callable[[], Any]] = {}
    for name in SOLVER_TERMS if label.startswith("linear") else ("guided-and-learned", "every"):
        flags = SOLVER_TERMS[name]
        depth = history_depth(flags)
        slots = empty(depth * shape[0], *shape[1:]).unflatten(0, (-1, shape[0])) if depth else None
        output, v = (first, second) if flags & RowFlag.LEARNED else (out, None)
        for source, noise in (("input", (x, None)), ("generated", (None, rng))):
            calls[f"{name} {source}"] = partial(
                kernels.reverse_step_,
                *(x, output, rows, step, *noise, out, x, int(flags)),
                *(output, v, bounds, x, slots),
            )
    return [(f"{label} {name}", call) for name, call in calls.items()]


def requested(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    calls = itertools.chain(*map(launches, PATHS), *map(term_launches, PATHS))
    return ((name, call) for name, call in calls if every or name in QUICK | QUICK_TERMS)


def compiled(cache: Path, *options: str) -> dict[str, dict[str, Any]]:
    found = triton_compiler.compiled(__file__, cache, *options)
    return {kernel["name"]: kernel for kernel in found}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    found = compiled(tmp_path_factory.mktemp("cache"))
    assert found.keys() == QUICK | QUICK_TERMS
    return found


def test_updates_move_whole_vectors_and_fuse_nothing(found):
    for kernel in (found[name] for name in QUICK):
        assert_lean(kernel)
        assert kernel["REG"] <= 64, kernel  # 1024 threads on a multiprocessor
        assert kernel["SHARED"] == 0, kernel  # threads exchange nothing
    load, store = "ld.global.v4.b32", "st.global.v4.b32"
    # A thread has 8 elements: 16 bytes at a time of the widest dtype of a kernel.
    assert found["linear-float32 q_sample"]["vectors"] == {load: 4, store: 2}
    assert found["linear-float16 q_sample"]["vectors"] == {load: 2, store: 1}
    assert found["linear-float32 reverse_step_ input 1"]["vectors"] == {load: 6, store: 6}
    mixed = found["linear-float16 reverse_step_ generated 1"]["vectors"]
    assert (mixed[load], mixed[store], mixed["ld.global.v2.b32"]) == (2, 4, 2)
    # Not in place: x, the output and noise are read; x' and x0 are written. float32 noise beside
    # float16 makes the widest.
    assert found["linear-float32 reverse_step input"]["vectors"] == {load: 6, store: 4}
    mixed = found["linear-float16 reverse_step input"]["vectors"]
    assert mixed == {load: 2, "ld.global.v2.b32": 4, "st.global.v2.b32": 4}
    # Eq. 4 is one fma and one product, as written; so are predict_x0, and x' with its noise.
    assert found["linear-float32 q_sample"]["floats"] == {"fma.rn.f32": 8, "mul.rn.f32": 8}
    step = found["linear-float32 reverse_step_ input 1"]["floats"]
    assert (step["fma.rn.f32"], step["mul.rn.f32"]) == (24, 16)


def test_steps_with_multistep_terms_move_whole_vectors_and_fuse_nothing(found):
    for kernel in (found[name] for name in QUICK_TERMS):
        assert_lean(kernel)
        # Threads exchange nothing, but for the coefficients of several samples in a tile.
        assert kernel["SHARED"] == (1024 if "short" in kernel["name"] else 0), kernel
        # 1024 threads on a multiprocessor; with every term, ten tensors of them, 512.
        assert kernel["REG"] <= (128 if "every" in kernel["name"] else 80), kernel
        assert not kernel["divisions"].keys() - {"div.s32"}, kernel

    load, store = "ld.global.v4.b32", "st.global.v4.b32"

    # A thread has 8 elements: 16 bytes at a time of all that is a straight line.
    assert found["linear-float32 guided input"]["vectors"] == {load: 8, store: 6}
    past = found["linear-float32 outputs-past input"]
    assert past["vectors"] == {load: 12, store: 8}
    every = found["linear-float16 every input"]["vectors"]
    assert every == {load: 12, store: 8, "st.global.v2.b32": 2}
    # The halves of the network's channels share a walk: a division an element, one for the tile.
    for name in ("learned generated", "every input"):
        assert found[f"linear-float16 {name}"]["divisions"] == {"div.s32": 9}
    # As written: x0, x' of six terms, h0 of three.
    assert past["floats"] == {"fma.rn.f32": 72, "mul.rn.f32": 24}
    assert found["linear-float32 guided input"]["floats"] == {"fma.rn.f32": 32, "mul.rn.f32": 32}
    assert found["linear-float32 thresholded input"]["floats"]["div.rn.f32"] == 8


@pytest.mark.slow
def test_no_path_spills(tmp_path):
    found = compiled(tmp_path, "--every")
    assert len(found) == 183 + 102
    # Triton 3.8 gives one kernel a stack frame; its LOCAL, the bytes that are spilled, is 0 too.
    frames = {name: kernel["STACK"] for name, kernel in found.items() if kernel["STACK"]}
    assert frames == {"wide-float32 every input": 16}
    for kernel in found.values():
        assert_lean(kernel | {"STACK": 0})


if __name__ == "__main__":
    triton_compiler.report(requested("--every" in sys.argv))
