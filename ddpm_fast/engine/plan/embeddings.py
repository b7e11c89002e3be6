"""Time embeddings and their projections in every layer, as one table.

A layer adds proj(silu(emb(t))) to its activations, or scales and shifts by it. This depends on the
timestep alone, so the rows of all timesteps and layers are computed once, in float64, and a step
reads rows. With class labels the embeddings are summed in each call, by one product for all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.engine.plan.operations import Columns
from ddpm_fast.models import UNet

_ROWS_AT_ONCE = 256


class Projections:
    """Projections of all layers; each layer gets its columns of the table."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self.width = 0

    def add(self, linear: nn.Linear, bias: Tensor | None) -> Columns:
        """Append a layer's projection and return its columns; `bias` is added to all rows."""
        total = linear.bias.detach().double()
        self._weights.append(linear.weight.detach().double())
        self._biases.append(total if bias is None else total + bias.detach().double())
        columns = Columns(self.width, linear.out_features)
        self.width += linear.out_features
        return columns

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return the weight [columns, E] and the bias [columns] of all layers, in float64."""
        return torch.cat(self._weights), torch.cat(self._biases)


def _embedding(unet: UNet, timesteps: Tensor) -> Tensor:
    """Return the time embedding before its SiLU: [n] to [n, E] in float64."""
    mlp = unet.time_embedding
    hidden = unet.time_proj(timesteps).double()
    for linear in (mlp.linear_1, mlp.linear_2):
        hidden = F.linear(hidden, linear.weight.double(), linear.bias.double())
        hidden = F.silu(hidden) if linear is mlp.linear_1 else hidden
    return hidden


@torch.no_grad()
def time_table(unet: UNet, projections: Projections, num_timesteps: int, like: Tensor) -> Tensor:
    """Return the table [num_timesteps, columns] of all projections; dtype of `like`."""
    weight, bias = projections.stacked()
    table = like.new_empty(num_timesteps, projections.width)
    for first in range(0, num_timesteps, _ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + _ROWS_AT_ONCE, num_timesteps), device=like.device)
        table[rows] = F.linear(F.silu(_embedding(unet, rows)), weight, bias).to(table.dtype)
    return table


class LabelledEmbeddings:
    """Embeddings of a class-conditional network, computed in each call.

    Stores the time embedding of every timestep and the stacked projections.
    """

    @torch.no_grad()
    def __init__(
        self, unet: UNet, projections: Projections, num_timesteps: int, like: Tensor
    ) -> None:
        weight, bias = projections.stacked()
        rows = _embedding(unet, torch.arange(num_timesteps, device=like.device)).to(like.dtype)
        # The last row is that of timesteps out of range.
        self._rows = torch.cat([rows, rows.new_full((1, rows.shape[1]), torch.nan)])
        self._weight, self._bias = weight.t().to(like.dtype), bias.to(like.dtype)

    def __call__(self, out: Tensor, t: Tensor, labels: Tensor) -> None:
        """Write [N, columns] for timesteps [N] and embedded labels [N, E]."""
        last = self._rows.shape[0] - 1
        rows = torch.where((t >= 0) & (t < last), t, last)
        emb = self._rows.index_select(0, rows) + labels.to(self._rows.dtype)
        torch.addmm(self._bias, F.silu(emb), self._weight, out=out)

    @property
    def nbytes(self) -> int:
        """Size of the tables and weights in bytes."""
        return sum(t.nbytes for t in (self._rows, self._weight, self._bias))
