"""Style of the package's figures, and how they are written.

matplotlib is imported when a figure is created.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm_fast.utils.files import atomic_write
from ddpm_fast.utils.optional import require

INK, FAINT, GRID, ACCENT = "#22272e", "#6b7280", "#e5e7eb", "#0f766e"
MOST_BYTES = 200_000  # of a PNG file with all its colours
_DPI = 150


def require_matplotlib() -> Any:
    """Import matplotlib, drawing without a screen.

    Raises:
        ImportError: It is not installed.
    """
    matplotlib: Any = require("matplotlib", "a figure")
    matplotlib.use("Agg")
    return matplotlib


def new_figure(width: float, height: float, counts: Sequence[int] | None = None) -> tuple[Any, Any]:
    """Create a figure in the style of the package.

    Args:
        width: Width in inches.
        height: Height in inches.
        counts: Relative heights of axes below each other. None: one axes.

    Returns:
        The figure and its axes: one, or a list for `counts`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    make = importlib.import_module("matplotlib.figure").Figure
    figure = make(figsize=(width, height), layout="constrained", facecolor="white")
    if counts is None:
        found = [figure.subplots()]
    else:
        grid = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)
        found = [row[0] for row in grid]
    for axes in found:
        axes.set_facecolor("white")
        axes.grid(True, color=GRID, linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, labelcolor=INK, which="both", length=0)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(GRID)
    return figure, found[0] if counts is None else found


def add_title(figure: Any, title: str, below: str) -> None:
    """Add a title, and a line in small print at the bottom.

    Args:
        figure: A figure of `new_figure`.
        title: Text of the title.
        below: Text at the bottom.
    """
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(below, x=0.01, ha="left", fontsize=8, color=FAINT)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG with `files.atomic_write`; creates missing folders.

    Args:
        figure: A figure of `new_figure`.
        path: Name of the file; an existing file is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(_smaller(buffer.getvalue()))


def _smaller(png: bytes) -> bytes:
    """Reduce a PNG to 256 colours if it is larger than MOST_BYTES."""
    if len(png) <= MOST_BYTES:
        return png
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
