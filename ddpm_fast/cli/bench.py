"""``ddpm-fast bench``: operators, a forward pass and whole sampling, beside the peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ddpm_fast.cli.devices import device_of
from ddpm_fast.cli.model import DTYPES, DeviceOption
from ddpm_fast.cli.output import check_file
from ddpm_fast.utils.figures import require_matplotlib

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Network = Annotated[str, typer.Option(help="cifar32, ddpm256 or triangles.")]
Batch = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Images at a time; may be given several times.", show_default="1"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Of the network: {', '.join(DTYPES)}.",
        show_default="float16 on a GPU, float32 on a CPU",
    ),
]
Size = Annotated[
    int | None, typer.Option(min=1, help="Side of the images.", show_default="the network's own")
]
Baselines = Annotated[
    bool,
    typer.Option("--peers/--no-peers", help="Also time what is replaced, where it is installed."),
]
Limit = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds after which nothing further is begun.", show_default="none"),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The CSV.", show_default="out/bench_<what>_<network>_<device>.csv"),
]
Plot = Annotated[Path | None, typer.Option(help="Also draw the results, as a .png.")]

_PACKAGES = ("diffusers", "denoising-diffusion-pytorch", "nvidia-cudnn-frontend")
# Columns of the tables: heading, width (left-aligned where negative), and what makes the text.
_Column = tuple[str, int, Callable[[Mapping[str, Any]], str]]


@bench.callback()
def about() -> None:
    """Benchmarks: p20, p50 and p80 of rounds in which all cases take turns.

    Writes a CSV with device, versions, revision and date.
    """


@bench.command()
def kernels(
    network: Network = "cifar32",
    batch: Batch = None,
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 20,
    baselines: Baselines = True,
    limit: Limit = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time every distinct operation of a network's plan by itself.

    Normalisations, convolutions and attention, by every implementation that runs, against the copy
    bandwidth and the matrix products of the same run.
    """
    from ddpm_fast.bench import kernels as benchmark

    setup = _Setup.make("kernels", network, batch, device, dtype, out, plot, limit)
    roofline = setup.roofline()
    rows: list[dict[str, Any]] = []
    for number in setup.batches:
        typer.echo(f"\n{network}, batch {number}, {_name(setup.dtype)}")
        _heading(_KERNELS)
        for found in benchmark.measure(
            network,
            setup.unet,
            number,
            setup.dtype,
            roofline,
            baselines=baselines,
            rounds=rounds,
            limit=setup.limit,
            size=_size(size),
        ):
            typer.echo(f"{found[0]['count']} x {found[0]['operation']}")
            rows += found
            _lines(_KERNELS, found)
            setup.write(rows)
    setup.finish(rows, {})


@bench.command()
def network(
    network: Network = "cifar32",
    batch: Batch = None,
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 20,
    baselines: Baselines = True,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Peers by torch.compile, which takes minutes to build."
        ),
    ] = True,
    limit: Limit = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time one forward pass: the engine, and its peers with the same weights and images.

    A run counts where the compiled peer is within 15% of the published figure for the GPU.
    """
    from ddpm_fast.bench.network import NetworkBench

    setup = _Setup.make("network", network, batch, device, dtype, out, plot, limit)
    roofline = setup.roofline()
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for number in setup.batches:
        typer.echo(f"\n{network}, batch {number}, {_name(setup.dtype)}")
        made = NetworkBench(
            network,
            setup.unet,
            number,
            setup.dtype,
            with_baselines=baselines,
            with_compiled=compile_,
            size=_size(size),
            say=_say,
        )
        done = rows
        for found in made.measure(roofline, rounds, setup.limit, setup.gpu):
            _heading(_NETWORK)
            _lines(_NETWORK, found)
            rows = done + found
            setup.write(rows)
        left_out |= made.left_out
        typer.echo(f"counts: {rows[-1]['counts']}")
        del made
    setup.finish(rows, left_out)


@bench.command()
def sampling(
    network: Network = "cifar32",
    batch: Batch = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of each chain.")] = 1000,
    device: DeviceOption = None,
    dtype: Dtype = None,
    size: Size = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each job.")] = 3,
    baselines: Baselines = True,
    limit: Limit = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time whole jobs: a batch of images from noise to the end."""
    from ddpm_fast.bench.sampling import SamplingBench

    setup = _Setup.make("sampling", network, batch, device, dtype, out, plot, limit)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for number in setup.batches:
        typer.echo(f"\n{network}, batch {number}, {steps} steps")
        made = SamplingBench(
            network,
            setup.unet,
            number,
            steps,
            setup.dtype,
            with_baselines=baselines,
            size=_size(size),
            say=_say,
        )
        found = made.measure(rounds, setup.limit)
        _heading(_SAMPLING)
        _lines(_SAMPLING, found)
        rows += found
        left_out |= made.left_out
        setup.write(rows)
    setup.finish(rows, left_out)


@bench.command()
def plot(
    csv: Annotated[Path, typer.Argument(help="What another bench command has written.")],
    png: Annotated[Path, typer.Argument(help="The picture.")],
) -> None:
    """Draw the results in a CSV: a roofline of kernels, bars of everything else."""
    from ddpm_fast.bench import plots
    from ddpm_fast.bench.results import read_csv

    check_file("PNG", png, ".png")
    require_matplotlib()
    plots.draw(read_csv(csv), png)
    typer.echo(f"wrote {png}")


@dataclass(frozen=True)
class _Setup:
    """What all commands check before they begin to work."""

    what: str
    unet: Any
    batches: list[int]
    dtype: torch.dtype
    out: Path
    plot: Path | None
    deadline: float
    facts: dict[str, Any]

    @classmethod
    def make(
        cls,
        what: str,
        network: str,
        batch: list[int] | None,
        device: str | None,
        dtype: str | None,
        out: Path | None,
        plot: Path | None,
        limit: float | None,
    ) -> _Setup:
        from ddpm_fast.bench import networks
        from ddpm_fast.bench.results import metadata

        if network not in networks.NETWORKS:
            raise ValueError(f"--network must be {', '.join(networks.NETWORKS)}; got {network!r}")
        place = device_of(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        chosen = dtype or ("float16" if place.type == "cuda" else "float32")
        if chosen not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}; got {dtype!r}")
        if out is None:
            out = Path(f"out/bench_{what}_{network}_{place.type}.csv")
        check_file("--out", out, ".csv")
        if plot is not None:
            check_file("--plot", plot, ".png")
            require_matplotlib()
        facts = metadata(*_PACKAGES) | {
            "gpu": torch.cuda.get_device_name(place) if place.type == "cuda" else "",
            "cuda": torch.version.cuda or "",
            "cudnn": torch.backends.cudnn.version() if place.type == "cuda" else "",
            "threads": torch.get_num_threads(),
        }
        unet = networks.build(network).to(place)
        end = time.perf_counter() + (math.inf if limit is None else limit)
        batches = list(dict.fromkeys(batch or [1]))
        return cls(what, unet, batches, DTYPES[chosen], out, plot, end, facts)

    @property
    def limit(self) -> float:
        """The seconds that are left."""
        return max(0.0, self.deadline - time.perf_counter())

    @property
    def gpu(self) -> str:
        """The GPU's name; empty on a CPU."""
        return str(self.facts["gpu"])

    def roofline(self) -> Any:
        """The device's, measured now and shown."""
        from ddpm_fast.bench.roofline import measure

        _say("measuring the ceilings")
        found = measure(self.unet.device, self.dtype)
        where = self.gpu or f"{self.facts['cpu']}, {self.facts['threads']} threads"
        typer.echo(
            f"{where}: copy {found.copy / 1e9:.1f} GB/s, matrix product {_name(self.dtype)}"
            f" {found.matmul / 1e12:.3g} TFLOP/s"
        )
        return found

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The CSV with all rows so far."""
        from ddpm_fast.bench.results import write_csv

        write_csv(self.out, [{**self.facts, **row} for row in rows])

    def finish(self, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
        """Say what was left out and what was written, and draw the picture."""
        from ddpm_fast.bench import plots

        for name, reason in left_out.items():
            typer.echo(f"left out: {name}: {reason}")
        typer.echo(f"wrote {self.out}")
        if self.plot is not None:
            plots.draw([{**self.facts, **row} for row in rows], self.plot)
            typer.echo(f"wrote {self.plot}")


def _say(text: str) -> None:
    typer.echo(f"... {text}", err=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(side: int | None) -> tuple[int, int] | None:
    return None if side is None else (side, side)


def _heading(columns: Sequence[_Column]) -> None:
    typer.echo("  ".join(_cell(title, width) for title, width, _ in columns).rstrip())


def _lines(columns: Sequence[_Column], rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        typer.echo("  ".join(_cell(text(row), width) for _, width, text in columns).rstrip())


def _cell(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _percent(column: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[column] == "" else f"{row[column]:.1%}"


def _text(column: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[column])


def _ms(column: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[column] / 1e3:.3f}"


_KERNELS: list[_Column] = [
    ("  by", -28, lambda row: f"  {row['implementation']}"),
    ("p50 us", 12, lambda row: f"{row['p50_us']:.2f}"),
    ("GB/s", 10, lambda row: f"{row['GB_per_s']:.1f}"),
    ("of copy", 8, _percent("of_copy")),
    ("TFLOP/s", 9, _text("TFLOP_per_s")),
    ("of matmul", 9, _percent("of_matmul")),
    ("error", 8, _text("error")),
]
_NETWORK: list[_Column] = [
    ("case", -50, _text("case")),
    ("dtype", -8, _text("dtype")),
    ("p50 ms", 11, _ms("p50_us")),
    ("speedup", 7, _text("speedup")),
    ("of matmul", 9, _percent("of_matmul")),
    ("peak MB", 9, _text("peak_MB")),
    ("error", 8, _text("error")),
    ("note", -4, _text("note")),
]
_SAMPLING: list[_Column] = [
    ("case", -30, _text("case")),
    ("dtype", -8, _text("dtype")),
    ("p50 ms", 12, _ms("p50_us")),
    ("ms a step", 10, lambda row: f"{row['ms_per_step']:.3f}"),
    ("images/s", 10, lambda row: f"{row['images_per_s']:.3f}"),
    ("of network", 10, _text("of_network")),
    ("speedup", 7, _text("speedup")),
    ("images differ", 13, _text("images_differ")),
    ("note", -4, _text("note")),
]
