"""Check that a plan fits into the free memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_fast.engine.plan.memory import plan_offsets
from ddpm_fast.engine.plan.operations import Program


def free_bytes(device: torch.device) -> int | None:
    """Return the memory available to a new plan; None if unknown.

    On a GPU that is the free memory and the memory that torch holds unused; on a CPU what Linux
    reports as available, within the limit of the control group.
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
    """Return the number in a file; None without one."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def needed_bytes(program: Program) -> int:
    """Return the bytes of a call's values, its input and output, and the engine's weight copies."""
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
    """Check that a program fits into the free memory.

    Args:
        program: the program.
        lowered: returns the program for another batch size.
        device: the device.
        more: bytes needed in addition, for any batch size.

    Raises:
        MemoryError: the program does not fit; the message gives the largest batch size that does.
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
    """Return the largest size in [0, end) that fits, by bisection; 0 always fits."""
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
