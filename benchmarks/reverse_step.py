"""Bandwidth of the fused updates, beside a copy and the expressions that they replace.

    python benchmarks/reverse_step.py [--device cpu|cuda] [--backend NAME] [--out FILE]

All cases of a shape are interleaved in one run. `of_copy` is a case's bandwidth relative to that of
a copy of x; `of_equal_copy` is the time of a copy of as many bytes relative to the case, to which
caches apply alike; `speedup` is relative to the preallocated expression with the same noise. Prints
a table and writes benchmarks/results/updates_<device>_<backend>.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, StepTable, philox_rng
from ddpm_fast.bench.results import RESULTS, metadata, write_csv
from ddpm_fast.bench.timing import Call, interleaved, quantiles
from ddpm_fast.ops import Backend, get_backend
from ddpm_fast.ops.row import column

SHAPES = {"cpu": [(64, 3, 32, 32), (16, 3, 256, 256)], "cuda": []}
SHAPES["cuda"] = [*SHAPES["cpu"], (1, 3, 32, 32), (512, 3, 32, 32), (128, 3, 256, 256)]
STEPS = 100
ROW = 50


class Expressions:
    """One ancestral step in plain PyTorch, on buffers of one shape."""

    def __init__(self, x: Tensor, out: Tensor, row: Tensor) -> None:
        self.x, self.out = x, out
        self.z, self.x0 = torch.randn_like(x), torch.empty_like(x)
        self.c = {name: float(row[column(name)]) for name in ("P", "Q", "Xx", "Xx0", "S")}

    def preallocated(self) -> None:
        """Compute in place, with noise as an input and without allocation."""
        c = self.c
        torch.mul(self.x, c["P"], out=self.x0)
        self.x0.add_(self.out, alpha=c["Q"]).clamp_(-1, 1)
        self.x.mul_(c["Xx"]).add_(self.x0, alpha=c["Xx0"]).add_(self.z, alpha=c["S"])

    def preallocated_normal(self) -> None:
        """Generate noise, then compute in place."""
        self.z.normal_()
        self.preallocated()

    def allocating(self) -> None:
        """Compute as diffusers' DDPMScheduler.step does, and generate noise."""
        c = self.c
        x0 = ((self.x + c["Q"] / c["P"] * self.out) * c["P"]).clamp(-1, 1)
        mean = c["Xx0"] * x0 + c["Xx"] * self.x
        self.x.copy_(mean + c["S"] * torch.randn_like(self.x))


def cases_of(
    shape: tuple[int, ...], device: torch.device, backend: str, half: bool
) -> tuple[dict[str, Call], dict[str, int]]:
    """Return the cases of a shape, and the bytes that each must move."""
    format_ = torch.channels_last
    x = torch.randn(shape, device=device).to(memory_format=format_)
    out, y = torch.randn_like(x), torch.empty_like(x)
    table = StepTable.ddpm(NoiseSchedule.linear(), steps=STEPS)
    rows, _ = table.to(device)
    step = torch.full((shape[0],), ROW, device=device)
    run = get_backend(backend, device, x.dtype)
    # Contiguous is faster here: on a CPU normal_ is several times slower in channels_last.
    plain = torch.randn(shape, device=device)
    expressions = Expressions(plain, torch.randn_like(plain), table.rows[ROW])
    rng = philox_rng(0, device=device)
    noise = torch.randn_like(x)
    t = torch.full((shape[0],), 500, device=device)
    coefs = NoiseSchedule.linear().q_sample_coefs(device)

    def reverse(out: Tensor, noise: Tensor | None, rng: Tensor | None, model_input: Tensor | None):
        run.reverse_step_(x, out, rows, step, noise, rng, model_input, None, int(table.flags))

    both = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device).to(memory_format=format_)

    n = x.numel()
    cases: dict[str, Call] = {
        "copy": partial(y.copy_, x),
        "reverse_step noise given": partial(reverse, out, noise, None, None),
        "reverse_step noise made": partial(reverse, out, None, rng, None),
        "preallocated expression": expressions.preallocated,
        "preallocated expression + normal_": expressions.preallocated_normal,
        "allocating expression (diffusers)": expressions.allocating,
        "q_sample noise given": partial(run.q_sample, x, t, noise, coefs),
        "q_sample noise made": partial(run.q_sample_philox, x, t, coefs, rng),
        "philox_normal": partial(run.philox_normal_, y, rng),
        "normal_": plain.clone().normal_,
    }
    sizes = {
        "copy": 8,
        "reverse_step noise given": 16,
        "reverse_step noise made": 12,
        "q_sample noise given": 12,
        "q_sample noise made": 12,
        "philox_normal": 4,
    }
    for name, (solver, size) in solver_tables().items():
        cases[f"reverse_step {name}"] = solver_case(run, solver, x, both, noise)
        sizes[f"reverse_step {name}"] = size
    if half:
        out_half, input_half = out.half(), torch.empty_like(x, dtype=torch.float16)
        cases["reverse_step float16 in and out"] = partial(reverse, out_half, None, rng, input_half)
        sizes["reverse_step float16 in and out"] = 12
    for size in sorted(set(sizes.values()) - {sizes["copy"]}):
        source = torch.randn(n * size // 8, device=device)
        cases[equal_copy(size)] = partial(torch.empty_like(source).copy_, source)
        sizes[equal_copy(size)] = size
    return cases, {name: size * n for name, size in sizes.items()}


def equal_copy(size: int) -> str:
    """Return the name of the copy that moves as many bytes."""
    return f"copy of {size} bytes an element" if size != 8 else "copy"


def solver_tables() -> dict[str, tuple[StepTable, int]]:
    """Return tables of other solvers, and the bytes that a float32 element must move."""
    schedule = NoiseSchedule.linear()
    return {
        "ddim, raw epsilon": (StepTable.ddim(schedule, STEPS, rederive_epsilon=False), 12),
        "ddpm learned_range, noise given": (
            StepTable.ddpm(schedule, STEPS, variance="learned_range"),
            20,
        ),
        "ddim, guided": (StepTable.ddim(schedule, STEPS).with_guidance(2.0), 16),
        "dpmpp_2m": (StepTable.dpmpp_2m(schedule, STEPS), 20),
        "unipc": (StepTable.unipc(schedule, STEPS), 32),
        "plms": (StepTable.plms(schedule, STEPS), 28),
    }


def solver_case(run: Backend, table: StepTable, x: Tensor, both: Tensor, noise: Tensor) -> Call:
    """Return a step of a table; `both` is an output with a learned variance."""
    rows, _ = table.to(x.device)
    step = torch.full((x.shape[0],), ROW, device=x.device)
    channels = x.shape[1]
    out = both[:, :channels] if table.learned else torch.randn_like(x)
    v = both[:, channels:] if table.learned else None
    out2 = torch.randn_like(x) if table.guided else None
    noise_input = noise if table.uses_noise else None
    plain = (x, out, rows, step, noise_input, None, None, None, int(table.flags))
    return partial(run.reverse_step_, *plain, out2, v, None, *table.memory(x))


SPEEDUPS = {
    "reverse_step noise given": "preallocated expression",
    "reverse_step noise made": "preallocated expression + normal_",
    "philox_normal": "normal_",
}


def sampler_cases(shape: tuple[int, ...], device: torch.device, backend: str) -> dict[str, Call]:
    """Return sampling with an identity model, and the same number of operator calls."""
    table = StepTable.ddpm(NoiseSchedule.linear(), steps=STEPS)
    sampler = Sampler(
        lambda x, t: x, table, shape[1:], micro_batch=shape[0], device=device, backend=backend
    )
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    rows, _ = table.to(device)
    rng = philox_rng(0, device=device)
    steps = [torch.full((shape[0],), i, device=device) for i in range(STEPS)]
    run = get_backend(backend, device, x.dtype)

    def bare() -> None:
        for step in steps:
            run.reverse_step_(x, x, rows, step, None, rng, None, None, int(table.flags))

    return {
        "sampler with an identity model": lambda: sampler.sample(shape[0], progress=False),
        "bare operator": bare,
    }


def rows_of(
    times: dict[str, list[float]],
    shape: tuple[int, ...],
    per_call: int,
    extra: Callable[[str], dict[str, object]],
) -> list[dict[str, object]]:
    return [
        {
            "case": name,
            "shape": "x".join(map(str, shape)),
            "rounds": len(seconds),
            **{key: round(us / per_call, 3) for key, us in quantiles(seconds).items()},
            **extra(name),
        }
        for name, seconds in times.items()
    ]


def measure(device: torch.device, backend: str, rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for shape in SHAPES[device.type]:
        cases, sizes = cases_of(shape, device, backend, half=device.type == "cuda")
        times = interleaved(cases, device, rounds)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        copy_rate = sizes["copy"] / median["copy"]

        def extra(
            name: str,
            median: dict[str, float] = median,
            sizes: dict[str, int] = sizes,
            copy_rate: float = copy_rate,
        ) -> dict[str, object]:
            baseline = SPEEDUPS.get(name)
            rate = sizes[name] / median[name] if name in sizes else None
            equal = equal_copy(sizes[name] * 8 // sizes["copy"]) if rate else None
            return {
                "GB_per_s": round(rate / 1e9, 2) if rate else "",
                "of_copy": round(rate / copy_rate, 3) if rate else "",
                "of_equal_copy": round(median[equal] / median[name], 3) if equal else "",
                "speedup": round(median[baseline] / median[name], 3) if baseline else "",
                "of_bare": "",
            }

        rows += rows_of(times, shape, 1, extra)
        chain = interleaved(sampler_cases(shape, device, backend), device, max(5, rounds // 6))
        bare = statistics.median(chain["bare operator"])
        rows += rows_of(
            chain,
            shape,
            STEPS,
            lambda name, chain=chain, bare=bare: {
                "GB_per_s": "",
                "of_copy": "",
                "of_equal_copy": "",
                "speedup": "",
                "of_bare": round(statistics.median(chain[name]) / bare, 3),
            },
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    backend = get_backend(args.backend, device, torch.float32).name
    facts = metadata() | {"backend": backend, "threads": torch.get_num_threads()}
    rows = [facts | row for row in measure(device, backend, args.rounds)]
    for row in rows:
        print(
            f"{row['shape']:<14}{row['case']:<36}{row['p50_us']:>11.1f} us"
            f"{row['of_copy']!s:>8} of copy{row['of_equal_copy']!s:>8} of equal copy"
            f"{row['speedup']!s:>8} x{row['of_bare']!s:>8} of bare"
        )
    path = args.out or RESULTS / f"updates_{device.type}_{backend}.csv"
    write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
