"""Report of a plan: a table of operations with shapes, bytes, FLOPs and implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpm_fast.engine.plan.binding import Step
from ddpm_fast.engine.plan.operations import Program


@dataclass(frozen=True)
class PlannedOperation:
    """One operation of the report.

    Attributes:
        name: path of the module.
        kind: short description.
        inputs: shapes of the values read.
        output: shape of the main result.
        implementation: name of the chosen implementation.
        nbytes: bytes that must be moved, weights included.
        flops: multiplications and additions of its matrix products.
        offset: offset of the result in the block of memory; None for the network's output.
    """

    name: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    implementation: str
    nbytes: int
    flops: int
    offset: int | None


@dataclass(frozen=True)
class EnginePlan:
    """Operations of an engine in order, and their memory. `print` shows a table.

    Attributes:
        operations: the operations.
        arena_bytes: size of the memory of all intermediate values and workspaces.
        values_bytes: size that the values would take without reuse of memory.
        weight_bytes: size of the engine's copies of the weights.
        table_bytes: size of the embeddings of all timesteps.
    """

    operations: tuple[PlannedOperation, ...]
    arena_bytes: int
    values_bytes: int
    weight_bytes: int
    table_bytes: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of one forward pass of the batch."""
        return sum(operation.flops for operation in self.operations)

    @property
    def nbytes(self) -> int:
        """Bytes that one forward pass must move."""
        return sum(operation.nbytes for operation in self.operations)

    def __str__(self) -> str:
        rows = [("", "operation", "kind", "in", "out", "MB", "GFLOP", "by", "at MB")]
        for i, op in enumerate(self.operations):
            inputs = " ".join("x".join(map(str, shape)) for shape in op.inputs)
            rows.append(
                (
                    str(i),
                    op.name,
                    op.kind,
                    inputs,
                    "x".join(map(str, op.output)),
                    f"{op.nbytes / 1e6:.3f}",
                    f"{op.flops / 1e9:.3f}" if op.flops else "",
                    op.implementation,
                    "" if op.offset is None else f"{op.offset / 1e6:.3f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = {0, 5, 6, 8}
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(
            [
                *lines,
                f"{len(self.operations)} operations, {self.flops / 1e9:.2f} GFLOP,"
                f" {self.nbytes / 1e6:.1f} MB moved; memory: {self.arena_bytes / 1e6:.1f} MB for"
                f" values of {self.values_bytes / 1e6:.1f} MB, weights"
                f" {self.weight_bytes / 1e6:.1f} MB, embeddings {self.table_bytes / 1e6:.1f} MB",
            ]
        )


def describe(
    program: Program,
    steps: Sequence[Step],
    offsets: Mapping[int, int],
    arena_bytes: int,
    table_bytes: int,
) -> EnginePlan:
    """Create the report of a program; `offsets` are by the id of a value."""
    lines = []
    for step in steps:
        operation = step.operation
        lines.append(
            PlannedOperation(
                name=operation.name,
                kind=operation.kind,
                inputs=tuple(value.shape for value in operation.reads),
                output=operation.writes[0].shape,
                implementation=step.implementation,
                nbytes=operation.nbytes,
                flops=operation.flops,
                offset=offsets.get(id(operation.writes[0])),
            )
        )
    return EnginePlan(
        tuple(lines),
        arena_bytes,
        sum(value.nbytes for value in program.values if not value.external),
        sum(step.weight_bytes for step in steps),
        table_bytes,
    )
