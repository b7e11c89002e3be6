"""The command line `ddpm-fast`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ddpm_fast import __version__
from ddpm_fast.cli.bench import bench as bench_app
from ddpm_fast.cli.bpd import bpd as bpd_command
from ddpm_fast.cli.group import Commands, with_options
from ddpm_fast.cli.info import info as info_command
from ddpm_fast.cli.latents import decode, encode, interpolate
from ddpm_fast.cli.noise import noise as noise_command
from ddpm_fast.cli.sample import sample as sample_command
from ddpm_fast.cli.train import train as train_command
from ddpm_fast.cli.verify import verify as verify_command

app = typer.Typer(
    cls=Commands,
    name="ddpm-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"ddpm_fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train denoising diffusion models and sample from them.

    An error is one line on stderr, and exit status 2.
    """


for command in (
    *(sample_command, train_command, encode, decode, interpolate),
    *(bpd_command, noise_command, verify_command, info_command),
):
    app.command()(with_options(command))
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    sys.exit(app(prog_name="ddpm-fast"))
