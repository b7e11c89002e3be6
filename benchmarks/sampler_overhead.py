"""Overhead of the sampling loop: a chain of steps beside as many forward passes.

    python benchmarks/sampler_overhead.py [--device cpu|cuda] [--out FILE]

On a GPU both are CUDA graphs, and the chain with an identity model measures the loop alone.
`of_network` is the time of a step relative to the network's forward pass in the same run. Writes
benchmarks/results/loop_<device>.csv.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, StepTable
from ddpm_fast.bench.networks import build
from ddpm_fast.bench.results import RESULTS, metadata, write_csv
from ddpm_fast.bench.timing import Call, interleaved, quantiles
from ddpm_fast.utils.cuda_graphs import GraphedStep

CHAIN_S = 0.3


class Identity(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x


def networks(device: torch.device) -> dict[str, tuple[nn.Module, tuple[int, ...], list[int]]]:
    """Return the models by name, with their sample shapes and batch sizes."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    triangles = build("triangles").to(device, dtype)
    found: dict[str, tuple[nn.Module, tuple[int, ...], list[int]]] = {
        "identity": (Identity(), (3, 32, 32), [1, 64]),
        "triangles": (triangles, (1, 32, 32), [64]),
    }
    if device.type == "cuda":
        found["cifar32"] = (build("cifar32").to(device, dtype), (3, 32, 32), [1, 64, 512])
    return found


def steps_for(model: nn.Module, shape: tuple[int, ...], batch: int, device: torch.device) -> int:
    """Return the number of steps of a chain that takes about `CHAIN_S`."""
    case = cases_of(model, shape, batch, device, 4)["network"]
    once = statistics.median(interleaved({"network": case}, device, 3)["network"]) / 4
    return max(4, min(200, round(CHAIN_S / once)))


def cases_of(
    model: nn.Module, shape: tuple[int, ...], batch: int, device: torch.device, steps: int
) -> dict[str, Call]:
    """Return a chain of the sampler, and as many forward passes."""
    table = StepTable.ddpm(NoiseSchedule.linear(), steps=steps)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    sampler = Sampler(model, table, shape, micro_batch=batch, device=device, dtype=dtype)
    x = torch.randn((batch, *shape), device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    t = torch.zeros(batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def forward() -> None:
        model(x, t)

    run = GraphedStep(forward, t.zero_, device) if device.type == "cuda" else forward

    def forwards() -> None:
        for _ in range(steps):
            run()

    return {
        "step of the sampler": lambda: sampler.sample(batch, progress=False),
        "network": forwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=None, help="default: as many as take CHAIN_S")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    path = args.out or RESULTS / f"loop_{device.type}.csv"
    facts = metadata()
    rows: list[dict[str, object]] = []
    for name, (model, shape, batches) in networks(device).items():
        for batch in batches:
            steps = args.steps or steps_for(model, shape, batch, device)
            cases = cases_of(model, shape, batch, device, steps)
            times = interleaved(cases, device, args.rounds)
            network = statistics.median(times["network"])
            for case, seconds in times.items():
                per_step = {key: round(us / steps, 3) for key, us in quantiles(seconds).items()}
                row = {"network": name, "batch": batch, "case": case, "steps": steps}
                ratio = round(statistics.median(seconds) / network, 4) if name != "identity" else ""
                rows.append(
                    facts | row | {"rounds": args.rounds} | per_step | {"of_network": ratio}
                )
                print(
                    f"{name:<11}{batch:>4}  {case:<22}"
                    f"{per_step['p50_us']:>12.2f} us a step  {ratio}"
                )
        # After each network, because a time limit may stop the run.
        write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
