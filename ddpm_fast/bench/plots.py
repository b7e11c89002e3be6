"""Pictures of results: a roofline of the operations, and bars of a run and its peers.

matplotlib is imported when a picture is drawn. Rows are those of a benchmark or of its CSV.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ddpm_fast.utils.figures import ACCENT, FAINT, INK, entitle, new_figure, save_figure

Rows = Sequence[Mapping[str, Any]]

OURS, PEER = ACCENT, "#b8bec7"
KINDS = {
    "group_norm": ("GroupNorm + SiLU", "#d97706"),
    "conv 3x3": ("convolution 3x3", "#0f766e"),
    "conv 1x1": ("convolution 1x1", "#2563eb"),
    "attention": ("attention", "#be185d"),
}
_NEEDED = {"kernels": "arithmetic", "network": "build_s", "sampling": "ms_per_step"}


def kind_of(rows: Rows) -> str:
    """Which benchmark rows come from: kernels, network or sampling. ValueError for others."""
    for kind, column in _NEEDED.items():
        if rows and column in rows[0]:
            return kind
    raise ValueError("the rows are of none of the benchmarks " + ", ".join(_NEEDED))


def draw(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Draw rows as fits their kind (`roofline` or `bars`), a PNG that is written whole.

    Raises ValueError for rows of no benchmark, ImportError, OSError from the disk.
    """
    figure = roofline(rows) if kind_of(rows) == "kernels" else bars(rows)
    save_figure(figure, path)


def roofline(rows: Rows) -> Any:
    """Every operation's fastest implementation of ours, and the ceilings of the run.

    Across: operations for each byte that must move; up: operations a second, those beside the
    matrix products included. An area is the share of the time that all of them take. Of several
    batches the largest is drawn. Returns a matplotlib Figure.
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
        mine = [point for point in points if point.kind == kind]
        if not mine:
            continue
        axes.scatter(
            [point.across for point in mine],
            [point.rate / scale for point in mine],
            s=[24 + 2400 * point.share for point in mine],
            color=color,
            alpha=0.65,
            edgecolors="white",
            linewidths=0.8,
            label=f"{label}, {sum(point.share for point in mine):.0%} of the time",
            zorder=3,
        )
    axes.set_xlim(left, right)
    axes.set_ylim(
        min([p.rate for p in points] + [left * copy]) / scale / 2,
        max([p.rate for p in points] + [matmul]) / scale * 2.2,
    )
    note = {"color": INK, "fontsize": 9, "va": "bottom", "zorder": 4}
    axes.text(left * 1.1, ys[0] * 3.5, f"copy {_rate(copy / 1e9, 'GB/s')}", **note)
    # Over the ridge: what exceeds the ceiling lies further to the right.
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
    """The fastest implementation of ours of each operation."""
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
    """One bar for each case of a run, ms for each step of the network, and p20 to p80.

    Rows of several batches become several panels. Returns a matplotlib Figure.
    """
    sampling = kind_of(rows) == "sampling"
    batches = list(dict.fromkeys(str(row["batch"]) for row in rows))
    counts = [sum(str(row["batch"]) == batch for row in rows) for batch in batches]
    figure, panels = new_figure(8.4, 1.5 + 0.42 * sum(counts) + 0.5 * len(batches), counts)
    for axes, batch in zip(panels, batches, strict=True):
        mine = [row for row in rows if str(row["batch"]) == batch]
        mine.sort(key=lambda row: _number(row, "p50_us"))
        steps = _number(mine[0], "steps") if sampling else 1.0
        middle = [_number(row, "p50_us") / steps / 1e3 for row in mine]
        low = [m - _number(r, "p20_us") / steps / 1e3 for m, r in zip(middle, mine, strict=True)]
        high = [_number(r, "p80_us") / steps / 1e3 - m for m, r in zip(middle, mine, strict=True)]
        places = range(len(mine))
        axes.barh(
            places,
            middle,
            color=[OURS if row["role"] == "ours" else PEER for row in mine],
            height=0.66,
            zorder=2,
        )
        axes.errorbar(
            middle, places, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1, zorder=3
        )
        widest = max(m + h for m, h in zip(middle, high, strict=True))
        for place, value, spread in zip(places, middle, high, strict=True):
            axes.text(
                value + spread + widest / 80,
                place,
                f"{value:.3g} ms",
                va="center",
                color=INK,
                fontsize=9,
            )
        axes.set_xlim(0, widest * 1.13)
        axes.set_yticks(places, [_label(row) for row in mine], fontsize=9)
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
    """The title, and below everything where and when it was measured."""
    row = rows[0]
    on_gpu = row.get("device") == "cuda"
    where = row.get("gpu") if on_gpu else f"{row.get('cpu')}, {row.get('cores')} cores"
    parts = [str(row.get("date", ""))[:10], str(where), f"torch {row.get('torch')}"]
    if row.get("diffusers"):
        parts.append(f"diffusers {row['diffusers']}")
    if row.get("revision"):
        parts.append(f"revision {row['revision']}")
    entitle(figure, title, ", ".join(parts))


def _network(rows: Rows) -> str:
    row = rows[0]
    return f"{row['network']}, batch {row['batch']}, {row['dtype']}"


def _number(row: Mapping[str, Any], column: str) -> float:
    """A number of a row, as it is or as a CSV has it. ValueError for anything else."""
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"column {column} must hold numbers; got {row.get(column)!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"column {column} must hold finite numbers; got {value}")
    return value


def _rate(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
