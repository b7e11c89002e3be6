"""Build the three extension modules: `ddpm_fast._ops_cpu`, `_ops_cuda` and `_C`.

`python setup.py --check` only checks for a C++ compiler and the Python headers.

Environment variables:
    DDPM_FAST_CUDA: `auto` (default) builds the CUDA kernels if there is an nvcc of torch's CUDA
        major version, with or without a GPU; `1` fails without one; `0` never builds them.
    DDPM_FAST_CUDA_ARCHS: Architectures; default "80;86;89;90a+PTX".
    CUDA_HOME: The CUDA toolkit; default /usr/local/cuda, then the folder of the nvcc on the PATH.
    CXX: The C++ compiler; default c++.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent
# Commands that compile; others, such as sdist, need no compiler.
COMPILING = {"--check", "bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
DEFAULT_ARCHS = "80;86;89;90a+PTX"
# The LibTorch stable ABI of torch 2.10: one build works with that torch and every later one.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden"]
# No contraction: a fused multiply-add only where the source has one.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def missing_tools() -> list[str]:
    """List what compiling needs and this machine lacks, each with the way to get it."""
    missing = []
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler ({compiler} is not on the PATH; Debian: apt install g++)")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        missing.append(f"the Python headers (no Python.h in {headers}; Debian: python3-dev)")
    return missing


def missing_packages() -> list[str]:
    """List the Python packages of the build that are missing or too old."""
    missing = []
    for package, needed in (("setuptools", (77,)), ("torch", (2, 10))):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if tuple(map(int, re.findall(r"\d+", found)[: len(needed)])) < needed:
            wanted = f"{package} {'.'.join(map(str, needed))}"
            missing.append(f"{wanted} (found {found}; pip install --upgrade {package})")
    return missing


def require(missing: list[str]) -> None:
    """Exit with one line if anything is missing.

    Args:
        missing: What is missing, as the functions above list it.

    Raises:
        SystemExit: `missing` is not empty.
    """
    if missing:
        raise SystemExit(f"ddpm_fast cannot be built without {' and without '.join(missing)}")


def find_cuda_home() -> Path | None:
    """Find the CUDA toolkit by CUDA_HOME, /usr/local/cuda or the nvcc on the PATH."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        if candidate and Path(candidate, "bin", "nvcc").is_file():
            return Path(candidate)
    return None


def cuda_or_reason() -> tuple[Path | None, str]:
    """Return the toolkit for the CUDA kernels and "", or None and the reason."""
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    home = find_cuda_home()
    if home is None:
        return None, "no nvcc in CUDA_HOME, /usr/local/cuda or PATH"
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    wanted = torch.version.cuda.split(".")[0]
    if release is None or release.group(1) != wanted:
        found = release.group(0) if release else "an unknown release"
        return None, f"{home}/bin/nvcc is {found}, torch {torch.__version__} needs CUDA {wanted}"
    return home, ""


def decide_cuda() -> Path | None:
    """Decide by DDPM_FAST_CUDA and the toolkit, and print the decision.

    Returns:
        The toolkit, or None for a build without CUDA.

    Raises:
        SystemExit: DDPM_FAST_CUDA is not auto, 0 or 1, or is 1 without a toolkit.
    """
    wish = os.environ.get("DDPM_FAST_CUDA", "auto").lower()
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"DDPM_FAST_CUDA must be auto, 0 or 1; got {wish!r}")
    if wish == "0":
        print("ddpm_fast: DDPM_FAST_CUDA=0, building the CPU kernels only")
        return None
    home, reason = cuda_or_reason()
    if home is None and wish == "1":
        raise SystemExit(f"DDPM_FAST_CUDA=1, but {reason}")
    print(f"ddpm_fast: CUDA kernels with {home}" if home else f"ddpm_fast: CPU only: {reason}")
    return home


def architectures() -> list[str]:
    """Return the names in DDPM_FAST_CUDA_ARCHS, such as 80, 90a, 89+PTX.

    Raises:
        SystemExit: A name is of another form.
    """
    names = [a for a in re.split(r"[;, ]+", os.environ.get("DDPM_FAST_CUDA_ARCHS", "")) if a]
    names = names or DEFAULT_ARCHS.split(";")
    for name in names:
        if not re.fullmatch(r"\d+a?(\+PTX)?", name):
            raise SystemExit(
                f"DDPM_FAST_CUDA_ARCHS must be names such as 80, 90a or 89+PTX; got {name!r}"
            )
    return names


def gencode(names: list[str]) -> list[str]:
    """Return the -gencode flags of nvcc. PTX goes without the 'a', which newer GPUs cannot run."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            plain = number.rstrip("a")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def sources(folder: str, pattern: str) -> list[str]:
    """List the files of csrc/<folder> and below, relative to the checkout, sorted."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).rglob(pattern))


def build_extensions(cuda_home: Path | None) -> list[Extension]:
    """Describe the three extension modules, or two without CUDA."""
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    include = [str(ROOT / "csrc")]
    headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".inl", ".cuh"}]
    common = {"include_dirs": include, "depends": list(map(str, headers)), "py_limited_api": True}
    extensions = [
        CppExtension(
            "ddpm_fast._ops_cpu",
            ["csrc/bindings/ops_cpu.cpp", *sources("cpu", "*.cpp")],
            extra_compile_args={"cxx": [*CXX_FLAGS, *ARITHMETIC, STABLE_ABI]},
            **common,
        )
    ]
    archs = architectures() if cuda_home else []
    if cuda_home:
        nvcc = ["-O3", "-std=c++17", "-fmad=false", "-lineinfo", *gencode(archs)]
        nvcc.append(f"-DDDPM_CUDA_ARCHS={' '.join(archs)}")
        cuda = CUDAExtension(
            "ddpm_fast._ops_cuda",
            ["csrc/bindings/ops_cuda.cpp", *sources("cuda", "*.cu")],
            extra_compile_args={"cxx": [*CXX_FLAGS, *ARITHMETIC, STABLE_ABI], "nvcc": nvcc},
            **common,
        )
        # Linked statically: the library then loads with any torch of the same CUDA major version.
        cuda.libraries = [lib for lib in cuda.libraries if lib != "cudart"]
        cuda.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extensions.append(cuda)
    build_info = {
        "DDPM_BUILT_WITH_TORCH": torch.__version__,
        "DDPM_BUILT_WITH_CUDA": torch.version.cuda if cuda_home else "",
        "DDPM_CUDA_ARCHITECTURES": " ".join(archs),
    }
    extensions.append(
        Extension(
            "ddpm_fast._C",
            ["csrc/bindings/module.cpp"],
            define_macros=[(name, f'"{value}"') for name, value in build_info.items()],
            extra_compile_args=[*CXX_FLAGS, *ARITHMETIC],
            language="c++",
            **common,
        )
    )
    return extensions


def main() -> None:
    """Check what the build needs, then run setuptools."""
    if COMPILING & set(sys.argv):
        require(missing_tools())
    if sys.argv[1:] == ["--check"]:
        return
    require(missing_packages())
    from setuptools import setup

    cuda_home = decide_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = str(cuda_home)  # read when torch's build helpers are imported
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=build_extensions(cuda_home),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )


main()
