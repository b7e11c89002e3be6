"""Timesteps of a chain: named spacings and lists."""

import numpy as np
import pytest
import torch

from ddpm_fast.diffusion.timesteps import timesteps


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_equal_diffusers(T, spacing):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    reference = scheduling.DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    for steps in {s for s in (*range(1, 101), 250, 333, 400, 499, 999, 1000) if s <= T}:
        reference.set_timesteps(steps)
        got = timesteps(T, steps, spacing)
        assert got == reference.timesteps[:steps].tolist(), steps
        assert got == sorted(set(got), reverse=True)
        assert len(got) == steps


def test_no_steps_means_every_timestep():
    for spacing in ("linspace", "leading", "trailing", "quad"):
        assert timesteps(5, None, spacing) == [4, 3, 2, 1, 0]


def test_quad_spacing_squares():
    assert timesteps(1000, 5, "quad") == [800, 450, 200, 50, 0]


def quad_of_ddim(steps):
    """The list of ermongroup/ddim for 1000 timesteps, which repeats some."""
    return [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]


def test_quad_spacing_omits_repetitions():
    for steps in range(1, 1001):
        chosen = timesteps(1000, steps, "quad")
        assert chosen == sorted(set(quad_of_ddim(steps)), reverse=True), steps
    assert [len(timesteps(1000, n, "quad")) for n in (10, 20, 50, 100)] == [10, 20, 49, 96]
    assert timesteps(1, 1, "quad") == [0]


@pytest.mark.parametrize("steps", [1, 5, 50, 200])
def test_to_data_omits_the_lowest_timestep(steps):
    for spacing in ("linspace", "leading", "quad"):
        assert timesteps(1000, steps, spacing, True) == timesteps(1000, steps + 1, spacing)[:-1]
        assert timesteps(50, 50, spacing, True) == timesteps(50, 50, spacing)


LISTS = [[1, 5, 9], (9, 5, 1), np.array([1, 5, 9]), torch.tensor([9, 5, 1]), range(1, 10, 4)]


@pytest.mark.parametrize("listed", LISTS, ids=["up", "down", "numpy", "torch", "range"])
def test_listed_timesteps_are_returned_descending(listed):
    assert timesteps(10, None, listed) == timesteps(10, 3, listed) == [9, 5, 1]
