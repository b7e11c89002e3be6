"""Reference backend of the U-Net's operators, in plain PyTorch.

The kernels are checked against it in float64; float16 and bfloat16 are computed in float32.
Signatures are those of `torch.ops.ddpm_fast.*`; results are written to `out`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.utils import checks


def _rows(table: Tensor, row: Tensor | None, batch: int) -> Tensor:
    """Return the rows [N, C] of a table [R, C]; NaN for a row outside the table."""
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
    """Apply GroupNorm (Wu and He 2018) to a sum of one or two sources, with SiLU or without.

    h = cat(x, x2) + vector[row] + residual; total = h; out = silu(modulated(norm(h))), where norm
    has the affine weight and bias, and modulated(y) = y (1 + scale) + shift with (scale, shift) =
    modulation[row] (Dhariwal and Nichol 2021). Terms that are None are left out.

    Args:
        out: [N, C, H, W], C = C1 + C2; written.
        x: [N, C1, H, W].
        x2: [N, C2, H, W].
        vector: Table [R, C], float32 or float64.
        row: int64 [N]; None: row 0. A sample whose row is outside the table is NaN.
        residual: Shape of x; with one source only.
        total: Shape of x, written; with one source only.
        weight: [C].
        bias: [C].
        modulation: Table [R, 2C] of scales and shifts, float32 or float64.
        groups: Number of groups.
        eps: Added to the variance.
        silu: Apply SiLU.
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
    """Apply self-attention (Vaswani et al. 2017): softmax(scale q k^T) v in each head.

    Args:
        out: [N, T, heads * D]; written.
        qkv: [N, T, 3 * heads * D]: the queries of all heads, then the keys, then the values.
        heads: Number of heads.
        scale: Factor of the scores.
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
    """Convolve one or two sources, and add bias and residual.

    A weight [4, O, C, 2, 2] is a nearest-neighbour upsampling by 2 followed by a 3x3 convolution
    with padding 1, as four convolutions with summed weights (`doubling_weight`), one for each
    parity 2a + b of the row and column of the output: out [N, O, 2H, 2W].

    Args:
        out: [N, O, H', W']; written.
        x: [N, C1, H, W].
        x2: [N, C2, H, W], or None.
        weight: [O, C1 + C2, K, K].
        bias: [O], or None.
        residual: Shape of out, or None.
        stride: Stride in both dimensions.
        padding: Zeros at the left, right, top and bottom.
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
    """Return the weights of 3x3 convolution after nearest upsampling by 2: one kernel per phase.

    Output pixel (2i + a, 2j + b) depends on rows i - 1 + a and i + a and columns j - 1 + b and j +
    b of the input. Weights of taps that fall on the same pixel of the input are added.

    Args:
        weight: [O, C, 3, 3].

    Returns:
        [4, O, C, 2, 2].
    """
    # For each parity, the taps on the first of the two pixels and those on the second.
    taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
    corners = [
        [weight[:, :, y, x].sum((2, 3)) for y in taps[a] for x in taps[b]]
        for a in (0, 1)
        for b in (0, 1)
    ]
    return torch.stack([torch.stack(phase, 2).unflatten(2, (2, 2)) for phase in corners])
