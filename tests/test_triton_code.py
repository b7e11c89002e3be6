"""The code that the Triton kernels compile to for sm_90, without a GPU: vectors, spills, fusion.

Run as a script it prints what it found as JSON: Triton cannot both interpret and compile in one
process.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.row import ROW_WIDTH

pytest.importorskip("triton")
import triton

from ddpm_fast.ops import triton_kernels as kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class _NoGpu:
    """Stands for the driver of an H100 that is not there; kernels are compiled, never launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(every: bool) -> list[dict[str, Any]]:
    """What ptxas says of the kernels that the launchers ask for."""
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_NoGpu())
    run, asked = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        asked.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    names = []
    for name, launch in itertools.chain(*map(launches, PATHS if every else PATHS[:2])):
        if every or name in QUICK:
            names.append(name)
            launch()
    return [usage(*pair) for pair in zip(names, asked, strict=True)]


def crop(x: Tensor) -> Tensor:
    return x[..., 1:, 1:]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


PATHS = [
    (f"{name}-{str(dtype).removeprefix('torch.')}", shape, layout, dtype)
    for name, shape, layout in [
        ("linear", (4, 3, 32, 32), channels_last),
        ("strided", (4, 3, 33, 31), crop),
        ("short", (100, 2), torch.Tensor.contiguous),
        ("wide", (2, 3, 30000, 30000), channels_last),
    ]
    for dtype in (F32, F16, BF16)
]
QUICK = {
    "linear-float32 q_sample",
    "linear-float16 q_sample",
    "linear-float32 reverse_step_ given 1",
    "linear-float16 reverse_step_ made 1",
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
    return [(f"{label} {name}", call) for name, call in calls.items()]


def usage(name: str, kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
    resources = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    ptx = kernel.asm["ptx"]
    return {
        "name": name,
        **{key: int(value) for key, value in resources.items()},
        "vectors": Counter(re.findall(r"\b((?:ld|st)\.global\.v\d\.b\d+)", ptx)),
        "floats": Counter(re.findall(r"\b(?:fma|mul|add|sub|sqrt)[.a-z]*\.f32\b", ptx)),
        "fuses": kernel.metadata.enable_fp_fusion,
    }


def compiled(cache: Path, *options: str) -> dict[str, dict[str, Any]]:
    """compile_all in a process of its own, where Triton does not interpret."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, __file__, *options]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {kernel["name"]: kernel for kernel in json.loads(text.stdout)}


def assert_lean(kernel: dict[str, Any]) -> None:
    assert (kernel["STACK"], kernel["LOCAL"], kernel["fuses"]) == (0, 0, False), kernel


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
    # Eq. 4 is one fma and one product, as written; so are predict_x0, and x' with its noise.
    assert found["linear-float32 q_sample"]["floats"] == {"fma.rn.f32": 8, "mul.rn.f32": 8}
    step = found["linear-float32 reverse_step_ given 1"]["floats"]
    assert (step["fma.rn.f32"], step["mul.rn.f32"]) == (24, 16)


@pytest.mark.slow
def test_code_for_sm_90_of_every_path_does_not_spill(tmp_path):
    found = compiled(tmp_path, "--every")
    assert len(found) == 147
    for kernel in found.values():
        assert_lean(kernel)


if __name__ == "__main__":
    print(json.dumps(compile_all("--every" in sys.argv)))
