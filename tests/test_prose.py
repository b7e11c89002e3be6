"""Wording of the docstrings of the package; ruff checks their form."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FILES = sorted((Path(__file__).parents[1] / "ddpm_fast").rglob("*.py"))
CLAUSE = re.compile(r"(What|Whether|Which|Where|How|That)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_docstrings_begin_with_a_noun_or_a_verb():
    found = [
        f"{path}:{node.body[0].lineno}: {text}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, DOCUMENTED) and CLAUSE.match(text := ast.get_docstring(node) or "")
    ]
    assert not found


def test_names_stand_in_single_backticks():
    assert not [str(path) for path in FILES if "``" in path.read_text()]
