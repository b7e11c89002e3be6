"""The operators of the U-Net in plain PyTorch, in float64 where they are given it.

The oracle that the kernels are judged against: float16 and bfloat16 are computed in float32.
Signatures are those of ``torch.ops.ddpm_fast.*``; everything is written to ``out``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.utils import checks


def _rows(table: Tensor, row: Tensor | None, batch: int) -> Tensor:
    """[N, C] of a table [R, C]; NaN where a row lies outside it."""
    if row is None:
        return table[:1].expand(batch, -1)
    chosen = table[row.clamp(0, table.shape[0] - 1)]
    outside = (row < 0) | (row >= table.shape[0])
    return chosen.masked_fill(outside[:, None], float("nan"))


def group_norm_(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    vector: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    """GroupNorm (Wu and He 2018) of a sum, over one or two sources, with SiLU or without.

    h = cat(x, x2) + vector[row] + residual; total = h; out = silu(modulated(norm(h))), where norm
    has the affine weight and bias, and modulated(y) = y (1 + scale) + shift with (scale, shift) =
    modulation[row] (Dhariwal and Nichol 2021). Every term only where it is given.

    x [N, C1, H, W], x2 [N, C2, H, W], C = C1 + C2. vector [R, C] and modulation [R, 2C] float32 (or
    float64), row int64 [N] (None: row 0); a sample whose row lies outside is NaN. residual and
    total have x's shape and go with one source. out [N, C, H, W]. weight, bias [C].
    """
    wide = checks.compute_dtype(x.dtype)
    h = (x if x2 is None else torch.cat([x, x2], 1)).to(wide)
    batch = h.shape[0]
    if h.numel() == 0:
        return
    if vector is not None:
        h = h + _rows(vector.to(wide), row, batch)[:, :, None, None]
    if residual is not None:
        h = h + residual.to(wide)
    grouped = h.reshape(batch, groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    variance = centred.square().mean(2, keepdim=True)
    normed = (centred / torch.sqrt(variance + eps)).reshape(h.shape)
    y = normed * weight.to(wide)[:, None, None] + bias.to(wide)[:, None, None]
    if modulation is not None:
        scale, shift = _rows(modulation.to(wide), row, batch)[:, :, None, None].chunk(2, 1)
        y = y * (1 + scale) + shift
    if total is not None:
        total.copy_(h)
    out.copy_(y * torch.sigmoid(y) if silu else y)


def attention_(out: Tensor, qkv: Tensor, heads: int, scale: float) -> None:
    """Self-attention (Vaswani et al. 2017): softmax(scale q k^T) v in each head.

    qkv [N, T, 3 * heads * D]: the queries of all heads, then the keys, then the values.
    out [N, T, heads * D].
    """
    q, k, v = (
        part.unflatten(2, (heads, -1)).transpose(1, 2)
        for part in qkv.to(checks.compute_dtype(qkv.dtype)).chunk(3, 2)
    )
    scores = torch.softmax(scale * (q @ k.transpose(2, 3)), dim=3)
    out.copy_((scores @ v).transpose(1, 2).flatten(2))


def conv_(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
) -> None:
    """Convolution of one or two sources, with bias and residual.

    x [N, C1, H, W], x2 [N, C2, H, W]; weight [O, C1 + C2, K, K]; bias [O]; residual like out;
    padding (left, right, top, bottom) zeros.

    A weight [4, O, C, 2, 2] is a nearest doubling followed by a 3x3 convolution with padding 1, as
    four convolutions of summed weights (`doubling_weight`), one for each parity 2a + b of the
    output's row and column: out [N, O, 2H, 2W].
    """
    wide = checks.compute_dtype(x.dtype)
    h = (x if x2 is None else torch.cat([x, x2], 1)).to(wide)
    weight = weight.to(wide)
    if weight.dim() == 5:
        y = h.new_empty(out.shape)
        for phase in range(4):
            a, b = divmod(phase, 2)
            padded = F.pad(h, (1 - b, b, 1 - a, a))
            y[:, :, a::2, b::2] = F.conv2d(padded, weight[phase])
    else:
        y = F.conv2d(F.pad(h, list(padding)), weight, stride=stride)
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    out.copy_(y if residual is None else y + residual.to(wide))


def doubling_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] of a convolution after nearest doubling -> [4, O, C, 2, 2], one per phase.

    Output pixel (2i + a, 2j + b) sees the input's rows i - 1 + a and i + a, and its columns
    j - 1 + b and j + b. Weights of taps that fall on the same pixel of the input add.
    """
    # For each parity, the taps on the first of the two pixels and those on the second.
    taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
    corners = [
        [weight[:, :, y, x].sum((2, 3)) for y in taps[a] for x in taps[b]]
        for a in (0, 1)
        for b in (0, 1)
    ]
    return torch.stack([torch.stack(phase, 2).unflatten(2, (2, 2)) for phase in corners])
