"""Checks for the first minutes on a GPU, the most informative first.

    python benchmarks/gpu_first.py NAME [--device cuda|cpu]

`run_gpu.py --part first` runs each check as a process of its own. A line begins with ok, MISS (a
wrong result) or FAIL (an error), and is flushed at once, so that the findings of a check that is
stopped are kept. The exit status is 1 after a MISS or FAIL. `--device cpu` runs what can run on the
CPU's kernels, to try the script itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, StepTable, Tuner, accelerate, philox_rng
from ddpm_fast.ops import get_backend, unavailable_reason
from ddpm_fast.ops.dispatch import DTYPES, compiled_architectures
from ddpm_fast.ops.registry import NOT_LOADED

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HANG_S = 15  # after which a check that waits for a kernel prints where it is
TOOLS = ("nvcc", "g++", "ninja", "compute-sanitizer", "ncu")
PACKAGES = ("triton", "diffusers", "cudnn", "matplotlib", "accelerate", "xdist", "scipy")
bad_lines = 0


def say(*words: object) -> None:
    print(*words, flush=True)


def report(name: str, fault: str) -> None:
    """Print the line of a result; an empty fault is a good one."""
    global bad_lines
    bad_lines += bool(fault)
    say(f"  {'MISS' if fault else 'ok  '} {name}", fault)


def attempt(name: str, check: Callable[[], str]) -> None:
    """Report a check; after an error the next one may still tell something."""
    global bad_lines
    try:
        fault = check()
        synchronize()
    except Exception as error:
        bad_lines += 1
        say(f"  FAIL {name}: {type(error).__name__}: {str(error)[:300]}")
    else:
        report(name, fault)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def normals(shape: tuple[int, ...], seed: int, device: Any, dtype: Any = F32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def facts(device: torch.device) -> None:
    """Print versions, the GPU, what loads and what is installed."""
    say("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    say("not loaded:", NOT_LOADED, "architectures:", compiled_architectures())
    for name in ("cuda", "triton"):
        say(name, "cannot run:", unavailable_reason(name, torch.device("cuda")))
    if device.type == "cuda":
        say(torch.cuda.get_device_properties(device))
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem"
        subprocess.run(["nvidia-smi", query, "--format=csv"])
    for name in TOOLS:
        say(name, tool(name))
    for name in PACKAGES:
        say(name, "found" if importlib.util.find_spec(name) else "missing")
    reason = unavailable_reason("cuda", device) if device.type == "cuda" else None
    report("the backend cuda runs", reason or "")


def outputs_of_updates(device: torch.device, backend: str) -> Iterator[tuple[str, Any]]:
    """Yield a name and a function for each update; it returns the outputs on a device."""
    schedule = NoiseSchedule.linear()

    def step(table: StepTable, generated: bool, dtype: torch.dtype, last: bool) -> list[Tensor]:
        run = get_backend(backend, device, F32)
        layout = torch.channels_last if last else torch.contiguous_format

        def tensor(seed: int, channels: int = 3, dtype: torch.dtype = F32) -> Tensor:
            made = normals((4, channels, 32, 32), seed, device, dtype)
            return made.to(memory_format=layout).contiguous(memory_format=layout)

        x, out = tensor(0), tensor(1, 6 if table.learned else 3, dtype)
        rows, _ = table.to(device, F32)
        noisy = table.uses_noise
        at = torch.tensor([0, 3, 7, 10**6], device=device)  # the last has no row
        model_input = torch.zeros_like(x, dtype=dtype)
        second, history = table.memory(x)
        run.reverse_step_(
            x,
            out[:, :3],
            rows,
            at,
            tensor(2) if noisy and not generated else None,
            philox_rng(11, 1, 5, device) if noisy and generated else None,
            model_input,
            None,
            int(table.flags),
            tensor(5, dtype=dtype) if table.guided else None,
            out[:, 3:] if table.learned else None,
            None,
            second,
            history,
        )
        return [value for value in (x, model_input, second, history) if value is not None]

    ddpm = StepTable.ddpm(schedule, 10)
    for dtype in (F32, F16, BF16):
        for last in (True, False):
            for generated in (True, False):
                layout = "channels-last" if last else "contiguous"
                noise = "generated" if generated else "input"
                name = f"reverse_step_ {str(dtype)[6:]} {layout}, noise {noise}"
                yield name, lambda g=generated, d=dtype, c=last: step(ddpm, g, d, c)
    tables = {
        "learned_range": StepTable.ddpm(schedule, 10, variance="learned_range"),
        "unipc": StepTable.unipc(schedule, 10),
        "dpmpp_2m_sde": StepTable.dpmpp_2m_sde(schedule, 10),
        "guided": StepTable.ddim(schedule, 10).with_guidance(2.0),
    }
    for name, table in tables.items():
        yield f"reverse_step_ {name}", lambda t=table: step(t, False, F16, True)

    def forward() -> list[Tensor]:
        run, t = get_backend(backend, device, F32), torch.tensor([0, 10, 500, 999], device=device)
        x0, rng = normals((4, 3, 32, 32), 0, device), philox_rng(1, 2, 3, device)
        coefs = schedule.q_sample_coefs(device)
        x_t, noise = run.q_sample_philox(x0, t, coefs, rng)
        posterior = run.q_posterior(x0, x_t, t, schedule.q_posterior_coefs(device))
        drawn = torch.empty_like(x0)
        run.philox_normal_(drawn, rng)
        return [run.q_sample(x0, t, noise, coefs), x_t, noise, drawn, *posterior]

    yield "q_sample, q_sample_philox, q_posterior, philox_normal_", forward
    weights = [normals((n,), n, device, dtype) for n in (7, 100_003) for dtype in (F32, F16)]
    yield "checksum", lambda: [get_backend(backend, device, F32).checksum(weights)]


def kernels(device: torch.device) -> None:
    """Launch each update once, and compare its bits with those of the CPU's kernels."""
    cpu = torch.device("cpu")
    pairs = zip(
        outputs_of_updates(cpu, "cpu"),
        outputs_of_updates(device, "cuda" if device.type == "cuda" else "cpu"),
        strict=True,
    )
    for (name, expected), (_, found) in pairs:

        def same(expected: Any = expected, found: Any = found) -> str:
            got = [value.cpu() for value in found()]
            return "" if all(map(torch.equal, got, expected())) else "other bits than the CPU's"

        attempt(name, same)
    if device.type == "cuda":
        attempt("the current stream is used", lambda: _on_a_stream(device))


def _on_a_stream(device: torch.device) -> str:
    run, side = get_backend("cuda", device, F32), torch.cuda.Stream(device)
    out, rng = torch.empty((64, 3, 32, 32), device=device), philox_rng(7, 1, 3, device)
    synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        rng.add_(1)
        run.philox_normal_(out, rng)  # on another stream it would read the old words
    side.synchronize()
    expected = torch.empty_like(out)
    run.philox_normal_(expected, rng)
    return "" if torch.equal(out, expected) else "it is not"


def verify(device: torch.device, backend: str) -> None:
    """Compare every operator, dtype and layout with float64; each miss as it comes."""
    from ddpm_fast.verify import verify as run_checks

    for dtype in DTYPES[backend]:
        start, count = time.perf_counter(), 0

        def each(check: Any) -> None:
            nonlocal count
            count += 1
            if not check.ok:
                bits = {True: "", None: "", False: ", other bits than the CPU's"}
                fault = f"{check.ratio:.3g} of its bound{bits[check.same_bits_as_cpu]}"
                report(f"{check.op} {check.dtype} {check.layout}", fault)

        run_checks((backend,), (dtype,), on_check=each)
        seconds = time.perf_counter() - start
        report(f"{backend} {str(dtype)[6:]}", "" if count else "no check ran")
        say(f"       {count} checks in {seconds:.1f} s")


def norms(device: torch.device, backend: str) -> None:
    """Run group_norm_ over blocks, clusters and streaming: a wrong barrier hangs here."""
    sizes = ((128, 4), (256, 8), (256, 16), (128, 32), (256, 32), (128, 64), (128, 128), (128, 256))
    largest = 1 << 27 if device.type == "cuda" else 1 << 18
    for dtype in (F16, BF16, F32):
        run = get_backend(backend, device, dtype)
        for batch in (1, 3, 64):
            for channels, side in sizes:
                for adds in (False, True):
                    if batch * channels * side * side <= largest:
                        faulthandler.dump_traceback_later(HANG_S, exit=True)
                        shape = (batch, channels, side, side)
                        name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}, residual {adds}"
                        attempt(name, lambda s=shape, a=adds, r=run, d=dtype: _norm(r, s, d, a))
    faulthandler.cancel_dump_traceback_later()


def _norm(run: Any, shape: tuple[int, ...], dtype: torch.dtype, adds: bool) -> str:
    """Compare one normalisation with float64; the bound is twice the error of torch's own."""
    device = torch.device("cuda" if run.name in ("cuda", "triton") else "cpu")
    x = normals(shape, 0, device, dtype)
    residual = normals(shape, 1, device, dtype) if adds else None
    w, b = (normals(shape[1:2], seed, device) for seed in (2, 3))
    out = torch.full_like(x, float("nan"))
    total = torch.empty_like(x) if adds else None
    run.group_norm_(out, x, None, None, None, residual, total, w, b, None, 32, 1e-5, True)
    h = x.double() + (residual.double() if residual is not None else 0)
    exact = F.silu(F.group_norm(h, 32, w.double(), b.double(), 1e-5))
    plain = F.silu(F.group_norm(h.to(dtype), 32, w.to(dtype), b.to(dtype), 1e-5)).double()
    ours, theirs = ((value - exact).square().mean().sqrt() for value in (out.double(), plain))
    ratio = float(ours / (2 * theirs + 1e-6))
    return "" if ratio <= 1 else f"{ratio:.3g} of its bound, {int(out.isnan().sum())} NaN"


def overlap(device: torch.device) -> None:
    """Chain normalisations, each reading what the one before wrote, eagerly and in a graph."""
    if device.type != "cuda":
        return say("  programmatic dependent launch needs a GPU")
    for dtype, batch, channels, side in ((F16, 8, 128, 32), (F16, 2, 128, 64), (F32, 64, 64, 16)):
        run = get_backend("cuda", device, dtype)
        w, b = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        x = normals((batch, channels, side, side), 0, device, dtype)
        pair = torch.empty_like(x), torch.empty_like(x)

        def chain(wait: bool, mixed: bool) -> Tensor:
            pair[0].copy_(x)  # noqa: B023
            for i in range(40):
                source, out = pair if i % 2 == 0 else pair[::-1]  # noqa: B023
                rest = (None,) * 5
                run.group_norm_(out, source, *rest, w, b, None, 32, 1e-5, False)  # noqa: B023
                if mixed and i % 3 == 0:
                    out.add_(0.125)
                if wait:
                    synchronize()
            return pair[0].clone()  # noqa: B023

        for mixed in (False, True):
            expected = chain(True, mixed)
            wrong = sum(not torch.equal(chain(False, mixed), expected) for _ in range(20))
            name = f"{str(dtype)[6:]} {batch}x{channels}x{side}, with torch's kernels {mixed}"
            report(f"eager {name}", f"{wrong} of 20 differ" if wrong else "")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain(False, mixed)
            wrong = 0
            for _ in range(20):
                graph.replay()
                wrong += not torch.equal(pair[0], expected)
            report(f"graph {name}", f"{wrong} of 20 differ" if wrong else "")


def small(device: torch.device) -> None:
    """Launch every kind of kernel once, on small tensors: for compute-sanitizer."""
    for name, run in outputs_of_updates(device, "cuda" if device.type == "cuda" else "cpu"):
        attempt(name, lambda r=run: "" if r() else "no output")
    backend = "cuda" if device.type == "cuda" else "cpu"
    for dtype in (F16, F32):
        run = get_backend(backend, device, dtype)
        for shape, adds in (((2, 64, 16, 16), False), ((1, 128, 64, 64), True)):
            attempt(
                f"group_norm_ {shape}", lambda r=run, s=shape, a=adds, d=dtype: _norm(r, s, d, a)
            )


def loop(device: torch.device) -> None:
    """Print host and GPU time and kernels a step of the captured loop."""
    from ddpm_fast.bench.networks import build

    cuda, steps = device.type == "cuda", 200 if device.type == "cuda" else 3
    table = StepTable.ddpm(NoiseSchedule.linear(), steps)
    models: dict[str, tuple[Any, int, torch.dtype]] = {
        "identity": (lambda x, t: x, 1, F32),
        "identity, 64": (lambda x, t: x, 64, F32),
    }
    if cuda:
        network = build("cifar32").to(device, F16)
        untuned = accelerate(network, tuner=Tuner(device, mode="off"))
        models |= {"cifar32": (network, 1, F16), "cifar32, engine, untuned": (untuned, 1, F16)}
    for name, (model, batch, dtype) in models.items():
        sampler = Sampler(model, table, (3, 32, 32), batch, device, dtype, graph=cuda)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            sampler.sample(batch, progress=False)
            host = time.perf_counter() - start
            synchronize()
            seconds.append((time.perf_counter() - start, host))
        whole, host = (value / steps * 1e6 for value in seconds[1])
        say(f"  {name}: first {seconds[0][0]:.1f} s, then {whole:.2f} us a step, host {host:.2f}")
        if cuda:
            _profile(sampler, batch, steps)


def _profile(sampler: Sampler, batch: int, steps: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sampler.sample(batch, progress=False)
        synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    count = sum(event.device_type == on_gpu for event in profile.events())
    say(f"    {count / steps:.1f} kernels a step")
    for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:6]:
        each = event.self_device_time_total / steps
        say(f"      {each:8.2f} us {event.count / steps:6.1f} a step  {event.key[:90]}")


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "facts": facts,
    "kernels": kernels,
    "verify": lambda device: verify(device, "cuda" if device.type == "cuda" else "cpu"),
    "norms": lambda device: norms(device, "cuda" if device.type == "cuda" else "cpu"),
    "overlap": overlap,
    "loop": loop,
    "small": small,
    "verify-triton": lambda device: verify(device, "triton"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    CHECKS[args.name](torch.device(args.device))
    return int(bad_lines > 0)


if __name__ == "__main__":
    sys.exit(main())
