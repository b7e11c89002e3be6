"""The code that reverse_step_ with the further terms compiles to for sm_90, without a GPU.

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
from torch import Tensor

from ddpm_fast.ops.row import ROW_WIDTH, RowFlag, history_depth
from step_cases import FLAGS

pytest.importorskip("triton")

import triton_compiler
from ddpm_fast.ops.triton import diffusion as kernels
from triton_cases import PATHS
from triton_compiler import assert_lean

F32 = torch.float32
QUICK = {
    "linear-float32 guided given",
    "linear-float32 thresholded given",
    "linear-float32 outputs-past given",
    "linear-float16 learned made",
    "linear-float16 every given",
    "short-float16 every given",
}


def launches(path: Any) -> list[tuple[str, Callable[[], Any]]]:
    """A call for each set of terms, noise given and made; tensors on meta give them their types.

    With a learned variance the network returns it in the second half of its channels.
    """
    label, shape, layout, dtype = path

    def empty(*sizes: int, dtype: torch.dtype = F32) -> Tensor:
        return layout(torch.empty(sizes, dtype=dtype, device="meta"))

    x, out = empty(*shape), empty(*shape, dtype=dtype)
    first, second = empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype).chunk(2, dim=1)
    rows, bounds = (torch.empty(*s, device="meta") for s in ((1000, ROW_WIDTH), x.shape[:1]))
    step, rng = (torch.empty(n, dtype=torch.int64, device="meta") for n in (shape[0], 3))
    calls: dict[str, Callable[[], Any]] = {}
    for name in FLAGS if label.startswith("linear") else ("guided-and-learned", "every"):
        flags = FLAGS[name]
        depth = history_depth(flags)
        slots = empty(depth * shape[0], *shape[1:]).unflatten(0, (-1, shape[0])) if depth else None
        output, v = (first, second) if flags & RowFlag.LEARNED else (out, None)
        for source, noise in (("given", (x, None)), ("made", (None, rng))):
            calls[f"{name} {source}"] = partial(
                kernels.reverse_step_,
                *(x, output, rows, step, *noise, out, x, int(flags)),
                *(output, v, bounds, x, slots),
            )
    return [(f"{label} {name}", call) for name, call in calls.items()]


def asked(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, launch in itertools.chain(*map(launches, PATHS)):
        if every or name in QUICK:
            yield name, launch


def compiled(cache: Path, *options: str) -> dict[str, dict[str, Any]]:
    found = triton_compiler.compiled(__file__, cache, *options)
    return {kernel["name"]: kernel for kernel in found}


def test_code_for_sm_90_moves_whole_vectors_and_fuses_nothing(tmp_path):
    found = compiled(tmp_path)
    assert found.keys() == QUICK
    for kernel in found.values():
        assert_lean(kernel)
        # Threads exchange nothing, but for the coefficients of several samples in a tile.
        assert kernel["SHARED"] == (1024 if "short" in kernel["name"] else 0), kernel
        # 1024 threads on a multiprocessor; with every term, ten tensors of them, 512.
        assert kernel["REG"] <= (128 if "every" in kernel["name"] else 80), kernel
        assert not kernel["divisions"].keys() - {"div.s32"}, kernel

    load, store = "ld.global.v4.b32", "st.global.v4.b32"

    # A thread has 8 elements: 16 bytes at a time of all that is a straight line.
    assert found["linear-float32 guided given"]["vectors"] == {load: 8, store: 6}
    past = found["linear-float32 outputs-past given"]
    assert past["vectors"] == {load: 12, store: 8}
    every = found["linear-float16 every given"]["vectors"]
    assert every == {load: 12, store: 8, "st.global.v2.b32": 2}
    # The halves of the network's channels share a walk: a division an element, one for the tile.
    for name in ("learned made", "every given"):
        assert found[f"linear-float16 {name}"]["divisions"] == {"div.s32": 9}
    # As written: x0, x' of six terms, h0 of three.
    assert past["floats"] == {"fma.rn.f32": 72, "mul.rn.f32": 24}
    assert found["linear-float32 guided given"]["floats"] == {"fma.rn.f32": 32, "mul.rn.f32": 32}
    assert found["linear-float32 thresholded given"]["floats"]["div.rn.f32"] == 8


@pytest.mark.slow
def test_code_for_sm_90_of_every_path_does_not_spill(tmp_path):
    found = compiled(tmp_path, "--every")
    assert len(found) == 102
    for kernel in found.values():
        assert_lean(kernel)


if __name__ == "__main__":
    triton_compiler.report(asked("--every" in sys.argv))
