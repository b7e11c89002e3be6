"""README.md and docs/: every Python block runs, and every file that a page names exists."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import ddpm_fast
from ddpm_fast import Tuner

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/**/*.md")])
OTHERS = [
    ROOT / "benchmarks/NOTES.md",
    *ROOT.glob("examples/**/*.md"),
    *ROOT.glob("ddpm_fast/**/*.md"),
]
PYTHON = Sybil([PythonCodeBlockParser()])


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=identity)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in a folder that holds the shipped model at its path in a checkout."""
    (tmp_path / "ddpm_fast").mkdir()
    (tmp_path / "ddpm_fast/assets").symlink_to(Path(ddpm_fast.__file__).parent / "assets")
    monkeypatch.chdir(tmp_path)
    # Nothing is timed: the last candidate of everything, which for a network is the engine.
    monkeypatch.setattr(Tuner, "fastest", lambda self, key, candidates: list(candidates)[-1])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    document = PYTHON.parse(page)
    for block in document.examples():
        if page == README:  # each of its blocks runs alone
            document.namespace.clear()
        block.evaluate()


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=identity)
def test_files_named_by_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:\s]+)[)#]", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|h|cuh|cu|cpp|inl|csv|md|json))`", text):
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "ddpm_fast", page.parent)):
            missing.append(name)
    assert not missing


def test_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    documented = set(re.findall(r"^::: ddpm_fast\.(\w+)$", pages, re.MULTILINE))
    assert documented == set(ddpm_fast.__all__)


def test_speed_table_has_the_medians_of_the_results():
    table = re.findall(
        r"^\| .*\(benchmarks/results/.*|^\| .* batch .*", README.read_text(), re.MULTILINE
    )
    numbers = [float(cell) for row in table for cell in row.split("|")[2:] if cell.strip()]
    medians = set()
    for path in ROOT.glob("benchmarks/results/*.csv"):
        for row in csv.DictReader(path.open()):
            in_ms = [row.get("ms_per_step"), float(row.get("p50_us") or 0) / 1e3]
            medians |= {float(f"{float(value):.3g}") for value in in_ms if value}
    assert len(numbers) == 16
    assert not set(numbers) - medians


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
