"""Figures of results: a roofline of the operations, and bars of a run and its baselines.

matplotlib is imported when a figure is drawn. Rows are those of a benchmark or of its CSV.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ddpm_fast.utils.figures import ACCENT, FAINT, INK, add_title, new_figure, save_figure

Rows = Sequence[Mapping[str, Any]]

OURS, BASELINE = ACCENT, "#b8bec7"
KINDS = {
    "group_norm": ("GroupNorm + SiLU", "#d97706"),
    "conv 3x3": ("convolution 3x3", "#0f766e"),
    "conv 1x1": ("convolution 1x1", "#2563eb"),
    "attention": ("attention", "#be185d"),
}
_NEEDED = {"kernels": "arithmetic", "network": "build_s", "sampling": "ms_per_step"}


def kind_of(rows: Rows) -> str:
    """Return the benchmark that rows come from: kernels, network or sampling.

    Raises:
        ValueError: the rows come from no benchmark.
    """
    for kind, column in _NEEDED.items():
        if rows and column in rows[0]:
            return kind
    raise ValueError(f"rows must be of one of the benchmarks {', '.join(_NEEDED)}")


def draw(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Draw rows as their kind requires (`roofline` or `bars`) and write a PNG atomically.

    Args:
        rows: rows of one benchmark.
        path: the PNG.

    Raises:
        ValueError: the rows come from no benchmark.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = roofline(rows) if kind_of(rows) == "kernels" else bars(rows)
    save_figure(figure, path)


def roofline(rows: Rows) -> Any:
    """Draw the fastest implementation of each operation, and the limits of the run.

    The horizontal axis shows operations for each byte that must move, the vertical axis operations
    per second, including those outside matrix products. The area of a point is its share of the
    time. Of several batch sizes the largest is drawn.

    Args:
        rows: rows of the benchmark of kernels.

    Returns:
        A matplotlib Figure.
    """
    largest = max(rows, key=lambda row: _number(row, "batch"))["batch"]
    rows = [row for row in rows if row["batch"] == largest]
    copy = _number(rows[0], "copy_GB_per_s") * 1e9
    matmul = _number(rows[0], "matmul_TFLOP_per_s") * 1e12
    unit, scale = ("TFLOP/s", 1e12) if matmul >= 1e12 else ("GFLOP/s", 1e9)
    points = _points(rows)
    figure, axes = new_figure(8.4, 5.2)
    left = min([p.across for p in points] + [matmul / copy]) / 2.5
    right = max([p.across for p in points] + [matmul / copy]) * 3
    xs = [left, matmul / copy, right]
    ys = [min(x * copy, matmul) / scale for x in xs]
    axes.plot(xs, ys, color=INK, linewidth=1.6, zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for kind, (label, color) in KINDS.items():
        selected = [point for point in points if point.kind == kind]
        if not selected:
            continue
        axes.scatter(
            [point.across for point in selected],
            [point.rate / scale for point in selected],
            s=[24 + 2400 * point.share for point in selected],
            color=color,
            alpha=0.65,
            edgecolors="white",
            linewidths=0.8,
            label=f"{label}, {sum(point.share for point in selected):.0%} of the time",
            zorder=3,
        )
    axes.set_xlim(left, right)
    axes.set_ylim(
        min([p.rate for p in points] + [left * copy]) / scale / 2,
        max([p.rate for p in points] + [matmul]) / scale * 2.2,
    )
    note = {"color": INK, "fontsize": 9, "va": "bottom", "zorder": 4}
    axes.text(left * 1.1, ys[0] * 3.5, f"copy {_rate(copy / 1e9, 'GB/s')}", **note)
    # Above the ridge; points beyond the limit are further to the right.
    axes.text(xs[1], ys[-1] * 1.06, f"matrix product {_rate(matmul / scale, unit)}", **note)
    axes.set_xlabel("operations for each byte that must move")
    axes.set_ylabel(unit)
    legend = axes.legend(loc="lower right", frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    _finish(figure, axes, f"Operations of {_network(rows)}", rows)
    return figure


class _Point(NamedTuple):
    across: float  # operations for each byte
    rate: float  # operations a second
    kind: str
    share: float  # of the time of all points


def _points(rows: Rows) -> list[_Point]:
    """Return the fastest implementation of this package for each operation."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["role"] == "ours":
            found = best.setdefault(row["operation"], row)
            if _number(row, "p50_us") < _number(found, "p50_us"):
                best[row["operation"]] = row
    times = {name: _number(r, "count") * _number(r, "p50_us") for name, r in best.items()}
    return [
        _Point(
            _number(row, "arithmetic") / _number(row, "nbytes"),
            _number(row, "arithmetic") / _number(row, "p50_us") * 1e6,
            row["kind"],
            times[name] / sum(times.values()),
        )
        for name, row in best.items()
    ]


def bars(rows: Rows) -> Any:
    """Draw one bar for each case: ms for each step of the network, with p20 to p80.

    Args:
        rows: rows of the benchmark of networks or of sampling; each batch size is one panel.

    Returns:
        A matplotlib Figure.
    """
    sampling = kind_of(rows) == "sampling"
    batches = list(dict.fromkeys(str(row["batch"]) for row in rows))
    counts = [sum(str(row["batch"]) == batch for row in rows) for batch in batches]
    figure, panels = new_figure(8.4, 1.5 + 0.42 * sum(counts) + 0.5 * len(batches), counts)
    for axes, batch in zip(panels, batches, strict=True):
        selected = [row for row in rows if str(row["batch"]) == batch]
        selected.sort(key=lambda row: _number(row, "p50_us"))
        steps = _number(selected[0], "steps") if sampling else 1.0
        middle = [_number(row, "p50_us") / steps / 1e3 for row in selected]
        low = [
            m - _number(r, "p20_us") / steps / 1e3 for m, r in zip(middle, selected, strict=True)
        ]
        high = [
            _number(r, "p80_us") / steps / 1e3 - m for m, r in zip(middle, selected, strict=True)
        ]
        positions = range(len(selected))
        axes.barh(
            positions,
            middle,
            color=[OURS if row["role"] == "ours" else BASELINE for row in selected],
            height=0.66,
            zorder=2,
        )
        axes.errorbar(
            middle, positions, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1, zorder=3
        )
        widest = max(m + h for m, h in zip(middle, high, strict=True))
        for position, value, spread in zip(positions, middle, high, strict=True):
            axes.text(
                value + spread + widest / 80,
                position,
                f"{value:.3g} ms",
                va="center",
                color=INK,
                fontsize=9,
            )
        axes.set_xlim(0, widest * 1.13)
        axes.set_yticks(positions, [_label(row) for row in selected], fontsize=9)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_title(f"batch {batch}", loc="left", fontsize=10, color=FAINT)
    panels[-1].set_xlabel("ms a step, smaller is better (p50; lines from p20 to p80)")
    what = "Sampling with" if sampling else "A forward pass of"
    _finish(figure, panels[0], f"{what} {rows[0]['network']}", rows)
    return figure


def _label(row: Mapping[str, Any]) -> str:
    other = " (another network)" if "another network" in str(row["note"]) else ""
    return f"{row['case']}{other}  {row['dtype']}"


def _finish(figure: Any, axes: Any, title: str, rows: Rows) -> None:
    """Add the title, and the device, versions and date below the axes."""
    row = rows[0]
    on_gpu = row.get("device") == "cuda"
    where = row.get("gpu") if on_gpu else f"{row.get('cpu')}, {row.get('cores')} cores"
    parts = [str(row.get("date", ""))[:10], str(where), f"torch {row.get('torch')}"]
    if row.get("diffusers"):
        parts.append(f"diffusers {row['diffusers']}")
    if row.get("revision"):
        parts.append(f"revision {row['revision']}")
    add_title(figure, title, ", ".join(parts))


def _network(rows: Rows) -> str:
    row = rows[0]
    return f"{row['network']}, batch {row['batch']}, {row['dtype']}"


def _number(row: Mapping[str, Any], column: str) -> float:
    """Return a number of a row, or of a row of a CSV; ValueError for anything else."""
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"column {column} must hold numbers; got {row.get(column)!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"column {column} must hold finite numbers; got {value}")
    return value


def _rate(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
