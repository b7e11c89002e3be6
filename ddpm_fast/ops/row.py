"""The row of a step table: the coefficients of one reverse step.

A solver is a table of rows, one per step, and one fused update evaluates any row::

    o   = G0*out + G1*out2                  # out2: second output of classifier-free guidance
    x0  = clip(P*x + Q*o)                   # from epsilon, v, x0 or score
    h0  = Hx*x + Hv*x0 + Ho*o               # if push: appended to a ring of past values
    y'  = [x, y, x0, o, h1, h2, h3] . [Yx, Yy, Yx0, Yo, Yh1, Yh2, Yh3]
    x'  = [x, y, x0, o, h1, h2, h3] . [Xx, Xy, Xx0, Xo, Xh1, Xh2, Xh3] + M*aux + S*e*z
    in' = half(Cin * x')                    # the network's next input
    e   = 1, or exp((Lmin + v*(Lmax - Lmin)) / 2) for a learned variance

x is the state, out the network's output, z standard normal noise. x0 is clipped to [-clip, clip];
clip is +inf in a row that does not clip. With dynamic thresholding, x0 is instead clipped to
[-s, s] and divided by s, the threshold of the sample. y is a second state, and v the second half of
the channels of a network that returns its variance. If P is not 0, P*x + Q*o is evaluated as
P*(x + ratio*o), ratio = Q/P: for small alphas_cumprod the two terms are large and cancel.

h1 is the last pushed value, h3 the third last. They are in a ring of `history_depth` slots: with
`slot` the number of earlier pushes modulo the depth, h_k is in slot (slot - k) mod depth, and h0 is
written to `slot`, over the oldest value, which the same step may still read.

A row has ROW_WIDTH numbers: the fields in the order of ROW_FIELDS, then zeros, so that a float32
row is one 128-byte line. An update is specialized for the terms of a table (RowFlag): a coefficient
that is zero in all rows is not multiplied, so that a NaN or infinity there does not reach the
state. Only x and x0 are always terms of h0, y' and x'. Columns that are not implemented must be
zero; `flags_for` names them.
"""

from __future__ import annotations

from enum import IntFlag

import torch
from torch import Tensor

ROW_FIELDS = (
    *("G0", "G1", "P", "Q", "clip"),
    *("Hx", "Hv", "Ho"),
    *("Yx", "Yy", "Yx0", "Yo", "Yh1", "Yh2", "Yh3"),
    *("Xx", "Xy", "Xx0", "Xo", "Xh1", "Xh2", "Xh3"),
    *("M", "S", "Cin", "Lmin", "Lmax", "push", "slot", "ratio"),
)
ROW_WIDTH = 32

DEEPEST = 3  # slots of the longest ring

_NOT_IMPLEMENTED = ("Yo", "M")
_COLUMNS = {name: index for index, name in enumerate(ROW_FIELDS)}


class RowFlag(IntFlag):
    """Terms that the rows of a table use beside `x' = Xx*x + Xx0*x0 + S*z`.

    CLIP: some row clips x0. RAW_OUT: some row has Xo != 0 (DDIM with the unclipped epsilon).
    SCALE_IN: some row has Cin != 1. GUIDE: some row has G0 != 1 or G1 != 0, a second output.
    LEARNED: some row has Lmin or Lmax != 0, a learned variance. THRESHOLD: each sample has a
    threshold, and clip is not read. H1, H2, H3: some row has a coefficient of that past value.
    PUSH: pushed values are read; PUSH_OUT: and some row has Ho != 0. SECOND: there is a second
    state y.
    """

    CLIP = 1
    RAW_OUT = 2
    SCALE_IN = 4
    GUIDE = 8
    LEARNED = 16
    THRESHOLD = 32
    H1 = 64
    H2 = 128
    H3 = 256
    PUSH = 512
    PUSH_OUT = 1024
    SECOND = 2048


# The terms of reverse_step, which returns new tensors and has no state.
FUNCTIONAL_FLAGS = RowFlag.CLIP | RowFlag.RAW_OUT | RowFlag.LEARNED | RowFlag.THRESHOLD


def check_functional(flags: int) -> None:
    """Raise ValueError for a flag that is not in FUNCTIONAL_FLAGS."""
    if flags & ~int(FUNCTIONAL_FLAGS):
        raise ValueError(
            f"flags {flags} has a term that only reverse_step_ has; reverse_step has"
            f" {int(FUNCTIONAL_FLAGS)}: CLIP, RAW_OUT, LEARNED and THRESHOLD"
        )


def history_depth(flags: RowFlag | int) -> int:
    """Return the slots of the ring of past values: the largest k of an h_k that is read, 0 to 3."""
    return max((k for k in range(1, DEEPEST + 1) if flags & RowFlag[f"H{k}"]), default=0)


def column(name: str) -> int:
    """Return the index of a field in a row.

    Raises:
        ValueError: the name is not in ROW_FIELDS.
    """
    if name not in _COLUMNS:
        raise ValueError(f"name must be one of {', '.join(ROW_FIELDS)}; got {name!r}")
    return _COLUMNS[name]


def flags_for(rows: Tensor, thresholds: bool = False) -> RowFlag:
    """Return the flags of the specialization that evaluates every row of a table.

    Args:
        rows: Floating-point [steps, ROW_WIDTH], finite but for clip. clip is positive, +inf in a
            row that does not clip, or 0 in all rows of a table that does not clip.
        thresholds: Each sample has a threshold.

    Raises:
        TypeError: rows is no floating-point tensor.
        ValueError: rows has another shape, a NaN or an infinity; clip is not as above; push is
            neither 0 nor 1; past values are read but never pushed; a value in the padding or in a
            column that is not implemented is not 0. The message names the column.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a floating-point tensor; got {got}")
    if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH:
        raise ValueError(f"rows must have shape [steps, {ROW_WIDTH}]; got {list(rows.shape)}")
    for name, index in _COLUMNS.items():
        if name != "clip" and not rows[:, index].isfinite().all():
            raise ValueError(f"rows: column {name} must be finite")
        if name in _NOT_IMPLEMENTED and rows[:, index].any():
            raise ValueError(f"rows: column {name} must be 0: it is not implemented")
    if rows[:, len(ROW_FIELDS) :].any():
        raise ValueError(f"rows: the padding from column {len(ROW_FIELDS)} on must be 0")

    def used(*names: str, idle: float = 0) -> bool:
        return any(bool((rows[:, _COLUMNS[name]] != idle).any()) for name in names)

    past = {RowFlag[f"H{k}"]: used(f"Xh{k}", f"Yh{k}") for k in range(1, DEEPEST + 1)}
    uses = past | {
        RowFlag.CLIP: _clips(rows[:, _COLUMNS["clip"]]) and not thresholds,
        RowFlag.RAW_OUT: used("Xo"),
        RowFlag.SCALE_IN: used("Cin", idle=1),
        RowFlag.GUIDE: used("G0", idle=1) or used("G1"),
        RowFlag.LEARNED: used("Lmin", "Lmax"),
        RowFlag.THRESHOLD: thresholds,
        RowFlag.PUSH: any(past.values()),
        RowFlag.PUSH_OUT: any(past.values()) and used("Ho"),
        RowFlag.SECOND: used("Xy", "Yx", "Yy", "Yx0", "Yh1", "Yh2", "Yh3"),
    }
    push = rows[:, _COLUMNS["push"]]
    if not ((push == 0) | (push == 1)).all():
        raise ValueError("rows: column push must be 0 or 1 in every row")
    if any(past.values()) and not push.any():
        raise ValueError("rows: a past value h1, h2 or h3 is read, but column push is 0 throughout")
    return RowFlag(sum(flag for flag, is_used in uses.items() if is_used))


def _clips(clip: Tensor) -> bool:
    if clip.any() and not (clip > 0).all():
        raise ValueError("rows: column clip must be above 0 (+inf: not clipped) in every row")
    return bool(clip.isfinite().any() and clip.any())


def complete(rows: Tensor, depth: int) -> Tensor:
    """Return rows with the derived columns slot and ratio.

    Args:
        rows: [steps, ROW_WIDTH].
        depth: Slots of the ring of past values.
    """
    rows = rows.clone()
    push, P, Q = (rows[:, _COLUMNS[name]] for name in ("push", "P", "Q"))
    rows[:, _COLUMNS["slot"]] = (push.cumsum(0) - push) % max(depth, 1)
    # P below the rounding of Q has no effect, and its ratio would overflow float32.
    P[P.abs() < 1e-30 * Q.abs()] = 0
    rows[:, _COLUMNS["ratio"]] = torch.where(P != 0, Q / P, 0)
    return rows
