"""``ddpm-fast verify``: the kernels against the float64 reference."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def verify(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may be given several times.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every check as JSON instead of the table.")
    ] = False,
) -> None:
    """Check every kernel against the float64 reference.

    All operators, backends, dtypes and layouts.

    Exit status 1 on any miss. A backend that cannot run here is named with the reason.
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
