"""What every benchmark writes beside its numbers, and how: one CSV, replaced in one step."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ddpm_fast.utils.files import atomic_write

# A checkout has the benchmarks beside the package; an installed package has not.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*args: str) -> str:
    """Git's answer; raises CalledProcessError or OSError where there is none."""
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _revision() -> str:
    if not RESULTS.is_dir():
        return ""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        # The results themselves do not make a later benchmark's code dirty.
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+dirty" if changed else "")


def metadata(*packages: str) -> dict[str, str | int]:
    """Date (UTC, ISO 8601), processor, cores this process may use, GPU, versions, revision.

    packages: further ones whose versions are wanted, each in a column of its name.

    gpu, revision and the version of a package are "" where there is none. The revision is git's
    short hash of the checkout, with "+dirty" where anything but benchmarks/results differs from it.
    No host name, user or path.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": _cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        **{package: _version(package) for package in packages},
        "revision": _revision(),
    }


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV with a header, columns in the order of the first row's keys.

    Written beside `path` and renamed onto it, so no partial file carries the name; folders are
    made as needed. ValueError without rows or where keys differ, OSError from the disk.
    """
    if not rows:
        raise ValueError("rows must hold at least one row; got none")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if set(row) != set(columns):
            raise ValueError(f"rows[{number}] must have the keys {columns}; got {list(row)}")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV with a header. ValueError where there are none, OSError from the disk."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
