"""Everything that needs a GPU, in one run: build, verify, tests, sanitizers, benchmarks.

    python benchmarks/gpu.py --out DIR

Runs offline with the Python and torch that call it, builds in place for this GPU alone, and stops
each stage at its limit, so that the whole ends within nine minutes. DIR gets gpu.log and the CSVs
of the benchmarks. The exit status is 0 where every stage passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 530
TESTS = ("updates", "reverse_step", "ops_registry", "noise", "sampler", "process", "triton", "cli")


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    limit_s: int
    skip: str = ""  # why it is left out


def sanitizer(tool: str, backend: str) -> Stage:
    """compute-sanitizer over every kernel, dtype and layout."""
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    command = [str(path), "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    command += ["ddpm_fast", "verify", "--backend", backend]
    return Stage(f"{tool} {backend}", command, 75, "" if path else "compute-sanitizer not found")


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    parallel = ["-n", "8"] if _has("xdist") else []
    files = [str(p) for n in TESTS if (p := ROOT / "tests" / f"test_{n}.py").is_file()]
    updates = [python, "benchmarks/updates.py", "--device", "cuda", "--rounds", "30"]
    sheet = [python, "-m", "ddpm_fast", "sample", "--device", "cuda", "--no-progress"]
    return [
        Stage("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 150),
        Stage("info", [python, "-m", "ddpm_fast", "info"], 30),
        Stage("verify", [python, "-m", "ddpm_fast", "verify"], 60),
        Stage("sample", [*sheet, "--out", str(out / "triangles.png")], 60),
        Stage(
            "updates cuda", [*updates, "--backend", "cuda", "--out", f"{out}/updates_cuda.csv"], 60
        ),
        Stage(
            "loop",
            [python, "benchmarks/loop.py", "--device", "cuda", "--out", f"{out}/loop.csv"],
            90,
        ),
        Stage(
            "updates triton",
            [*updates, "--backend", "triton", "--out", f"{out}/updates_triton.csv"],
            60,
        ),
        Stage("tests", [python, "-m", "pytest", "-q", "-x", *parallel, *files], 150),
        sanitizer("memcheck", "cuda"),
        sanitizer("racecheck", "cuda"),
        sanitizer("memcheck", "triton"),
    ]


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def run(stage: Stage, log: Path, left_s: float, env: dict[str, str]) -> tuple[str, float]:
    """The stage's verdict and its seconds; its output goes to the log."""
    if stage.skip:
        return f"skipped: {stage.skip}", 0.0
    if left_s < 15:
        return "skipped: no time left", 0.0
    begin = time.perf_counter()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        try:
            code = subprocess.run(
                stage.command,
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(stage.limit_s, left_s),
            ).returncode
            verdict = "ok" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired:
            verdict = "FAILED: stopped at its limit"
    return verdict, time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", required=True, type=Path)
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    env = os.environ | {
        "DDPM_FAST_CUDA": "1",
        "DDPM_FAST_CUDA_ARCHS": arch,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    start = time.perf_counter()
    failed = False
    for stage in stages(out):
        verdict, seconds = run(stage, log, BUDGET_S - (time.perf_counter() - start), env)
        failed |= verdict.startswith("FAILED")
        print(f"{stage.name:<18}{seconds:>7.1f} s  {verdict}", flush=True)
        if failed and stage.name == "build":
            break
    print(log.read_text()[-6000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
