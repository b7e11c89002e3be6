"""Metadata and CSV files of benchmark results."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from ddpm_fast.engine.autotune.cache import package_version, processor
from ddpm_fast.utils.files import atomic_write

# Only a checkout has the benchmarks beside the package.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*args: str) -> str:
    """Return git's output; raises CalledProcessError or OSError."""
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _revision() -> str:
    if not RESULTS.is_dir():
        return ""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        # New results do not make the code dirty.
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+dirty" if changed else "")


def metadata(*packages: str) -> dict[str, str | int]:
    """Return date (UTC, ISO 8601), processor, available cores, GPU, versions and revision.

    gpu, revision and the version of a package are "" if there is none. The revision is git's short
    hash of the checkout, with "+dirty" if anything but benchmarks/results differs from it. Host
    names, users and paths are not recorded.

    Args:
        *packages: further packages whose versions are recorded, in columns of their names.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": _cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "numpy": package_version("numpy"),
        **{package: package_version(package) for package in packages},
        "revision": _revision(),
    }


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV with a header, in the order of the first row's keys.

    The file is replaced atomically; missing folders are created.

    Args:
        path: the CSV.
        rows: rows with the same keys.

    Raises:
        ValueError: there are no rows, or their keys differ.
        OSError: the file cannot be written.
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
    """Read the rows of a CSV with a header.

    Raises:
        ValueError: there are no rows.
        OSError: the file cannot be read.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
