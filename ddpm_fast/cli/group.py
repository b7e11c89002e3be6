"""What all commands share: errors and warnings as one line each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

_REPORTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)


class Commands(TyperGroup):
    """A group whose commands end an error of the package as ``error: ...`` with exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; ``--debug`` lets errors through, with their traceback."""
        with _warnings_as_notes():
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except _REPORTED as error:
                if ctx.params.get("debug"):
                    raise
                typer.echo(f"error: {_one_line(error)}", err=True)
                raise typer.Exit(2) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    # What PyTorch adds below is where in its C++ it happened.
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"note: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
