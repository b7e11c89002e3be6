"""The code that the Triton kernels compile to for sm_90, without a GPU: vectors, spills, fusion.

Run as a script it prints what it found as JSON (triton_compiler).
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

from ddpm_fast.ops.row import FUNCTIONAL_FLAGS, ROW_WIDTH, RowFlag

pytest.importorskip("triton")

import triton_compiler
from ddpm_fast.ops.triton import diffusion as kernels
from triton_cases import PATHS
from triton_compiler import assert_lean

F32 = torch.float32


QUICK = {
    "linear-float32 q_sample",
    "linear-float16 q_sample",
    "linear-float32 reverse_step_ given 1",
    "linear-float16 reverse_step_ made 1",
    "linear-float32 reverse_step given",
    "linear-float16 reverse_step given",
}


def launches(path: Any) -> list[tuple[str, Callable[[], Any]]]:
    """A call of each launcher for each of its kernels; tensors on meta give them their types."""
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
        calls[f"reverse_step_ given {flags}"] = partial(step, z, None, x, z, flags)
        calls[f"reverse_step_ made {flags}"] = partial(step, None, rng, x, z, flags)
    functional, flags = partial(kernels.reverse_step, x, x, rows, t), int(FUNCTIONAL_FLAGS)
    bounds = torch.empty(shape[0], device="meta")
    calls["reverse_step none"] = partial(functional, None, flags, x, bounds)
    calls["reverse_step given"] = partial(functional, z, int(RowFlag.CLIP))
    calls["reverse_step more"] = partial(functional, z, flags, x, bounds)
    return [(f"{label} {name}", call) for name, call in calls.items()]


def asked(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, launch in itertools.chain(*map(launches, PATHS if every else PATHS[:2])):
        if every or name in QUICK:
            yield name, launch


def compiled(cache: Path, *options: str) -> dict[str, dict[str, Any]]:
    found = triton_compiler.compiled(__file__, cache, *options)
    return {kernel["name"]: kernel for kernel in found}


def test_code_for_sm_90_moves_whole_vectors_and_fuses_nothing(tmp_path):
    found = compiled(tmp_path)
    for kernel in found.values():
        assert_lean(kernel)
        assert kernel["REG"] <= 64, kernel  # 1024 threads on a multiprocessor
        assert kernel["SHARED"] == 0, kernel  # threads exchange nothing
    load, store = "ld.global.v4.b32", "st.global.v4.b32"
    # A thread has 8 elements: 16 bytes at a time of the widest dtype of a kernel.
    assert found["linear-float32 q_sample"]["vectors"] == {load: 4, store: 2}
    assert found["linear-float16 q_sample"]["vectors"] == {load: 2, store: 1}
    assert found["linear-float32 reverse_step_ given 1"]["vectors"] == {load: 6, store: 6}
    mixed = found["linear-float16 reverse_step_ made 1"]["vectors"]
    assert (mixed[load], mixed[store], mixed["ld.global.v2.b32"]) == (2, 4, 2)
    # Not in place: x, the output and noise are read; x' and x0 are written. float32 noise beside
    # float16 makes the widest.
    assert found["linear-float32 reverse_step given"]["vectors"] == {load: 6, store: 4}
    mixed = found["linear-float16 reverse_step given"]["vectors"]
    assert mixed == {load: 2, "ld.global.v2.b32": 4, "st.global.v2.b32": 4}
    # Eq. 4 is one fma and one product, as written; so are predict_x0, and x' with its noise.
    assert found["linear-float32 q_sample"]["floats"] == {"fma.rn.f32": 8, "mul.rn.f32": 8}
    step = found["linear-float32 reverse_step_ given 1"]["floats"]
    assert (step["fma.rn.f32"], step["mul.rn.f32"]) == (24, 16)


@pytest.mark.slow
def test_code_for_sm_90_of_every_path_does_not_spill(tmp_path):
    found = compiled(tmp_path, "--every")
    assert len(found) == 183
    for kernel in found.values():
        assert_lean(kernel)


if __name__ == "__main__":
    triton_compiler.report(asked("--every" in sys.argv))
