"""Errors, help and shared options of all commands."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

_REPORTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)


class HelpGroup(TyperGroup):
    """A group of commands whose help shows the whole summary of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and the summary of each command."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [
            (name, " ".join((command.help or "").split("\n\n")[0].split()))
            for name, command in commands.items()
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Commands(HelpGroup):
    """The commands of `ddpm-fast`: an error of the package is one line, and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; with `--debug`, errors are raised with their traceback."""
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
    # PyTorch appends a C++ stack trace.
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"note: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a dataclass by the dataclass's fields.

    A field is either annotated with a `typer.Option`, or has these keys in its metadata: `help`;
    `min`, the smallest value; `flag`, for an option without a value; `none`, the value on the
    command line that stands for None.

    Args:
        function: A command, whose parameters are options, arguments or dataclasses of options.

    Returns:
        The command for typer; it calls `function` with instances of the dataclasses.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _parameters(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def command(**arguments: Any) -> None:
        for name, kind in groups.items():
            values = {field.name: arguments.pop(field.name) for field in fields(kind)}
            for field in fields(kind):
                if "none" in field.metadata and values[field.name] == field.metadata["none"]:
                    values[field.name] = None
            arguments[name] = kind(**values)
        function(**arguments)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_annotation(field, hints[field.name]),
        )
        for field in fields(kind)
    ]


def _annotation(field: Field[Any], hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return hint
    about = field.metadata
    if isinstance(field.default, bool | int | float | str):
        hint = type(field.default)
    elif field.default is None:
        # Of one type only: a Literal of names, or None.
        names = get_args(get_args(hint)[0])
        hint = (type(names[0]) if names else get_args(hint)[0]) | None
    flags = [f"--{field.name.replace('_', '-')}"] if about.get("flag") else []
    shown: Any = "none" if field.default is None else True
    option = typer.Option(*flags, help=about["help"], min=about.get("min"), show_default=shown)
    return Annotated[hint, option]
