"""The row of a table: its columns, its flags, and what a table fills in."""

from __future__ import annotations

import math

import pytest
import torch

from cases import rows_with
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.ops.row import ROW_FIELDS, ROW_WIDTH, RowFlag, column, flags_for
from ddpm_fast.sampling.step_table import StepTable


def test_row_layout_is_fixed():
    assert [column(n) for n in ("G0", "P", "clip", "Hx", "Yx", "Xx")] == [0, 2, 4, 5, 8, 15]
    assert [column(n) for n in ("Xx0", "Xo", "M", "S", "Cin", "push")] == [17, 18, 22, 23, 24, 27]
    assert [column(n) for n in ("slot", "ratio")] == [28, 29]
    assert (len(ROW_FIELDS), ROW_WIDTH) == (30, 32)
    assert [int(flag) for flag in RowFlag] == [1 << bit for bit in range(12)]
    assert [flag.name for flag in RowFlag] == [
        *("CLIP", "RAW_OUT", "SCALE_IN", "GUIDE", "LEARNED", "THRESHOLD"),
        *("H1", "H2", "H3", "PUSH", "PUSH_OUT", "SECOND"),
    ]
    with pytest.raises(ValueError, match="name must be one of G0"):
        column("X")


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        pytest.param(rows_with(), RowFlag(0), id="plain"),
        pytest.param(rows_with(clip=(math.inf, math.inf)), RowFlag(0), id="clip-inf"),
        pytest.param(rows_with(clip=(math.inf, 2.0)), RowFlag.CLIP, id="one-row-clips"),
        pytest.param(rows_with(Xo=0.1), RowFlag.RAW_OUT, id="raw-out"),
        pytest.param(rows_with(Cin=0.5), RowFlag.SCALE_IN, id="scale-in"),
        pytest.param(rows_with(clip=(1.0, 1.0), Xo=1, Cin=2).half(), RowFlag(7), id="several"),
        pytest.param(rows_with(G1=0.5), RowFlag.GUIDE, id="second-output"),
        pytest.param(rows_with(G0=0.5), RowFlag.GUIDE, id="scaled-output"),
        pytest.param(rows_with(Lmax=1.0), RowFlag.LEARNED, id="learned-variance"),
        pytest.param(rows_with(Lmin=-1.0), RowFlag.LEARNED, id="learned-variance-from"),
        pytest.param(rows_with(push=1, Hv=1), RowFlag(0), id="nobody-reads-what-is-pushed"),
        pytest.param(rows_with(push=1, Xh1=1), RowFlag.PUSH | RowFlag.H1, id="past"),
        pytest.param(
            rows_with(push=1, Ho=1, Yh3=1),
            RowFlag.PUSH | RowFlag.PUSH_OUT | RowFlag.H3 | RowFlag.SECOND,
            id="third-last-in-the-second-state",
        ),
        pytest.param(rows_with(Xy=1), RowFlag.SECOND, id="second-state"),
    ],
)
def test_flags_say_what_rows_use(rows, flags):
    assert flags_for(rows) == flags


def test_a_threshold_stands_in_for_the_clip():
    assert flags_for(rows_with(clip=(1.0, 1.0)), thresholds=True) == RowFlag.THRESHOLD


@pytest.mark.parametrize(
    ("push", "depth", "slots"),
    [
        ([1, 1, 1, 1, 1], 1, [0, 0, 0, 0, 0]),
        ([1, 1, 1, 1, 1], 2, [0, 1, 0, 1, 0]),
        ([1, 0, 1, 1, 1], 3, [0, 1, 1, 2, 0]),
    ],
    ids=["one", "two", "a-row-that-does-not-push"],
)
def test_a_table_fills_in_the_slots_of_the_ring(push, depth, slots):
    rows = torch.zeros(5, ROW_WIDTH, dtype=torch.float64)
    rows[:, column("push")] = torch.tensor(push, dtype=torch.float64)
    rows[-1, column(f"Xh{depth}")] = 1
    table = StepTable(rows, range(5))
    assert table.depth == depth
    assert table.rows[:, column("slot")].tolist() == slots
    assert StepTable(table.rows, range(5)) == table


def test_a_table_fills_in_the_ratio_of_x0s_factors():
    rows = StepTable.ddpm(NoiseSchedule.cosine(), 10).rows
    P, Q, ratio = (rows[:, column(name)] for name in ("P", "Q", "ratio"))
    assert torch.equal(ratio, Q / P)
    x0_coef = StepTable.ddpm(NoiseSchedule.cosine(), 10, prediction="x0").rows
    assert not x0_coef[:, column("ratio")].any()


@pytest.mark.parametrize("name", ["Yo", "M"])
def test_a_column_that_is_not_implemented_must_be_zero(name):
    with pytest.raises(ValueError, match=f"column {name} must be 0"):
        flags_for(rows_with(**{name: 1e-9}))
