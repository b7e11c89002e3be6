"""Division of samples into micro-batches."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.utils.batching import micro_batches


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("num", "first"), [(0, 0), (1, 0), (4, 0), (9, 3), (2, 5)])
def test_every_sample_is_in_one_slot(num, first, pad):
    values = torch.arange(first, first + num)
    found = torch.full((num,), -1)
    for batch in micro_batches(num, first, 4, pad):
        taken = batch.take(values, num)
        assert len(taken) == batch.size
        found[batch.samples] = taken[batch.slots]
        if pad:
            assert batch.size == 4
            assert batch.first_sample % 4 == 0
            assert all(int(v) % 4 == i for i, v in enumerate(taken) if i in range(4)[batch.slots])
        else:
            assert batch.size == batch.slots.stop - batch.slots.start
    assert torch.equal(found, values)


def test_padding_repeats_the_samples_at_the_ends():
    first, last = micro_batches(4, 6, 4, pad=True)
    values = torch.arange(6, 10)
    assert first.take(values, 4).tolist() == [6, 6, 6, 7]
    assert last.take(values, 4).tolist() == [8, 9, 9, 9]
