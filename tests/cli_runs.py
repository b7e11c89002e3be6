"""Runs of the command line inside the test's process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from ddpm_fast.cli import app


def run(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def error_of(result: Any) -> str:
    """The one line of an error."""
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True]
    return lines[0]
