"""Time of a training epoch, beside a plain PyTorch loop over the same images.

    python benchmarks/training_step.py [--device cpu|cuda] [--network small ...] [--batch 32 ...]

Both train the same network with the same precision and compilation, by Adam with gradient clipping
and an EMA of the weights; both load images by a DataLoader and read the losses once an epoch.
`of_plain` is the time of a step relative to the plain loop in the same run. Writes
benchmarks/results/training_<device>.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader

from ddpm_fast import NoiseSchedule
from ddpm_fast.bench.results import RESULTS, metadata, write_csv
from ddpm_fast.bench.timing import Call, interleaved, quantiles
from ddpm_fast.training.build_network import build_network
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.data import ImageData
from ddpm_fast.training.trainer import Trainer

NEVER = (1 << 31) - 1
EMA, LR, CLIP = 0.9995, 1e-4, 1.0
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ours(
    name: str, data: ImageData, batch: int, device: str, precision: str, compiled: bool, out: str
) -> Call:
    """Return an epoch of the trainer."""
    options = TrainOptions(
        epochs=NEVER,
        batch=batch,
        lr=LR,
        decay="none",
        warmup=0,
        ema=EMA,
        clip_norm=CLIP,
        test_share=0.0,
        precision=precision,
        compile=compiled,
    )
    network = build_network(name, data.sample_shape)
    schedule = NoiseSchedule.linear()
    trainer = Trainer(network, data, schedule, options, out, device=device, save_every=NEVER)
    epochs = trainer.run(progress=False)
    return lambda: next(epochs)


def plain(
    name: str, data: ImageData, batch: int, device: str, precision: str, compiled: bool
) -> Call:
    """Return an epoch of Algorithm 1 of Ho et al. 2020 in plain PyTorch."""
    network = build_network(name, data.sample_shape)
    network = network.to(device, memory_format=torch.channels_last)
    model = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), LR)
    average = [p.detach().clone() for p in network.parameters()]
    abar = NoiseSchedule.linear().alphas_cumprod.to(device, torch.float32)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, pin_memory=device == "cuda")
    dtype = DTYPES[precision]

    def epoch() -> None:
        losses = []
        for x0 in loader:
            x0 = x0.to(device, non_blocking=True, memory_format=torch.channels_last)
            t = torch.randint(0, len(abar), (len(x0),), device=device)
            noise = torch.randn_like(x0)
            abar_t = abar[t].view(-1, 1, 1, 1)
            x_t = abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * noise
            with torch.autocast(device, dtype) if dtype else nullcontext():
                loss = nn.functional.mse_loss(model(x_t, t).float(), noise)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                for a, p in zip(average, network.parameters(), strict=True):
                    a.lerp_(p, 1 - EMA)
            losses.append(loss.detach())
        torch.stack(losses).tolist()

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", nargs="+", default=["small"])
    parser.add_argument("--batch", nargs="+", type=int, default=[32])
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device, facts = torch.device(args.device), metadata("accelerate")
    path = args.out or RESULTS / f"training_{device.type}.csv"
    rows: list[dict[str, object]] = []
    for name in args.network:
        channels = 3 if name == "cifar32" else 1
        for batch in args.batch:
            images = torch.rand(batch * args.steps, channels, 32, 32) * 2 - 1
            data = ImageData(images, name="noise")
            for precision in args.precision:
                with tempfile.TemporaryDirectory() as out:
                    setting = (name, data, batch, args.device, precision, args.compile)
                    cases = {"ddpm_fast": ours(*setting, out), "plain loop": plain(*setting)}
                    times = interleaved(cases, device, args.rounds)
                median = statistics.median(times["plain loop"])
                for case, seconds in times.items():
                    per_step = {
                        k: round(us / args.steps, 1) for k, us in quantiles(seconds).items()
                    }
                    of_plain = round(statistics.median(seconds) / median, 4)
                    row = {"network": name, "batch": batch, "precision": precision, "case": case}
                    row |= {"compile": args.compile, "steps": args.steps, "rounds": args.rounds}
                    rows.append(facts | row | per_step | {"of_plain": of_plain})
                    print(
                        f"{name:<9}{batch:>4}  {precision:<10}{case:<12}"
                        f"{per_step['p50_us'] / 1e3:>10.2f} ms a step  {of_plain}"
                    )
    write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
