"""The plan of a network: a list of operations over values, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.engine.plan.memory import Lifetime
from ddpm_fast.engine.specs import AttentionSpec, ConvSpec, NormSpec


@dataclass(eq=False)
class TensorValue:
    """A tensor that the plan makes and reads: [N, C, H, W] in channels_last memory.

    ``given``: it comes with the call (the input, the output) and takes no planned memory.
    """

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    external: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * self.dtype.itemsize


class Columns(NamedTuple):
    """A layer's part of the table of embeddings."""

    start: int
    width: int


@dataclass(eq=False)
class Operation:
    """One step of the plan. ``name`` is the path of the module whose work it does."""

    name: str

    @property
    def kind(self) -> str:
        """What it is, in a word or two."""
        return type(self).__name__.lower()

    @property
    def reads(self) -> list[TensorValue]:
        """The values it reads."""
        return self._values("x", "x2", "residual", "embeddings")

    @property
    def writes(self) -> list[TensorValue]:
        """The values it writes, its main result first."""
        return self._values("out", "total")

    def _values(self, *names: str) -> list[TensorValue]:
        fields = (getattr(self, name, None) for name in names)
        return [value for value in fields if value is not None]

    @property
    def flops(self) -> int:
        """Multiplications and additions of its matrix products."""
        return 0

    @property
    def weights(self) -> list[Tensor]:
        """The parameters it reads, as the network holds them."""
        return []

    @property
    def weight_elements(self) -> int:
        """How many there are."""
        return sum(weight.numel() for weight in self.weights)

    def release(self) -> None:
        """Let go of the network's parameters; their shapes stay."""
        for name in ("weight", "bias", "constant"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                setattr(self, name, tensor.to("meta"))

    @property
    def nbytes(self) -> int:
        """Bytes it must move: every value and weight once."""
        values = [*self.reads, *self.writes]
        weights = self.weight_elements * self.writes[0].dtype.itemsize
        return sum(value.nbytes for value in values) + weights


@dataclass(eq=False)
class Convolution(Operation):
    """out = conv(x, x2) + bias + residual; a linear layer over the pixels is one of 1x1."""

    spec: ConvSpec
    weight: Tensor  # [O, C, K, K]
    bias: Tensor | None
    x: TensorValue
    x2: TensorValue | None
    residual: TensorValue | None
    out: TensorValue

    @property
    def kind(self) -> str:
        """The kernel, and what is added."""
        spec = self.spec
        extras = "".join(
            f" {text}"
            for text, there in (
                ("after doubling", spec.upsample),
                (f"stride {spec.stride}", spec.stride != 1),
                ("+ bias", spec.bias),
                ("+ residual", spec.residual),
            )
            if there
        )
        return f"conv {spec.kernel}x{spec.kernel}{extras}"

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        return self.spec.flops

    @property
    def weights(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(eq=False)
class Normalization(Operation):
    """The operator ``group_norm_``; vector and modulation are columns of the embeddings.

    constant: a vector that is the same at every step, in place of ``vector``.
    """

    spec: NormSpec
    weight: Tensor
    bias: Tensor
    x: TensorValue
    x2: TensorValue | None
    vector: Columns | None
    constant: Tensor | None
    modulation: Columns | None
    residual: TensorValue | None
    total: TensorValue | None
    out: TensorValue
    embeddings: TensorValue | None = None  # where they are made in each call

    @property
    def kind(self) -> str:
        """What goes in and what comes out."""
        spec = self.spec
        parts = ["vector +"] if spec.vector else []
        parts += ["residual +"] if spec.residual else []
        parts += [f"norm {spec.groups}"]
        parts += ["modulated"] if spec.modulation else []
        parts += ["silu"] if spec.silu else []
        return " ".join([*parts, "and the sum"] if spec.total else parts)

    @property
    def weights(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight, self.bias]


@dataclass(eq=False)
class SelfAttention(Operation):
    """The operator ``attention_`` on a fused [N, 3 heads head_dim, H, W]."""

    spec: AttentionSpec
    x: TensorValue  # queries, keys and values
    out: TensorValue

    @property
    def kind(self) -> str:
        """Heads and their width."""
        return f"attention {self.spec.heads}x{self.spec.head_dim}"

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        return self.spec.flops


@dataclass(eq=False)
class Resample(Operation):
    """Twice the size by repeating pixels (``up``), or half by averaging 2 x 2."""

    up: bool
    x: TensorValue
    out: TensorValue


@dataclass(eq=False)
class Combine(Operation):
    """out = scale (x + bias + residual) + shift, element by element."""

    x: TensorValue
    out: TensorValue
    scale: float = 1.0
    shift: float = 0.0
    bias: Tensor | None = None
    residual: TensorValue | None = None


@dataclass(eq=False)
class Embed(Operation):
    """The embeddings of a call, [N, columns, 1, 1]: time and class, through every projection."""

    out: TensorValue


@dataclass(eq=False)
class Program:
    """Operations in order, the network's input and output among their values."""

    operations: list[Operation]
    x: TensorValue
    out: TensorValue
    batch: int
    dtype: torch.dtype
    device: torch.device
    values: list[TensorValue] = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[int, TensorValue] = {id(self.x): self.x}
        for operation in self.operations:
            for value in [*operation.reads, *operation.writes]:
                seen.setdefault(id(value), value)
        self.values = list(seen.values())

    def lifetimes(self) -> dict[int, Lifetime]:
        """From which operation to which each value is needed, by its id."""
        last: dict[int, int] = {}
        for number, operation in enumerate(self.operations):
            for value in [*operation.reads, *operation.writes]:
                last[id(value)] = number
        return {
            id(value): Lifetime(value.nbytes, number, last[id(value)])
            for number, operation in enumerate(self.operations)
            for value in operation.writes
        }

    @property
    def flops(self) -> int:
        """Of one forward pass of the batch."""
        return sum(operation.flops for operation in self.operations)
