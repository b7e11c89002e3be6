"""Price of comparing an accelerated network's weights: a direct call and a chain, with and without.

    python benchmarks/weight_checks.py [--device cpu|cuda] [--out FILE]

Batch size 1, where the price is highest. "comparison" is one comparison by itself, "norms" the norm
of each weight in float64, for scale. `of_call` and `of_chain` are times relative to a direct call
and to a chain of 50 steps without the check, in the same run. Writes
benchmarks/results/weight_checks_<device>.csv.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from ddpm_fast import NoiseSchedule, Sampler, StepTable, accelerate
from ddpm_fast.bench.networks import NETWORKS, build
from ddpm_fast.bench.results import RESULTS, metadata, write_csv
from ddpm_fast.bench.timing import Call, interleaved, quantiles
from ddpm_fast.engine.weight_watch import WeightWatcher

STEPS = 50


def cases_of(name: str, device: torch.device) -> dict[str, Call]:
    """Return the cases of a network."""
    unet = build(name).to(device, torch.float16 if device.type == "cuda" else torch.float32)
    config = unet.config
    x = torch.randn(1, *config.sample_shape, device=device, dtype=unet.dtype)
    x = x.to(memory_format=torch.channels_last)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    table = StepTable.ddim(NoiseSchedule.linear(), STEPS)
    watcher = WeightWatcher(unet)
    weights = list(unet.parameters())
    cases: dict[str, Call] = {}
    for checked in (False, True):
        model = accelerate(unet, check_weights=checked)
        sampler = Sampler(model, table, config.sample_shape, micro_batch=1)
        suffix = ", compared" if checked else ""
        cases["direct call" + suffix] = lambda model=model: model(x, t)
        cases["chain" + suffix] = lambda sampler=sampler: sampler.sample(1, progress=False)

    @torch.no_grad()
    def norms() -> None:
        torch.stack(torch._foreach_norm(weights, 2, torch.float64)).tolist()

    return cases | {"comparison": watcher.changed, "norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", nargs="*", default=["triangles", "cifar32"], choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    path = args.out or RESULTS / f"weight_checks_{device.type}.csv"
    facts, rows = metadata(), []
    for name in args.network:
        times = interleaved(cases_of(name, device), device, args.rounds)
        call, chain = (statistics.median(times[case]) for case in ("direct call", "chain"))
        for case, seconds in times.items():
            median = statistics.median(seconds)
            row = {
                "network": name,
                "batch": 1,
                "steps": STEPS,
                "case": case,
                "rounds": args.rounds,
                **quantiles(seconds),
                "of_call": round(median / call, 4),
                "of_chain": round(median / chain, 5),
            }
            rows.append(facts | row)
            print(
                f"{name:<10} {case:<22} {median * 1e6:>12.1f} us"
                f" {row['of_call']:>9} of a call {row['of_chain']:>9} of a chain"
            )
        write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
