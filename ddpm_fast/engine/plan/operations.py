"""Intermediate representation of a network: operations over tensor values, in execution order."""

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
    """Tensor of the plan, [N, C, H, W] in channels_last memory.

    Attributes:
        name: name of the module or operation that produces it.
        shape: [N, C, H, W].
        dtype: dtype of the elements.
        external: the caller allocates it (network input and output); it takes no planned memory.
    """

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    external: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Columns(NamedTuple):
    """Columns of one layer in the embedding table."""

    start: int
    width: int


@dataclass(eq=False)
class Operation:
    """One step of the plan.

    Attributes:
        name: path of the module that the step computes.
    """

    name: str

    @property
    def kind(self) -> str:
        """Short description."""
        return type(self).__name__.lower()

    @property
    def reads(self) -> list[TensorValue]:
        """Values that are read."""
        return self._values("x", "x2", "residual", "embeddings")

    @property
    def writes(self) -> list[TensorValue]:
        """Values that are written, the main result first."""
        return self._values("out", "total")

    def _values(self, *names: str) -> list[TensorValue]:
        fields = (getattr(self, name, None) for name in names)
        return [value for value in fields if value is not None]

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products."""
        return 0

    @property
    def weights(self) -> list[Tensor]:
        """Parameters that are read, as stored in the network."""
        return []

    @property
    def weight_elements(self) -> int:
        """Number of elements of the parameters."""
        return sum(weight.numel() for weight in self.weights)

    def release(self) -> None:
        """Drop the references to the network's parameters; their shapes remain."""
        for name in ("weight", "bias", "constant"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                setattr(self, name, tensor.to("meta"))

    @property
    def nbytes(self) -> int:
        """Bytes that must be moved: every value and parameter once."""
        values = [*self.reads, *self.writes]
        weights = self.weight_elements * self.writes[0].dtype.itemsize
        return sum(value.nbytes for value in values) + weights


@dataclass(eq=False)
class Convolution(Operation):
    """out = conv(x, x2) + bias + residual; a linear layer over pixels is a 1x1 convolution."""

    spec: ConvSpec
    weight: Tensor  # [O, C, K, K]
    bias: Tensor | None
    x: TensorValue
    x2: TensorValue | None
    residual: TensorValue | None
    out: TensorValue

    @property
    def kind(self) -> str:
        """Kernel size and fused terms."""
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
        """Multiplications and additions of the matrix products."""
        return self.spec.flops

    @property
    def weights(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(eq=False)
class Normalization(Operation):
    """The operator `group_norm_`.

    Attributes:
        vector: columns of the embedding table that are added to the input.
        modulation: columns of the embedding table that scale and shift the result.
        constant: vector that is added in place of `vector` and does not depend on the timestep.
        embeddings: embeddings computed in each call; None for the table of all timesteps.
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
    embeddings: TensorValue | None = None

    @property
    def kind(self) -> str:
        """Fused terms before and after the normalisation."""
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
    """The operator `attention_` on fused queries, keys and values [N, 3 heads head_dim, H, W]."""

    spec: AttentionSpec
    x: TensorValue  # queries, keys and values
    out: TensorValue

    @property
    def kind(self) -> str:
        """Number and width of the heads."""
        return f"attention {self.spec.heads}x{self.spec.head_dim}"

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products."""
        return self.spec.flops


@dataclass(eq=False)
class Resample(Operation):
    """Upsampling by 2 (nearest neighbour) if `up`, otherwise average pooling over 2 x 2."""

    up: bool
    x: TensorValue
    out: TensorValue


@dataclass(eq=False)
class Combine(Operation):
    """out = scale (x + bias + residual) + shift, elementwise."""

    x: TensorValue
    out: TensorValue
    scale: float = 1.0
    shift: float = 0.0
    bias: Tensor | None = None
    residual: TensorValue | None = None


@dataclass(eq=False)
class Embed(Operation):
    """Embeddings of a call, [N, columns, 1, 1]: time and class, through every projection."""

    out: TensorValue


@dataclass(eq=False)
class Program:
    """Operations in order, the network's input and output, and all values."""

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
        """Return the lifetime of each written value, by its id."""
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
        """Multiplications and additions of one forward pass of the batch."""
        return sum(operation.flops for operation in self.operations)
