"""The examples run and write their figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.bench.results import read_csv

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "encode_interpolate_decode.ipynb"
EXPERIMENT = EXAMPLES / "triangles" / "run.py"


def images(notebook) -> list[int]:
    """Number of images in the output of each code cell."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_the_triangle_experiment_writes_its_report(tmp_path):
    """With one training step for each schedule; the report names the machine and the date."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("scipy", reason="needs scipy")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    small = ("--quick", "--epochs", "1", "--images", "20", "--samples", "5", "--device", "cpu")
    command = [sys.executable, EXPERIMENT, *small, "--no-progress", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DDPM_FAST_CACHE": "off"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "forward.png",
        "loss_triangles-array.png",
        "reverse_triangles-array.png",
        "schedules.png",
        "starts_triangles-array.png",
    }
    rows = read_csv(tmp_path / "quality.csv")
    assert [row["schedule"] for row in rows] == ["linear", "sine wave", "x^1.5", "x^2", "x^10"]
    assert all(row["date"] and row["cpu"] and row["samples"] == "5" for row in rows)
    report = (tmp_path / "README.md").read_text()
    assert "20 images, 1 epochs of batch 64; 5 samples" in report
    assert f"{rows[0]['cores']} cores of {rows[0]['cpu']}" in report
    assert "no network has learnt triangles" in report


@pytest.mark.slow
def test_the_notebook_runs_and_draws():
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = images(notebook)
    assert sum(shown) >= 10
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert images(notebook) == shown
    (printed,) = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and "decoded: rms" in output.text
    ]
    assert float(printed.split("rms ")[1].split()[0]) < 0.1
