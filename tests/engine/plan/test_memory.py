"""plan_offsets: placement of values in one block of memory."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast.engine.plan.memory import ALIGNMENT, Lifetime, plan_offsets
from engine_cases import busiest

LIFETIMES = st.lists(
    st.builds(
        lambda nbytes, first, length: Lifetime(nbytes, first, first + length),
        st.integers(0, 5000),
        st.integers(0, 20),
        st.integers(0, 6),
    ),
    max_size=25,
)


@given(LIFETIMES)
def test_simultaneous_blocks_do_not_overlap(lives):
    offsets, total = plan_offsets(dict(enumerate(lives)))
    assert set(offsets) == set(range(len(lives)))
    for a, b in combinations(range(len(lives)), 2):
        if lives[a].meets(lives[b]):
            ends = offsets[a] + lives[a].nbytes, offsets[b] + lives[b].nbytes
            assert ends[0] <= offsets[b] or ends[1] <= offsets[a]
    for i, life in enumerate(lives):
        assert offsets[i] % ALIGNMENT == 0
        assert 0 <= offsets[i] <= offsets[i] + life.nbytes <= total


@given(LIFETIMES)
def test_the_total_is_between_the_peak_and_no_reuse(lives):
    _, total = plan_offsets(dict(enumerate(lives)))
    alone = sum(-(-life.nbytes // ALIGNMENT) * ALIGNMENT for life in lives)
    assert busiest(lives) <= total <= alone


@pytest.mark.parametrize("chain", [2, 7])
def test_a_chain_of_values_needs_two_blocks(chain):
    """Each value is read by the next operation only, as in a network without skips."""
    lives = {i: Lifetime(1 << 20, i, i + 1) for i in range(chain)}
    assert plan_offsets(lives)[1] == 2 << 20


def test_no_blocks_need_no_memory():
    assert plan_offsets({}) == ({}, 0)
    assert busiest([]) == 0
