"""The compiled code of the CUDA kernels. Needs nvcc, but no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # nvcc takes minutes

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
FLAGS = ["-O3", "-std=c++17", "-fmad=false", f"-I{ROOT / 'csrc'}"]
# q_sample 4, q_posterior 2, reverse_step_ 6 and 6 with multistep terms, reverse_step 4 and 4,
# philox_normal 2; group_norm_ nine for each of three dtypes, and one whose attributes tell the
# architecture; checksum.
KERNEL_COUNT = 28 + 27 + 1 + 1


def find(tool: str, extra: list[Path]) -> str | None:
    """Find a tool in CUDA_HOME, /usr/local/cuda, `extra` or the PATH."""
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda", "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes] + extra
    found = [folder / tool for folder in folders if (folder / tool).is_file()]
    return str(found[0]) if found else shutil.which(tool)


@pytest.fixture
def nvcc() -> str:
    found = find("nvcc", [])
    if found is None:
        pytest.skip("needs nvcc in CUDA_HOME, in /usr/local/cuda or on the PATH")
    return found


@pytest.fixture
def cuobjdump() -> str:
    triton = pytest.importorskip("triton", reason="needs cuobjdump, which Triton brings along")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = find("cuobjdump", [tools])
    if found is None:
        pytest.skip("needs cuobjdump in the CUDA toolkit or in Triton's package")
    return found


def compile_to(out: Path, nvcc: str, source: Path, *flags: str) -> str:
    """Compile for sm_90a and return the report of ptxas on registers and spills."""
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    command = [nvcc, *FLAGS, arch, "-Xptxas", "-v", *flags, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_kernels_fit_in_registers(nvcc: str, tmp_path: Path) -> None:
    def compiled(source: Path) -> str:
        warn = ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
        return compile_to(tmp_path / f"{source.stem}.o", nvcc, source, "-c", *warn)

    with ThreadPoolExecutor(2) as pool:
        reports = "".join(pool.map(compiled, SOURCES))
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", reports
    )
    assert len(frames) == KERNEL_COUNT
    assert set(frames) == {("0", "0", "0")}, reports


def test_arithmetic_is_as_written(nvcc: str, cuobjdump: str, tmp_path: Path) -> None:
    """q_sample with noise as input: one multiply and one fma per element, 16-byte accesses."""
    cubin = tmp_path / "forward.cubin"
    compile_to(cubin, nvcc, ROOT / "csrc" / "cuda" / "diffusion" / "forward.cu", "-cubin")
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = done.stdout.split("Function : ")[1:]
    assert len(functions) == 8
    (code,) = [
        f for f in functions if re.match(r"\S*QSampleILNS_5NoiseE1ENS_16VectorizedTensor", f)
    ]
    elements = 8  # per thread
    assert len(re.findall(r"\bFMUL\b", code)) == elements
    assert len(re.findall(r"\bFFMA\b", code)) == elements
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) == 2 * elements // 4
    assert len(re.findall(r"\bSTG\.E\.128\b", code)) == elements // 4
    assert not re.search(r"\b(FADD|DFMA|DMUL|DADD|LDL|STL)\b", code)


def test_group_norm_reads_once_and_writes_once(nvcc: str, cuobjdump: str, tmp_path: Path) -> None:
    """One 16-byte load per vector held in registers, and one store, with or without SiLU."""
    cubin = tmp_path / "half.cubin"
    compile_to(cubin, nvcc, ROOT / "csrc" / "cuda" / "group_norm" / "half.cu", "-cubin")
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = done.stdout.split("Function : ")[1:]
    assert len(functions) == 9
    for held in (1, 2, 4, 8):
        kernel = rf"\S*VectorizedKernelINS_6half_tELb0ELi{held}ELb0E"
        (code,) = [f for f in functions if re.match(kernel, f)]
        assert len(re.findall(r"\bLDG\.E\.128\b", code)) == held
        assert len(re.findall(r"\bSTG\.E\.128\b", code)) == 2 * held
        # The wait for the previous kernel is before the first load.
        assert 0 < code.index("ACQBULK") < code.index("LDG.E")
        assert not re.search(r"\b(LDL|STL)\b", code)
