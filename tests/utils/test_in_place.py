"""Tensors that are written in place: elements that share memory, in one tensor or two."""

from __future__ import annotations

import pytest
import torch

from cases import SCHEDULE, same_bits
from ddpm_fast import StepTable, group_norm, philox_rng, reverse_step_
from ddpm_fast.utils import in_place

BASE = torch.arange(200.0)
OVERLAPPING = {
    "as-strided": BASE.as_strided((3, 2, 2, 2), (3, 1, 2, 1)),
    "unfolded": BASE[:9].unfold(0, 4, 1).unflatten(1, (1, 2, 2)),
    "rows": BASE.as_strided((2, 1, 3, 4), (12, 12, 3, 1)),
    "reversed-order": BASE.as_strided((2, 2, 2, 2), (1, 2, 3, 4)),
}
APART = {
    "contiguous": BASE[:48].view(2, 2, 3, 4),
    "transposed": BASE[:48].view(4, 3, 2, 2).permute(3, 2, 1, 0),
    "gapped": BASE[:96].view(2, 2, 3, 8)[..., ::2],
    "interleaved": BASE.as_strided((2, 1, 1, 3), (3, 9, 9, 2)),  # 0 2 4 and 3 5 7
    "one-element": BASE[:1].view(1, 1, 1, 1).expand(1, 1, 1, 1),
    "empty": BASE.as_strided((0, 2, 3, 4), (0, 1, 1, 1)),
}


@pytest.mark.parametrize("x", OVERLAPPING.values(), ids=OVERLAPPING)
def test_elements_that_share_memory_are_refused(x):
    table = StepTable.ddim(SCHEDULE, 5)
    before, out = x.clone(), torch.zeros(x.shape)
    with pytest.raises(ValueError, match=r"x is written .* must not share memory; got shape"):
        reverse_step_(x, out, table, 0)
    for name in ("model_input", "pred_x0"):
        with pytest.raises(ValueError, match=f"{name} is written"):
            reverse_step_(out.clone(), out, table, 0, **{name: x})
    with pytest.raises(ValueError, match="out is written"):
        group_norm(out, 1, out=x)
    assert same_bits(x.clone(), before)


@pytest.mark.parametrize("x", OVERLAPPING.values(), ids=OVERLAPPING)
def test_the_compiled_operators_refuse_them_too(x):
    ops, rows = torch.ops.ddpm_fast, StepTable.ddim(SCHEDULE, 5).to("cpu", torch.float32)[0]
    step, out = torch.zeros(len(x), dtype=torch.int64), torch.zeros(x.shape)
    with pytest.raises(RuntimeError, match="x is written in place and its elements must not"):
        ops.reverse_step_(x, out, rows, step, None, None, None, None, 0)
    with pytest.raises(RuntimeError, match="out is written in place"):
        ops.philox_normal_(x, philox_rng(0))
    one = torch.ones(x.shape[1])
    with pytest.raises(RuntimeError, match="out is written in place"):
        ops.group_norm_(x, out, *[None] * 5, one, one, None, 1, 1e-5, False)


@pytest.mark.parametrize("x", APART.values(), ids=APART)
def test_other_strides_are_accepted(x):
    expected = x.clone().contiguous()
    out = torch.ones(x.shape)
    table = StepTable.ddim(SCHEDULE, 5)
    x = x.clone() if x.is_contiguous() else x
    reverse_step_(expected, out, table, 0)
    reverse_step_(x, out, table, 0)
    assert same_bits(x.contiguous(), expected)


def test_two_tensors_that_are_written_share_no_memory():
    pool = torch.zeros(300)
    x, shifted = pool[:96].view(2, 3, 4, 4), pool[40:136].view(2, 3, 4, 4)
    with pytest.raises(ValueError, match="pred_x0 must not share memory with x"):
        in_place.distinct(x=x, pred_x0=shifted)
    with pytest.raises(ValueError, match="b must not share memory with a"):
        in_place.distinct(a=pool[::2], b=pool[1:].as_strided((5,), (3,)))
    with pytest.raises(ValueError, match="b must not share memory with a"):
        in_place.distinct(a=pool[:64], b=pool.view(torch.float16)[100:164])
    in_place.distinct(a=pool[::2], b=pool[1::2], c=None, d=pool[:0])
    both = torch.zeros(2, 6, 4, 4).to(memory_format=torch.channels_last)
    in_place.distinct(x=both[:, :3], pred_x0=both[:, 3:])
