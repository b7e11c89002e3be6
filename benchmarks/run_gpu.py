"""Checks and benchmarks that need a GPU: a first part of five minutes, others of at most nine.

    python benchmarks/run_gpu.py --out DIR [--part PART] [--wheels DIR]

first: the checks of gpu_first.py, the tests that need a GPU, sanitizers and the bandwidth of the
updates, in five minutes, the most informative first. base: build, verify, sanitizers, tests,
benchmarks of the updates and of the sampling loop. cifar32, ddpm256: the engine and its baselines
on that network, batch by batch, and its operations. pipelines: sampling with cifar32 and 1000
steps, beside diffusers' pipeline. training: the trainer beside a plain loop. triangles: the
experiment of examples/triangles, which resumes an earlier run with the same --out.

Runs offline with the calling Python and its torch, builds in place for this GPU alone, and stops
each stage at its limit, by SIGINT first, so that Python says where it was. A stage that fails does
not stop those after it, except the build. --wheels names a folder of wheels, as `make gpu-wheels`
gathers them, which are installed for the run only. DIR gets PART.log, PART.json with the verdicts,
the CSVs of the benchmarks and, if matplotlib is installed, their figures (otherwise `ddpm-fast
bench plot` draws them later). The exit status is 0 if every stage passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = {"first": 295}  # of a part; otherwise:
LONG_S = 530
INTERRUPT_S = 5  # between SIGINT and SIGKILL
# Prefixes of tests that need no GPU.
WITHOUT_GPU = (
    "bench/",
    "benchmarks/",
    "build/",
    "engine/autotune/test_cache.py",
    "engine/plan/",
    "engine/test_peak_memory.py",
    "models/checkpoint/test_checkpoint.py",
    "models/test_unet.py",
    "ops/triton/test_compiled_",
    "training/data/",
    "training/test_processes.py",
    "training/test_trainer.py",
    "utils/test_images.py",
)
PARTS = ("first", "base", "cifar32", "ddpm256", "pipelines", "training", "triangles")
DENIED = ("Device not supported", "not supported on this", "ERR_NVGPUCTRPERM")


@dataclass(frozen=True)
class Stage:
    """One command of a part.

    Attributes:
        name: name in the report.
        command: the command line.
        limit_s: seconds after which the command is killed.
        skip: reason to skip the stage; empty to run it.
        env: additional environment variables.
    """

    name: str
    command: list[str]
    limit_s: int
    skip: str = ""
    env: dict[str, str] = field(default_factory=dict)


BUILD = Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 200)


def bench(name: str, out: Path, limit_s: int, *options: object) -> Stage:
    """Create the stage of a command of `ddpm-fast bench`, limited to leave time to measure."""
    what, network, batch = name.split()
    file = out / f"{name.replace(' ', '_')}.csv"
    command = [sys.executable, "-m", "ddpm_fast", "bench", what, "--network", network]
    command += ["--batch", batch, "--limit", str(limit_s * 3 // 5), "--out", str(file)]
    if _has("matplotlib"):
        command += ["--plot", str(file.with_suffix(".png"))]
    return Stage(name, command + [str(option) for option in options], limit_s)


def sanitizer(tool: str, command: list[str], limit_s: int, name: str) -> Stage:
    """Create a stage of compute-sanitizer over our kernels alone."""
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    # Kernels of torch are many and take most of the time. Versions differ in the option's name.
    text = subprocess.run([path, "--help"], capture_output=True, text=True).stdout if path else ""
    option = next((o for o in ("--kernel-regex", "--kernel-name", "--filter") if o in text), None)
    ours = [option, "kns=ddpm"] if option else []
    whole = [str(path), "--tool", tool, "--error-exitcode", "9", *ours, sys.executable, *command]
    missing = "" if path else "compute-sanitizer not found"
    # Without torch's cache every tensor is a separate allocation, whose bounds are checked.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(f"{tool} {name}", whole, limit_s, missing, env)


def first(out: Path) -> list[Stage]:
    """Return the stages of the part `first`."""
    python = sys.executable

    def check(name: str, limit_s: int) -> Stage:
        command = [python, "-X", "faulthandler", "benchmarks/gpu_first.py", name]
        return Stage(name, command, limit_s)

    small = ["benchmarks/gpu_first.py", "small"]
    updates = [python, "benchmarks/reverse_step.py", "--device", "cuda", "--rounds", "5"]
    updates += ["--out", str(out / "updates_first.csv")]
    tests = [python, "-m", "pytest", "-v", "--tb=short", "-m", "cuda", "--maxfail=20", "tests"]
    return [
        Stage("build", BUILD.command, 120),
        check("facts", 20),
        check("kernels", 30),
        check("verify", 45),
        check("norms", 40),
        check("overlap", 25),
        Stage("tests on the GPU", tests, 75),
        check("loop", 45),
        Stage("updates cuda", updates, 40),
        sanitizer("memcheck", small, 40, "small"),
        sanitizer("racecheck", small, 40, "small"),
        check("verify-triton", 60),
    ]


def stages(part: str, out: Path) -> list[Stage]:
    """Return the stages of a part."""
    if part == "first":
        return first(out)
    if part == "cifar32":
        return [
            BUILD,
            bench("network cifar32 512", out, 170),
            bench("network cifar32 64", out, 130),
            bench("network cifar32 1", out, 130),
            bench("kernels cifar32 512", out, 100),
        ]
    if part == "ddpm256":
        return [
            BUILD,
            bench("network ddpm256 8", out, 190),
            bench("network ddpm256 1", out, 150),
            bench("kernels ddpm256 8", out, 100),
        ]
    if part == "pipelines":
        return [
            BUILD,
            bench("sampling cifar32 1", out, 220, "--rounds", 2),
            bench("sampling cifar32 64", out, 300, "--rounds", 2),
        ]
    if part == "training":
        return [BUILD, training(out, "small", 256, 110), training(out, "cifar32", 128, 200)]
    if part == "triangles":
        command = [sys.executable, "examples/triangles/run.py", "--gpu", "--no-progress"]
        return [BUILD, Stage("triangles", [*command, "--out", str(out / "triangles")], 500)]
    return base(out)


def training(out: Path, network: str, batch: int, limit_s: int) -> Stage:
    """Create the stage of the trainer and a plain loop, compiled, in float32 and bfloat16."""
    command = [sys.executable, "benchmarks/training_step.py", "--device", "cuda", "--compile"]
    command += ["--network", network, "--batch", str(batch), "--steps", "20"]
    command += ["--precision", "float32", "bfloat16", "--out", str(out / f"training_{network}.csv")]
    missing = "" if _has("accelerate") else "needs accelerate"
    return Stage(f"training {network}", command, limit_s, missing)


def base(out: Path) -> list[Stage]:
    """Return the stages of the part `base`."""
    python = sys.executable
    parallel = ["-n", "8"] if _has("xdist") else []
    tests = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not path.relative_to(ROOT / "tests").as_posix().startswith(WITHOUT_GPU)
    ]
    updates = [python, "benchmarks/reverse_step.py", "--device", "cuda", "--rounds", "20"]
    cuda_csv, triton_csv = out / "updates_cuda.csv", out / "updates_triton.csv"
    loop = [python, "benchmarks/sampler_overhead.py", "--device", "cuda", "--rounds", "9"]
    checked = ["-m", "ddpm_fast", "verify", "--backend", "cuda"]
    sheet = [python, "-m", "ddpm_fast", "sample", "--device", "cuda", "--no-progress"]
    return [
        BUILD,
        Stage("verify", [python, "-m", "ddpm_fast", "verify"], 90),
        *(sanitizer(tool, checked, 70, "cuda") for tool in ("memcheck", "racecheck")),
        Stage("sample", [*sheet, "--out", str(out / "triangles.png")], 40),
        Stage("updates cuda", [*updates, "--backend", "cuda", "--out", str(cuda_csv)], 50),
        Stage("loop", [*loop, "--out", str(out / "loop.csv")], 80),
        Stage("tests", [python, "-m", "pytest", "-q", *parallel, *tests], 150),
        Stage("updates triton", [*updates, "--backend", "triton", "--out", str(triton_csv)], 50),
    ]


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def run(stage: Stage, log: Path, left_s: float, env: dict[str, str]) -> tuple[str, float]:
    """Run a stage and append its output to the log; return the verdict and the seconds."""
    if stage.skip:
        return f"skipped: {stage.skip}", 0.0
    if left_s < 15:
        return "FAILED: no time left to run it", 0.0
    begin, start = time.perf_counter(), log.stat().st_size
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=env | stage.env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(min(stage.limit_s, left_s))
            verdict = "ok" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired:
            _stop(process)
            verdict = "FAILED: stopped at its limit"
    if verdict != "ok" and any(text in log.read_text()[start:] for text in DENIED):
        verdict = "skipped: the machine does not allow it"
    return verdict, time.perf_counter() - begin


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, and kill what is left after a few seconds."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _findings(text: str) -> list[str]:
    """Return the lines of a stage's output that tell of a fault, at most 12."""
    words = ("MISS", "FAIL", "Error", "ERROR SUMMARY", "========= Invalid")
    return [line[:300] for line in text.splitlines() if any(word in line for word in words)][:12]


def _install(wheels: Path, out: Path) -> str:
    """Install wheels into a folder of the run, and return it."""
    target = out / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    files = sorted(map(str, wheels.glob("*.whl")))
    subprocess.run([*command, "--upgrade", "--target", str(target), *files], check=True)
    return str(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--part", choices=PARTS, default="first")
    parser.add_argument("--wheels", type=Path, default=None)
    args = parser.parse_args()
    out = args.out.resolve()
    if not torch.cuda.is_available():
        print("benchmarks/run_gpu.py needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{args.part}.log"
    log.write_text("")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    path = [str(ROOT), *([_install(args.wheels, out)] if args.wheels else [])]
    env = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "DDPM_FAST_CUDA": "1",
        "DDPM_FAST_CUDA_ARCHS": arch,
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    start = time.perf_counter()
    summary: list[dict[str, object]] = []
    for stage in stages(args.part, out):
        left, begin = BUDGET_S.get(args.part, LONG_S), log.stat().st_size
        verdict, seconds = run(stage, log, left - (time.perf_counter() - start), env)
        print(f"{stage.name:<22}{seconds:>7.1f} s  {verdict}", flush=True)
        found = [] if verdict == "ok" else _findings(log.read_text()[begin:])
        for line in found:
            print(f"    {line}", flush=True)
        row = {"stage": stage.name, "verdict": verdict, "seconds": round(seconds, 1)}
        summary.append(row | {"findings": found})
        text = json.dumps({"gpu": torch.cuda.get_device_name(), "stages": summary}, indent=1)
        (out / f"{args.part}.json").write_text(text)
        if verdict != "ok" and stage.name == "build":
            break
    print(log.read_text()[-6000:])
    return int(any(str(row["verdict"]).startswith("FAILED") for row in summary))


if __name__ == "__main__":
    sys.exit(main())
