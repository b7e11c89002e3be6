"""Data order: images, timesteps and dropped labels by position."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.training import data_order


def test_an_epoch_has_every_image_once_in_a_new_order():
    epochs = [data_order.EpochOrder(100, 20, 3, e) for e in range(3)]
    orders = [torch.cat([i for i, _ in epoch.batches(0, 1)]) for epoch in epochs]
    for found in orders:
        assert sorted(found.tolist()) == list(range(100))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(
        orders[1], torch.cat([i for i, _ in data_order.EpochOrder(100, 20, 3, 1).batches(0, 1)])
    )
    assert not torch.equal(
        orders[0], torch.cat([i for i, _ in data_order.EpochOrder(100, 20, 4, 0).batches(0, 1)])
    )
    firsts = [first for epoch in epochs for _, first in epoch.batches(0, 1)]
    assert firsts == list(range(0, 300, 20))


def test_processes_share_the_steps_of_one():
    whole = list(data_order.EpochOrder(90, 20, 0, 2).batches(0, 1))
    shares = [list(data_order.EpochOrder(90, 20, 0, 2).batches(rank, 4)) for rank in range(4)]
    for step, (indices, first) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), indices)
        assert [share[step][1] for share in shares] == [first + 5 * rank for rank in range(4)]
    assert len(whole) == 4  # ten images are left out
    assert whole[0][1] == 180
    assert data_order.epoch_size(90, 20, 4) == (20, 4)
    assert data_order.epoch_size(7, 20, 1) == (7, 1)
    assert data_order.epoch_size(7, 20, 2) == (6, 1)
    with pytest.raises(ValueError, match="data must have an image for each of 8 processes"):
        data_order.epoch_size(7, 20, 8)


def test_timesteps_are_uniform_and_depend_on_the_position_alone():
    found = data_order.random_timesteps(1, 0, 40_000, 10)
    counts = torch.bincount(found, minlength=10)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert torch.equal(found[300:310], data_order.random_timesteps(1, 300, 10, 10))
    assert not torch.equal(found, data_order.random_timesteps(2, 0, 40_000, 10))
    assert data_order.random_timesteps(1 << 63, (1 << 40) - 1, 3, 1000).shape == (3,)
