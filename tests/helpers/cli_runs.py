"""Run the command line in the test's process, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from ddpm_fast import NoiseSchedule, UNet
from ddpm_fast.cli import app

T = 20
SIDE = 8  # pixels of an image's side


def tiny_unet(seed: int = 0, channels: int = 1, **options: Any) -> UNet:
    torch.manual_seed(seed)
    return UNet(
        **{"sample_size": SIDE, "in_channels": channels, "out_channels": channels} | options,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    )


def tiny_schedule() -> NoiseSchedule:
    return NoiseSchedule.linear(T, 1e-4, 0.5)


def run(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def error_of(result: Any) -> str:
    """Return the line of an error; fails if there are more lines."""
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True]
    return lines[0]


def sample(model: Path, *args: object, status: int = 0) -> Any:
    options = ("--device", "cpu", "--no-progress", "--no-engine")
    return run("sample", "--model", model, *options, *args, status=status)
