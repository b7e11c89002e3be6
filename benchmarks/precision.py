"""Difference of sampling in lower precision from sampling in float32, with the same noise.

    python benchmarks/precision.py [--steps 1000] [--images 4] [--device cpu|cuda] [--out FILE]

Samples the shipped model by ancestral sampling. The state is float32 in every case; only the
network differs. Compares the final images, about [-1, 1], with those of the plain network in
float32: the largest and the rms difference, and the share of 8-bit values that differ. Writes
benchmarks/results/drift_<device>.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import ddpm_fast
from ddpm_fast import Sampler, StepTable, UNetEngine
from ddpm_fast.bench import baselines
from ddpm_fast.bench.networks import TRIANGLES
from ddpm_fast.bench.results import RESULTS, metadata, write_csv
from ddpm_fast.utils.images import to_uint8

REFERENCE = "plain network float32"


def cases(unet: ddpm_fast.UNet, images: int) -> dict[str, Callable[[], Any]]:
    """Return constructors of the networks by name, the reference first."""
    size = unet.config.sample_size

    def engine(dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: UNetEngine(unet, images, size, dtype)

    return {
        REFERENCE: lambda: unet,
        "engine float32": engine(torch.float32),
        "engine float16": engine(torch.float16),
        "engine bfloat16": engine(torch.bfloat16),
        "diffusers float16": lambda: baselines.diffusers_unet(unet, unet.device, torch.float16),
    }


def measure(steps: int, images: int, seed: int, device: torch.device) -> list[dict[str, object]]:
    checkpoint = ddpm_fast.load(TRIANGLES, device=device)
    table = StepTable.ddpm(
        checkpoint.schedule,
        steps,
        variance=checkpoint.variance,
        prediction=checkpoint.prediction,
        clip=checkpoint.clip,
        spacing="linspace",
    )
    facts = metadata("diffusers") | {"threads": torch.get_num_threads()}
    rows: list[dict[str, object]] = []
    want = None
    for name, make in cases(checkpoint.unet, images).items():
        try:
            model = make()
        except baselines.MissingError as error:
            print(f"left out: {name}: {error}")
            continue
        sampler = Sampler(model, table, checkpoint.sample_shape, images, device=device)
        begin = time.perf_counter()
        got = sampler.sample(images, seed=seed, progress=False).double().cpu()
        seconds = time.perf_counter() - begin
        if want is None:
            want = got
        different = (to_uint8(got) != to_uint8(want)).double().mean()
        row = {
            "network": "triangles",
            "device": device.type,
            "images": images,
            "steps": steps,
            "seed": seed,
            "case": name,
            "max": f"{float((got - want).abs().max()):.3e}",
            "rms": f"{float((got - want).square().mean().sqrt()):.3e}",
            "of_8_bit_values": f"{float(different):.4f}",
            "seconds": round(seconds, 2),
        }
        rows.append(facts | row)
        print(
            f"{name:<24}max {row['max']:>10}  rms {row['rms']:>10}"
            f"  {row['of_8_bit_values']} of the 8-bit values  {seconds:.1f} s"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = measure(args.steps, args.images, args.seed, device)
    path = args.out or RESULTS / f"drift_{device.type}.csv"
    write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
