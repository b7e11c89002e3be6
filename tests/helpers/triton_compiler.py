"""Compilation of Triton kernels for sm_90 without a GPU, and what ptxas reports.

A script that calls `report` prints it as JSON, and `compiled` runs such a script: Triton cannot
both interpret and compile in one process. Tensors on meta give the launchers their types.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import triton


class _NoGpu:
    """Stands for the driver of an H100 that is not there; kernels are compiled, never launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(launches: Iterable[tuple[str, Callable[[], Any]]]) -> None:
    """Print what ptxas says of the kernels that (name, launcher) ask for, in their order."""
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_NoGpu())
    run, requested = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        requested.append((name, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    for name, launch in launches:  # noqa: B007
        launch()
    print(json.dumps([_usage(*pair) for pair in requested]))


def _usage(name: str, kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
    resources = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    ptx = kernel.asm["ptx"]
    order = re.findall(r"griddepcontrol\.(wait)|\b(?:ld\.global|cp\.async\.c[ag])\b", ptx)
    return {
        "name": name,
        "kernel": kernel.name,
        **{key: int(value) for key, value in resources.items()},
        "dynamic": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "vectors": Counter(re.findall(r"\b((?:ld|st)\.global\.v\d\.b\d+)", ptx)),
        "copies": Counter(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", ptx)),
        "floats": Counter(re.findall(r"\b(?:fma|mul|add|sub|sqrt|div)[.a-z]*\.f32\b", ptx)),
        "divisions": Counter(re.findall(r"\b((?:div|rem)\.[su]\d+)", ptx)),
        "products": Counter(
            " ".join(found)
            for found in re.findall(r"\b(wgmma|mma)\.(?:mma_async\.)?sync[.a-z]*\.(m\w+)", ptx)
        ),
        "overlap": Counter(re.findall(r"griddepcontrol.(\w+)", ptx)),
        "waits_first": order[:1] == ["wait"],
        "fuses": kernel.metadata.enable_fp_fusion,
    }


def assert_lean(kernel: dict[str, Any]) -> None:
    """No spills, no fusion, no subnormals flushed."""
    assert (kernel["STACK"], kernel["LOCAL"], kernel["fuses"]) == (0, 0, False), kernel
    assert not any("ftz" in operation for operation in kernel["floats"]), kernel


def compiled(script: str, cache: Path, *options: str) -> list[dict[str, Any]]:
    """Run a script without Triton's interpreter; return its report."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, script, *options]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(text.stdout)
