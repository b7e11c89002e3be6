"""`ddpm-fast bench`: operators, a forward pass and whole sampling, interleaved with baselines."""

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
from ddpm_fast.cli.group import HelpGroup, with_options
from ddpm_fast.cli.model import DTYPES, DeviceOption
from ddpm_fast.cli.output import check_file
from ddpm_fast.utils import checks
from ddpm_fast.utils.figures import require_matplotlib

bench = typer.Typer(cls=HelpGroup, no_args_is_help=True, rich_markup_mode=None)

_PACKAGES = ("diffusers", "denoising-diffusion-pytorch", "nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Options:
    """Options that the measuring commands share."""

    network: Annotated[str, typer.Option(help="Network: cifar32, ddpm256 or triangles.")] = (
        "cifar32"
    )
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images in a batch; can be repeated.", show_default="1"),
    ] = None
    device: DeviceOption = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Dtype of the network: {', '.join(DTYPES)}.",
            show_default="float16 on a GPU, float32 on a CPU",
        ),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images.", show_default="the network's own"),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measurements of each case.",
            show_default="20, of whole sampling 3",
        ),
    ] = None
    baselines: Annotated[
        bool,
        typer.Option("--peers/--no-peers", help="Also time the baselines that are installed."),
    ] = True
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which no new case starts.", show_default="none"),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the results, a .csv.",
            show_default="out/bench_<what>_<network>_<device>.csv",
        ),
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Also draw the results, as a .png.")] = None


@bench.callback()
def about() -> None:
    """Benchmarks: p20, p50 and p80 of rounds in which all cases take turns.

    Writes a CSV with device, versions, revision and date.
    """


@bench.command()
@with_options
def kernels(options: Options) -> None:
    """Time every distinct operation of a network's plan by itself.

    Normalisations, convolutions and attention, by every implementation that runs, against the copy
    bandwidth and the matrix products of the same run.
    """
    from ddpm_fast.bench.kernels import KernelBench

    setup = _Setup.make("kernels", options)
    roofline = setup.roofline()
    rows: list[dict[str, Any]] = []
    for benchmark in setup.benchmarks(KernelBench):
        _heading(_KERNELS)
        for found in benchmark.measure(options.rounds or 20, setup.limit, roofline):
            typer.echo(f"{found[0]['count']} x {found[0]['operation']}")
            _lines(_KERNELS, found)
            rows += found
            setup.write(rows)
    setup.finish(rows)


@bench.command()
@with_options
def network(
    options: Options,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the baselines by torch.compile, which takes minutes.",
        ),
    ] = True,
) -> None:
    """Time one forward pass: the engine, and baselines with the same weights and images.

    A run counts if the compiled baseline is within 15% of the published figure for the GPU.
    """
    from ddpm_fast.bench.network import NetworkBench

    setup = _Setup.make("network", options)
    roofline = setup.roofline()
    rows: list[dict[str, Any]] = []
    for benchmark in setup.benchmarks(NetworkBench, with_compiled=compile_):
        done = rows
        for found in benchmark.measure(options.rounds or 20, setup.limit, roofline):
            _heading(_NETWORK)
            _lines(_NETWORK, found)
            rows = done + found
            setup.write(rows)
        typer.echo(f"counts: {rows[-1]['counts']}")
        del benchmark  # its networks, before the next batch size builds its own
    setup.finish(rows)


@bench.command()
@with_options
def sampling(
    options: Options,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of the sampler.")] = 1000,
) -> None:
    """Time whole sampling: a batch of images from noise to the end."""
    from ddpm_fast.bench.sampling import SamplingBench

    setup = _Setup.make("sampling", options)
    rows: list[dict[str, Any]] = []
    for benchmark in setup.benchmarks(SamplingBench, steps=steps):
        for found in benchmark.measure(options.rounds or 3, setup.limit):
            _heading(_SAMPLING)
            _lines(_SAMPLING, found)
            rows += found
            setup.write(rows)
    setup.finish(rows)


@bench.command()
def plot(
    csv: Annotated[Path, typer.Argument(help="A CSV written by another bench command.")],
    png: Annotated[Path, typer.Argument(help="The figure.")],
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
    """A command's checked options and its network."""

    options: Options
    unet: Any
    dtype: torch.dtype
    out: Path
    end: float
    facts: dict[str, Any]
    left_out: dict[str, str]

    @classmethod
    def make(cls, what: str, options: Options) -> _Setup:
        """Check the options before any work; `what` names the command."""
        from ddpm_fast.bench import networks
        from ddpm_fast.bench.results import metadata

        network = checks.choice("--network", options.network, networks.NETWORKS)
        device = device_of(options.device)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dtype = options.dtype or ("float16" if on_gpu else "float32")
        checks.choice("--dtype", dtype, DTYPES)
        out = options.out or Path(f"out/bench_{what}_{network}_{device.type}.csv")
        check_file("--out", out, ".csv")
        if options.plot is not None:
            check_file("--plot", options.plot, ".png")
            require_matplotlib()
        facts = metadata(*_PACKAGES) | {
            "gpu": torch.cuda.get_device_name(device) if on_gpu else "",
            "cuda": torch.version.cuda or "",
            "cudnn": torch.backends.cudnn.version() if on_gpu else "",
            "threads": torch.get_num_threads(),
        }
        unet = networks.build(network).to(device)
        end = time.perf_counter() + (math.inf if options.limit is None else options.limit)
        return cls(options, unet, DTYPES[dtype], out, end, facts, {})

    @property
    def limit(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.end - time.perf_counter())

    def benchmarks(self, make: Callable[..., Any], **own: Any) -> Any:
        """Create a benchmark for each batch size; collect what it left out when it is done."""
        options = self.options
        for batch in dict.fromkeys(options.batch or [1]):
            steps = f"{own['steps']} steps" if "steps" in own else _name(self.dtype)
            typer.echo(f"\n{options.network}, batch {batch}, {steps}")
            size = None if options.size is None else (options.size, options.size)
            common = {"with_baselines": options.baselines, "size": size, "say": _say}
            benchmark = make(options.network, self.unet, batch, self.dtype, **common, **own)
            yield benchmark
            self.left_out.update(benchmark.left_out)
            del benchmark

    def roofline(self) -> Any:
        """Measure the device's limits and print them."""
        from ddpm_fast.bench.roofline import measure

        _say("measuring the roofline limits")
        found = measure(self.unet.device, self.dtype)
        where = self.facts["gpu"] or f"{self.facts['cpu']}, {self.facts['threads']} threads"
        typer.echo(
            f"{where}: copy {found.copy / 1e9:.1f} GB/s, matrix product {_name(self.dtype)}"
            f" {found.matmul / 1e12:.3g} TFLOP/s"
        )
        return found

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the CSV with all rows so far."""
        from ddpm_fast.bench.results import write_csv

        write_csv(self.out, [{**self.facts, **row} for row in rows])

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print what was left out and what was written, and draw the figure."""
        from ddpm_fast.bench import plots

        for name, reason in self.left_out.items():
            typer.echo(f"left out: {name}: {reason}")
        typer.echo(f"wrote {self.out}")
        if self.options.plot is not None:
            plots.draw([{**self.facts, **row} for row in rows], self.options.plot)
            typer.echo(f"wrote {self.options.plot}")


def _say(text: str) -> None:
    typer.echo(f"... {text}", err=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Columns of the tables: heading, width (left-aligned if negative), and the text of a row.
_Column = tuple[str, int, Callable[[Mapping[str, Any]], str]]


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
