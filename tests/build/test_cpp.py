"""The C++ tests of csrc: quick ones with g++, all of them with CMake, sanitized and optimised."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("baseline", "avx2", "avx512")


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on the PATH")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["philox", "normal", "exponential", "half", "tensor_view", "checksum"])
def test_arithmetic(tmp_path: Path, name: str) -> None:
    """Run the tests of csrc/core that compile in about a second."""
    need("g++")
    source, program = ROOT / "tests" / "cpp" / f"test_{name}.cpp", tmp_path / name
    flags = ("-O1", "-std=c++17", "-ffp-contract=off", f"-I{ROOT / 'csrc'}")
    run("g++", *flags, source, "-o", program)
    run(program)


def test_cmake_lists_every_source_and_test() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.c*")}
    without_torch = {
        s for s in sources if Path(s).suffix in {".cpp", ".cu"} and "bindings" not in s
    }
    assert set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", text)) == without_torch
    names = re.search(r"foreach\(test ([^)]*)\)", text)
    assert names is not None
    files = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "cpp").glob("test_*.cpp")}
    assert set(names[1].split()) == files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "target", "expected"),
    [
        pytest.param(["-DDDPM_SANITIZE=ON"], "all", 9, id="sanitized"),
        pytest.param([], "test_cpu_kernels", 1, id="optimised"),
    ],
)
def test_ctest_passes(tmp_path: Path, options: list[str], target: str, expected: int) -> None:
    need("cmake", "ctest", "g++")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DCMAKE_CXX_COMPILER=g++", *options)
    run("cmake", "--build", tmp_path, "--target", target, "--parallel", "2")
    chosen = [] if target == "all" else ["--tests-regex", f"^{target.removeprefix('test_')}$"]
    report = run("ctest", "--test-dir", tmp_path, "--output-on-failure", *chosen)
    assert f"100% tests passed, 0 tests failed out of {expected}" in report


def test_instruction_sets_share_no_symbol(tmp_path: Path) -> None:
    """A shared symbol could bring AVX-512 code to a processor without it."""
    need("g++", "nm")
    for name in KERNELS:
        source = ROOT / "csrc" / "cpu" / f"kernels_{name}.cpp"
        compiled = tmp_path / f"{name}.o"
        run("g++", "-O0", "-std=c++17", f"-I{ROOT / 'csrc'}", "-c", source, "-o", compiled)
        symbols = run("nm", "--demangle", "--defined-only", "--extern-only", compiled).splitlines()
        shared = [line for line in symbols if f"{name}::" not in line]
        assert [line.split()[-1] for line in shared] in ([], [f"ddpm::cpu_kernels_{name}"])
