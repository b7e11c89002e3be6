"""Binding of operations to implementations and of values to numbered slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.convolution.candidates import fastest
from ddpm_fast.engine.plan.operations import (
    Columns,
    Combine,
    Convolution,
    Embed,
    Normalization,
    Operation,
    Resample,
    SelfAttention,
    TensorValue,
)
from ddpm_fast.models.unet_blocks import upsample_nearest
from ddpm_fast.ops import get_backend, unavailable_reason
from ddpm_fast.ops.aten import SDPA, pixels, sdpa
from ddpm_fast.utils import checks

Slots = list[Any]  # tensors of a call

Run = Callable[[Slots], None]


class Step(NamedTuple):
    """Operation with the implementation that runs it.

    Attributes:
        operation: the operation.
        implementation: name of the implementation.
        run: executes the operation on the tensors of a call.
        weight_bytes: size of the step's copies of the weights.
        scratch: workspace that the step needs while it runs.
    """

    operation: Operation
    implementation: str
    run: Run
    weight_bytes: int = 0
    scratch: TensorValue | None = None


class Binder:
    """Choose implementations and assign slots to the tensors that they read and write.

    The first slots hold the rows of a call, the embedding table, the embedded labels, None, and the
    `split_k_locks` int32 zeros of the kernels that split a sum; the values of the program and the
    workspaces of the steps follow.
    """

    ROW, TABLE, LABELS, NOTHING, LOCKS, FIRST_VALUE = range(6)

    def __init__(
        self,
        values: list[TensorValue],
        backend: str,
        tuner: Tuner,
        embed: Any,
        table: Tensor | None,
    ) -> None:
        self.values = list(values)
        self._slots = {id(value): i + self.FIRST_VALUE for i, value in enumerate(values)}
        self._backend, self._tuner = backend, tuner
        self._embed, self._table = embed, table
        self.split_k_locks = 0

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.FIRST_VALUE + len(self.values)

    def slot(self, value: TensorValue | None) -> int:
        """Return the slot of a value; NOTHING for None."""
        return self.NOTHING if value is None else self._slots[id(value)]

    def step(self, operation: Operation) -> Step:
        """Create the step of an operation."""
        make = {
            Convolution: self._convolution,
            Normalization: self._normalization,
            SelfAttention: self._attention,
            Resample: self._resample,
            Combine: self._combine,
            Embed: self._embedding,
        }[type(operation)]
        return make(operation)  # type: ignore[operator]

    def _convolution(self, op: Convolution) -> Step:
        names = ("out", "x", "x2", "residual")
        where = [self.slot(getattr(op, name)) for name in names]
        out, x, x2, residual = where
        weight_bytes = op.weight_elements * op.spec.dtype.itemsize
        if self._backend == "reference":
            return Step(op, "reference", _reference_convolution(op, where), weight_bytes)
        chosen = fastest(op.spec, op.weight, op.bias, self._tuner)
        scratch = self._scratch(chosen.workspace_bytes)
        memory = self.slot(scratch)
        first, count = self.split_k_locks, getattr(chosen, "split_k_locks", 0)
        # Multiples of 16 bytes: Triton specialises kernels by the alignment of pointers.
        self.split_k_locks += -(-count // 4) * 4

        def run(slots: Slots) -> None:
            workspace = slots[memory].flatten() if scratch is not None else None
            own = {"split_k_locks": slots[self.LOCKS][first : first + count]} if count else {}
            chosen(slots[out], slots[x], slots[x2], slots[residual], workspace, **own)

        return Step(op, chosen.name, run, weight_bytes, scratch)

    def _scratch(self, nbytes: int) -> TensorValue | None:
        if nbytes == 0:
            return None
        value = TensorValue("scratch", (1, nbytes, 1, 1), torch.uint8)
        self._slots[id(value)] = self.slots
        self.values.append(value)
        return value

    def _implementations(self, spec: Any) -> dict[str, Any]:
        """Return the backends that can run the network's operators, fastest first."""
        if self._backend != "auto":
            return {self._backend: get_backend(self._backend, spec.device, spec.dtype)}
        chosen = get_backend("auto", spec.device, spec.dtype)
        found = {chosen.name: chosen}
        if spec.device.type == "cuda" and unavailable_reason("triton", spec.device) is None:
            found["triton"] = get_backend("triton", spec.device, spec.dtype)
        return found

    def _normalization(self, op: Normalization) -> Step:
        spec = op.spec
        wide = checks.compute_dtype(spec.dtype)
        weight, bias = op.weight.to(wide, copy=True), op.bias.to(wide, copy=True)
        constant = None if op.constant is None else op.constant.to(wide, copy=True)[None]
        vector, modulation = op.vector, op.modulation
        table = self.TABLE if op.embeddings is None else self.slot(op.embeddings)
        row = self.ROW if op.embeddings is None else None
        names = ("out", "x", "x2", "residual", "total")
        out, x, x2, residual, total = (self.slot(getattr(op, name)) for name in names)
        device = spec.device
        each = torch.arange(spec.batch, device=device) if row is None else None

        def runs(operators: Any) -> Run:
            def run(slots: Slots) -> None:
                embeddings = slots[table]
                operators.group_norm_(
                    slots[out],
                    slots[x],
                    slots[x2],
                    constant if vector is None else _columns(embeddings, vector),
                    None if constant is not None else (slots[row] if row is not None else each),
                    slots[residual],
                    slots[total],
                    weight,
                    bias,
                    None if modulation is None else _columns(embeddings, modulation),
                    spec.groups,
                    spec.eps,
                    spec.silu,
                )

            return run

        found = {name: runs(operators) for name, operators in self._implementations(spec).items()}
        name = self._fastest(op, found)
        return Step(op, name, found[name], weight.nbytes + bias.nbytes)

    def _fastest(self, op: Normalization | SelfAttention, found: Mapping[str, Run]) -> str:
        """Return the tuner's choice; tensors are only created if it has to time."""
        if len(found) == 1:
            return next(iter(found))
        slots = cache(partial(self._slots_for, op))
        thunks = {name: (lambda run=run: run(slots())) for name, run in found.items()}
        return self._tuner.fastest(str(op.spec), thunks)

    def _slots_for(self, op: Normalization | SelfAttention) -> Slots:
        """Create the slots to time an operation: its tensors, and the embeddings of a call."""
        slots: Slots = [None] * self.slots
        device = op.spec.device
        for value in [*op.writes, *op.reads]:
            tensor = torch.randn(value.shape, dtype=value.dtype, device=device)
            slots[self.slot(value)] = tensor.to(memory_format=torch.channels_last)
        slots[self.TABLE] = self._table
        slots[self.ROW] = torch.zeros(op.spec.batch, dtype=torch.int64, device=device)
        return slots

    def _attention(self, op: SelfAttention) -> Step:
        spec = op.spec
        out, x = self.slot(op.out), self.slot(op.x)
        scale = spec.head_dim**-0.5

        def runs(attention: Callable[[Tensor, Tensor, int, float], None]) -> Run:
            def run(slots: Slots) -> None:
                attention(_tokens(slots[out]), _tokens(slots[x]), spec.heads, scale)

            return run

        found = {k: runs(ops.attention_) for k, ops in self._implementations(spec).items()}
        if self._backend == "auto" and spec.device.type == "cuda":
            found |= {f"sdpa.{name}": runs(sdpa(name)) for name in SDPA}
        name = self._fastest(op, found)
        return Step(op, name, found[name])

    def _resample(self, op: Resample) -> Step:
        out, x, up = self.slot(op.out), self.slot(op.x), op.up

        def run(slots: Slots) -> None:
            slots[out].copy_(upsample_nearest(slots[x]) if up else F.avg_pool2d(slots[x], 2))

        return Step(op, "aten", run)

    def _combine(self, op: Combine) -> Step:
        names = ("out", "x", "residual")
        out, x, residual = (self.slot(getattr(op, name)) for name in names)
        scale, shift = op.scale, op.shift
        bias = None if op.bias is None else op.bias.to(op.x.dtype, copy=True)[:, None, None]

        def run(slots: Slots) -> None:
            first = bias if bias is not None else slots[residual]
            if first is None:
                torch.mul(slots[x], scale, out=slots[out])
            else:
                torch.add(slots[x], first, out=slots[out])
                if bias is not None and slots[residual] is not None:
                    slots[out].add_(slots[residual])
                if scale != 1:
                    slots[out].mul_(scale)
            if shift != 0:
                slots[out].add_(shift)

        return Step(op, "aten", run)

    def _embedding(self, op: Embed) -> Step:
        out, embed = self.slot(op.out), self._embed

        def run(slots: Slots) -> None:
            embed(slots[out].flatten(1), slots[self.ROW], slots[self.LABELS])

        return Step(op, "aten", run, embed.nbytes)


def _columns(table: Tensor, columns: Columns) -> Tensor:
    return table.flatten(1)[:, columns.start : columns.start + columns.width]


def _tokens(x: Tensor) -> Tensor:
    """View [N, C, H, W] in channels_last memory as [N, H W, C]."""
    return pixels(x).unflatten(0, (x.shape[0], -1))


def _reference_convolution(op: Convolution, where: list[int]) -> Run:
    spec = op.spec
    weight = op.weight.to(spec.dtype, copy=True)
    bias = None if op.bias is None else op.bias.to(spec.dtype, copy=True)
    operators = get_backend("reference", spec.device, spec.dtype)
    out, x, x2, residual = where

    def run(slots: Slots) -> None:
        source = upsample_nearest(slots[x]) if spec.upsample else slots[x]
        operators.conv_(
            slots[out], source, slots[x2], weight, bias, slots[residual], spec.stride, spec.padding
        )

    return run
