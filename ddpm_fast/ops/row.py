"""The row of a step table: what one reverse step reads.

A solver is a table of rows, one per step, and one fused update evaluates any row::

    o   = G0*out + G1*out2                  # out2: second output of classifier-free guidance
    x0  = clip(P*x + Q*o)                   # from epsilon, v, x0 or score
    h0  = Hx*x + Hv*x0 + Ho*o               # if push: joins a ring of past values
    y'  = [x, y, x0, o, h1, h2, h3] . [Yx, Yy, Yx0, Yo, Yh1, Yh2, Yh3]
    x'  = [x, y, x0, o, h1, h2, h3] . [Xx, Xy, Xx0, Xo, Xh1, Xh2, Xh3] + M*aux + S*e*z
    in' = half(Cin * x')                    # the network's next input
    e   = 1, or exp((Lmin + v*(Lmax - Lmin)) / 2) for a learned variance

x is the state, out the network's output, z standard normal noise. x0 is clipped to [-clip, clip];
a row that does not clip holds +inf there. With a threshold s for each sample (dynamic thresholding)
x0 is clipped to [-s, s] and divided by s instead. y is a second state, and v the second half of the
channels of a network that returns its variance too. Where P is not 0, P*x + Q*o is evaluated as
P*(x + ratio*o), ratio = Q/P: where alphas_cumprod is small the two terms are large and cancel.

h1 is the value pushed last, h3 the third last. They lie in a ring of ``history_depth`` slots: with
``slot`` the number of earlier pushes modulo the depth, h_k is in slot (slot - k) mod depth, and h0
goes to ``slot``, over the oldest value, which the same step may still read.

A row is ROW_WIDTH numbers: the fields in the order of ROW_FIELDS, then zeros, so that a float32 row
is one 128-byte line. An update is specialised on what a table uses (RowFlag): a coefficient that is
zero throughout is never multiplied, so a NaN or infinity behind it stays out of the state; only x
and x0 are always terms of h0, y' and x'. Columns for which no specialisation exists yet must be
zero; `flags_for` says so by name.
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

_UNSPECIALISED = ("Yo", "M")
_COLUMNS = {name: index for index, name in enumerate(ROW_FIELDS)}


class RowFlag(IntFlag):
    """What the rows of a table use beyond ``x' = Xx*x + Xx0*x0 + S*z``.

    CLIP: some row clips x0. RAW_OUT: some row has Xo != 0 (DDIM with the raw epsilon).
    SCALE_IN: some row has Cin != 1. GUIDE: some row has G0 != 1 or G1 != 0, a second output.
    LEARNED: some row has Lmin or Lmax != 0, a learned variance. THRESHOLD: x0 is thresholded by
    the sample, and clip is not read. H1, H2, H3: some row has a coefficient of that past value.
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


# Of a step that changes none of its arguments: it keeps nothing, and makes no input for a network.
FUNCTIONAL_FLAGS = RowFlag.CLIP | RowFlag.RAW_OUT | RowFlag.LEARNED | RowFlag.THRESHOLD


def check_functional(flags: int) -> None:
    """Raise ValueError where a flag is none of FUNCTIONAL_FLAGS."""
    if flags & ~int(FUNCTIONAL_FLAGS):
        raise ValueError(
            f"flags {flags} has a term that only reverse_step_ has; reverse_step has"
            f" {int(FUNCTIONAL_FLAGS)}: CLIP, RAW_OUT, LEARNED and THRESHOLD"
        )


def history_depth(flags: RowFlag | int) -> int:
    """Slots of the ring of past values: the largest k of an h_k that some row reads; 0 to 3."""
    return max((k for k in range(1, DEEPEST + 1) if flags & RowFlag[f"H{k}"]), default=0)


def column(name: str) -> int:
    """Index of a field in a row.

    Raises ValueError for a name that is not in ROW_FIELDS.
    """
    if name not in _COLUMNS:
        raise ValueError(f"name must be one of {', '.join(ROW_FIELDS)}; got {name!r}")
    return _COLUMNS[name]


def flags_for(rows: Tensor, thresholds: bool = False) -> RowFlag:
    """Flags of the specialisation that evaluates every row of a table.

    rows: floating-point [steps, ROW_WIDTH]. Finite but for clip, which is above 0, +inf where a
    row does not clip, or 0 throughout for a table that does not clip. thresholds: x0 is thresholded
    by the sample.

    Raises TypeError if rows is not a floating-point tensor; ValueError for another shape, a NaN or
    an infinity, a clip that is not as above, a push that is neither 0 nor 1, past values that
    nothing pushes, a non-zero value in the padding or in a column that has no specialisation yet
    (named in the message).
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a floating-point tensor; got {got}")
    if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH:
        raise ValueError(f"rows must have shape [steps, {ROW_WIDTH}]; got {list(rows.shape)}")
    for name, index in _COLUMNS.items():
        if name != "clip" and not rows[:, index].isfinite().all():
            raise ValueError(f"rows: column {name} must be finite")
        if name in _UNSPECIALISED and rows[:, index].any():
            raise ValueError(f"rows: column {name} has no specialisation yet and must be 0")
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
    """The rows with the columns that follow from others: slot, for that depth, and ratio."""
    rows = rows.clone()
    push, P, Q = (rows[:, _COLUMNS[name]] for name in ("push", "P", "Q"))
    rows[:, _COLUMNS["slot"]] = (push.cumsum(0) - push) % max(depth, 1)
    # A P below the rounding of Q takes no part, and its ratio would be beyond float32.
    P[P.abs() < 1e-30 * Q.abs()] = 0
    rows[:, _COLUMNS["ratio"]] = torch.where(P != 0, Q / P, 0)
    return rows
