"""`ddpm-fast verify`: compare the kernels to the float64 reference."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def verify(
    backend: Annotated[
        list[str] | None, typer.Option(help="Check this backend only; can be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every check as JSON.")] = False,
) -> None:
    """Compare every kernel to the float64 reference: all operators, backends, dtypes and layouts.

    The exit status is 1 if a check fails. For backends that are not available the reason is shown.
    """
    from ddpm_fast.verify import as_table
    from ddpm_fast.verify import verify as run_checks

    checks, skipped = run_checks(tuple(backend) if backend else None)
    if as_json:
        document = {"checks": [check.as_dict() for check in checks], "not_run": skipped}
        typer.echo(json.dumps(document, indent=1))
    else:
        typer.echo(as_table(checks, skipped))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
