"""Whether a plan fits into the memory that is free, and how large a batch would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_fast.engine.plan.memory import plan_offsets
from ddpm_fast.engine.plan.operations import Program


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new plan could have; None where that is not known.

    On a GPU what is free, and what torch holds without using it; on a CPU what Linux says it could
    give, within the limit of the control group.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _number(path: str) -> int | None:
    """The number in a file; None where there is none."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def needed_bytes(program: Program) -> int:
    """The values of a call, its input and output, and the engine's copies of the weights."""
    lifetimes = program.lifetimes()
    _, arena = plan_offsets(
        {i: lifetimes[id(v)] for i, v in enumerate(program.values) if not v.external}
    )
    external = sum(value.nbytes for value in program.values if value.external)
    weights = sum(op.weight_elements * program.dtype.itemsize for op in program.operations)
    return arena + external + weights


def check(
    program: Program, lowered: Callable[[int], Program], device: torch.device, more: int
) -> None:
    """Raise MemoryError where a program does not fit.

    lowered: the same for another batch size. more: bytes needed beside it, whatever the batch.
    """
    batch = program.batch
    need, free = needed_bytes(program) + more, free_bytes(device)
    if free is None or need <= free:
        return
    fits = _largest(lambda size: needed_bytes(lowered(size)) + more <= free, batch)
    advice = f"a micro-batch of {fits} would fit" if fits else "not even one image would fit"
    raise MemoryError(
        f"batch {batch} needs {need / 1e9:.3g} GB on {device}, {free / 1e9:.3g} GB are free;"
        f" {advice}"
    )


def _largest(fits: Callable[[int], bool], end: int) -> int:
    """The largest size in [0, end) that fits, found by halving; 0 always does."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
