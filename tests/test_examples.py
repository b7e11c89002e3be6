"""The examples run, and show what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "encode_interpolate_decode.ipynb"


def pictures(notebook) -> list[int]:
    """How many pictures each cell of code shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_the_notebook_runs_and_draws():
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = pictures(notebook)
    assert sum(shown) >= 10
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert pictures(notebook) == shown
    (printed,) = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and "decoded: rms" in output.text
    ]
    assert float(printed.split("rms ")[1].split()[0]) < 0.1
