"""Build of the three binaries: ddpm_fast._ops_cpu, ddpm_fast._ops_cuda and ddpm_fast._C.

Environment:
    DDPM_FAST_CUDA        auto (default): build the CUDA kernels where an nvcc of torch's CUDA major
                          is found, with or without a GPU; 1: fail without one; 0: never.
    DDPM_FAST_CUDA_ARCHS  architectures, default "80;86;89;90a+PTX".
    CUDA_HOME             the toolkit; else /usr/local/cuda, else where nvcc lies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;86;89;90a+PTX"
# The LibTorch stable ABI of torch 2.10: one build serves that torch and every later one.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden"]
# No contraction: an fma is one where it is written, and nowhere else.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def find_cuda_home() -> Path | None:
    """The CUDA toolkit, by CUDA_HOME, the usual place, or the nvcc on the PATH."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        if candidate and Path(candidate, "bin", "nvcc").is_file():
            return Path(candidate)
    return None


def cuda_or_reason() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA kernels with, or None and why not."""
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
    """What DDPM_FAST_CUDA and the toolkit come to; the decision is printed."""
    wish = os.environ.get("DDPM_FAST_CUDA", "auto").lower()
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"DDPM_FAST_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        print("ddpm_fast: DDPM_FAST_CUDA=0, building the CPU kernels only")
        return None
    home, reason = cuda_or_reason()
    if home is None and wish == "1":
        raise SystemExit(f"DDPM_FAST_CUDA=1, but {reason}")
    print(f"ddpm_fast: CUDA kernels with {home}" if home else f"ddpm_fast: CPU only: {reason}")
    return home


def architectures() -> list[str]:
    """The names in DDPM_FAST_CUDA_ARCHS, such as 80, 90a, 89+PTX."""
    names = [a for a in re.split(r"[;, ]+", os.environ.get("DDPM_FAST_CUDA_ARCHS", "")) if a]
    names = names or DEFAULT_ARCHS.split(";")
    for name in names:
        if not re.fullmatch(r"\d+a?(\+PTX)?", name):
            raise SystemExit(f"DDPM_FAST_CUDA_ARCHS: {name!r} is not like 80, 90a or 89+PTX")
    return names


def gencode(names: list[str]) -> list[str]:
    """The -gencode flags of nvcc. PTX is emitted without the 'a', which newer GPUs cannot run."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            plain = number.rstrip("a")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def sources(folder: str, pattern: str) -> list[str]:
    """The files of csrc/<folder>, relative, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).rglob(pattern))


def build_extensions(cuda_home: Path | None) -> list[Extension]:
    """The three binaries, or two where there is no CUDA."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    try:
        import pybind11

        pybind = [pybind11.get_include()]
    except ImportError:  # torch carries a copy
        pybind = include_paths()
    include = [str(ROOT / "csrc")]
    headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".inl", ".cuh"}]
    kernels = sources("cpu", "*.cpp")
    common = {"include_dirs": include, "depends": list(map(str, headers)), "py_limited_api": True}
    extensions = [
        CppExtension(
            "ddpm_fast._ops_cpu",
            ["csrc/bindings/ops_cpu.cpp", *kernels],
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
        # A runtime of its own: the library then loads beside any torch of its CUDA major.
        cuda.libraries = [lib for lib in cuda.libraries if lib != "cudart"]
        cuda.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extensions.append(cuda)
    facts = {
        "DDPM_BUILT_WITH_TORCH": torch.__version__,
        "DDPM_BUILT_WITH_CUDA": torch.version.cuda if cuda_home else "",
        "DDPM_CUDA_ARCHITECTURES": " ".join(archs),
    }
    extensions.append(
        Extension(
            "ddpm_fast._C",
            ["csrc/bindings/module.cpp", *kernels],
            include_dirs=[*include, *pybind],
            depends=list(map(str, headers)),
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=[*CXX_FLAGS, *ARITHMETIC],
            language="c++",
        )
    )
    return extensions


def main() -> None:
    """Run setuptools with CUDA_HOME set before torch's build helpers read it."""
    cuda_home = decide_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = str(cuda_home)
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=build_extensions(cuda_home),
        cmdclass={"build_ext": BuildExtension},
    )


main()
