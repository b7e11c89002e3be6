"""SHA-256 of all seeded results: samples of every solver, noise, a training, `verify`.

    python benchmarks/checksums.py --out checksums.json
    python benchmarks/checksums.py --compare checksums.json

For changes that must not alter a bit: record before the change and compare after it, on the same
machine. The bits of a convolution depend on the processor's instruction set, so the values are not
constants of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import ddpm_fast

SHIPPED_MODEL = Path(ddpm_fast.__file__).parent / "assets" / "triangles"
SOLVERS = ("ddpm", "ddim", "ve_ode", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms")


def digest(tensor: Tensor) -> str:
    """SHA-256 of the elements in memory order of a contiguous copy."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def sample_checksums() -> Iterator[tuple[str, str]]:
    """64 samples of the shipped model at 10 steps, for every solver, and of the engine."""
    model = ddpm_fast.load(str(SHIPPED_MODEL))
    for solver in SOLVERS:
        table = getattr(ddpm_fast.StepTable, solver)(model.schedule, steps=10)
        sampler = ddpm_fast.Sampler(model.unet, table, model.sample_shape, micro_batch=64)
        yield f"sample {solver}", digest(sampler.sample(64, seed=0, progress=False))
    codec = ddpm_fast.Codec(model.unet, model.schedule, model.sample_shape, steps=10)
    yield (
        "encode (ddim_inverse)",
        digest(codec.encode(sampler.sample(4, seed=0, progress=False), progress=False)),
    )
    engine = ddpm_fast.UNetEngine(model.unet, batch=4, image_size=32)
    x = ddpm_fast.philox_normal(4, model.sample_shape, seed=1)
    yield "engine", digest(engine(x, torch.tensor(500)))


def noise_checksums() -> Iterator[tuple[str, str]]:
    """Counter-based noise of every backend that can run, and the forward process with it."""
    yield "noise", digest(ddpm_fast.philox_normal(16, (3, 33, 31), seed=7, stream=3))
    schedule = ddpm_fast.NoiseSchedule.cosine()
    x0 = ddpm_fast.philox_normal(16, (3, 33, 31), seed=8)
    t = torch.arange(16) * 60
    x_t, noise = ddpm_fast.q_sample_philox(x0, t, schedule, seed=5, first_sample=9)
    yield "q_sample_philox x_t", digest(x_t)
    yield "q_sample_philox noise", digest(noise)


def training_checksums() -> Iterator[tuple[str, str]]:
    """Two epochs of a tiny network, by the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = (
            f"train --data triangles --num 64 --network tiny --epochs 2 --batch 16 --out {folder}"
        )
        options = "--warmup 2 --sample-every 0 --no-progress --device cpu"
        ddpm_fast_command(f"{command} {options}")
        model = ddpm_fast.load(f"{folder}/checkpoint")
        for index, (name, weight) in enumerate(sorted(model.unet.state_dict().items())):
            if index % 20 == 0:
                yield f"training {name}", digest(weight)
        rows = Path(folder, "history.csv").read_text().splitlines()
        columns = rows[0].split(",")
        selected = [i for i, name in enumerate(columns) if "loss" in name]
        losses = [[row.split(",")[i] for i in selected] for row in rows]
        yield "training losses", hashlib.sha256(repr(losses).encode()).hexdigest()


def verify_checksums() -> Iterator[tuple[str, str]]:
    """The report of `ddpm-fast verify --json`."""
    text = ddpm_fast_command("verify --json")
    yield "verify --json", hashlib.sha256(text.encode()).hexdigest()


def ddpm_fast_command(arguments: str) -> str:
    """The output of `python -m ddpm_fast`."""
    command = [sys.executable, "-m", "ddpm_fast", *arguments.split()]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Record the checksums, or compare them with recorded ones (exit status 1 on a difference)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the checksums to this JSON file")
    parser.add_argument("--compare", type=Path, help="a JSON file that --out wrote")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = {}
    for part in (noise_checksums, sample_checksums, training_checksums, verify_checksums):
        for name, value in part():
            found[name] = value
            print(f"{value}  {name}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.compare:
        before = json.loads(arguments.compare.read_text())
        differing = [name for name in before | found if before.get(name) != found.get(name)]
        print(f"differing: {', '.join(differing)}" if differing else "all equal")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
