"""The row of a step table: what one reverse step reads.

A solver is a table of rows, one per step, and one fused update evaluates any row::

    o   = G0*out + G1*out2                  # out2: second output of classifier-free guidance
    x0  = clip(P*x + Q*o)                   # from epsilon, v, x0 or score
    h0  = Hx*x + Hv*x0 + Ho*o               # if push: joins a ring of three past values
    y'  = [x, y, x0, o, h1, h2, h3] . [Yx, Yy, Yx0, Yo, Yh1, Yh2, Yh3]
    x'  = [x, y, x0, o, h1, h2, h3] . [Xx, Xy, Xx0, Xo, Xh1, Xh2, Xh3] + M*aux + S*e*z
    in' = half(Cin * x')                    # the network's next input
    e   = 1, or exp((Lmin + v*(Lmax - Lmin)) / 2) for a learned-range variance

x is the state, out the network's output, z standard normal noise. x0 is clipped to [-clip, clip];
a row that does not clip holds +inf there. A row is ROW_WIDTH numbers: the fields in the order of
ROW_FIELDS, then zeros, so that a float32 row is one 128-byte line.

An update is specialised on what a table uses (RowFlag): a coefficient that is zero throughout is
never multiplied, so a NaN or infinity behind it stays out of the state. Columns for which no
specialisation exists yet must be zero (G0 must be 1); `flags_for` says so by name.
"""

from __future__ import annotations

from enum import IntFlag

from torch import Tensor

ROW_FIELDS = (
    *("G0", "G1", "P", "Q", "clip"),
    *("Hx", "Hv", "Ho"),
    *("Yx", "Yy", "Yx0", "Yo", "Yh1", "Yh2", "Yh3"),
    *("Xx", "Xy", "Xx0", "Xo", "Xh1", "Xh2", "Xh3"),
    *("M", "S", "Cin", "Lmin", "Lmax", "push"),
)
ROW_WIDTH = 32

_SPECIALISED = frozenset({"G0", "P", "Q", "clip", "Xx", "Xx0", "Xo", "S", "Cin"})
_COLUMNS = {name: index for index, name in enumerate(ROW_FIELDS)}


class RowFlag(IntFlag):
    """What the rows of a table use beyond ``x' = Xx*x + Xx0*x0 + S*z``.

    CLIP: some row clips x0. RAW_OUT: some row has Xo != 0 (DDIM with the raw epsilon).
    SCALE_IN: some row has Cin != 1.
    """

    CLIP = 1
    RAW_OUT = 2
    SCALE_IN = 4


def column(name: str) -> int:
    """Index of a field in a row.

    Raises ValueError for a name that is not in ROW_FIELDS.
    """
    if name not in _COLUMNS:
        raise ValueError(f"name must be one of {', '.join(ROW_FIELDS)}; got {name!r}")
    return _COLUMNS[name]


def flags_for(rows: Tensor) -> RowFlag:
    """Flags of the specialisation that evaluates every row of a table.

    rows: floating-point [steps, ROW_WIDTH]. Finite but for clip, which is above 0, +inf where a
    row does not clip, or 0 throughout for a table that does not clip.

    Raises TypeError if rows is not a floating-point tensor; ValueError for another shape, a NaN or
    an infinity, a clip that is not as above, G0 != 1, a non-zero value in the padding or in a
    column that has no specialisation yet (named in the message).
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a floating-point tensor, got {got}")
    if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH:
        raise ValueError(f"rows must have shape [steps, {ROW_WIDTH}], got {list(rows.shape)}")
    for name, index in _COLUMNS.items():
        values = rows[:, index]
        if name != "clip" and not values.isfinite().all():
            raise ValueError(f"rows: column {name} must be finite")
        if name not in _SPECIALISED and values.any():
            raise ValueError(f"rows: column {name} has no specialisation yet and must be 0")
    if rows[:, len(ROW_FIELDS) :].any():
        raise ValueError(f"rows: the padding from column {len(ROW_FIELDS)} on must be 0")
    if (rows[:, column("G0")] != 1).any():
        raise ValueError("rows: column G0 has no specialisation other than 1")
    flags = RowFlag(0)
    clip = rows[:, column("clip")]
    if clip.any():
        if not (clip > 0).all():
            raise ValueError("rows: column clip must be above 0 (+inf: not clipped) in every row")
        if clip.isfinite().any():
            flags |= RowFlag.CLIP
    if rows[:, column("Xo")].any():
        flags |= RowFlag.RAW_OUT
    if (rows[:, column("Cin")] != 1).any():
        flags |= RowFlag.SCALE_IN
    return flags
