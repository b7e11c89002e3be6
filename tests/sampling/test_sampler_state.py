"""State of a Sampler between calls: strides of a replay, copies, order of draws."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch

from cases import SCHEDULE, normals, same_bits
from ddpm_fast import Sampler, StepTable, philox_rng, reverse_step_
from ddpm_fast.sampling import loop_cache as module
from ddpm_fast.utils.cuda_graphs import UNROLLED_STEPS, CaptureError
from sampler_cases import DDPM, RANDOM, SHAPE, draw, sampler, smooth

TABLE = StepTable.ddpm(SCHEDULE, 21)


class Replayed:
    """Replacement of GraphedStep without a GPU, which records the strides."""

    strides: ClassVar[list[int]] = []

    def __init__(self, step, rewind, device):
        self.step = step
        for _ in range(2):
            rewind()
            step()
        rewind()

    def __call__(self, steps):
        self.strides.append(steps)
        for _ in range(steps):
            self.step()


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(module, "GraphedStep", Replayed)
    monkeypatch.setattr(Replayed, "strides", [])

    def make(*args, **options):
        built = sampler(*args, **options)
        built._loops._graph = "auto"
        return built

    return make


def test_a_replay_runs_strides_and_stops_at_recorded_states(replayed):
    states = [0, 3, 4, 16, 21]
    expected = draw(sampler(table=TABLE), 4, return_steps=states)
    got = draw(replayed(table=TABLE), 4, return_steps=states)
    assert all(map(same_bits, got, expected))
    assert Replayed.strides == [3, 1, UNROLLED_STEPS, 4, 5]
    draw(replayed(table=TABLE), 4)
    assert Replayed.strides[5:] == [UNROLLED_STEPS, UNROLLED_STEPS, 5]


def test_a_replay_of_chains_of_random_length(replayed):
    states = range(6)
    expected = draw(sampler(table=RANDOM), 10, return_steps=states)
    assert all(map(same_bits, draw(replayed(table=RANDOM), 10, return_steps=states), expected))


def test_noise_input_is_copied_step_by_step(replayed):
    expected = draw(sampler(table=TABLE, noise=torch.Generator().manual_seed(1)), 4)
    got = draw(replayed(table=TABLE, noise=torch.Generator().manual_seed(1)), 4)
    assert same_bits(got, expected)
    assert set(Replayed.strides) == {1}


def test_a_model_that_cannot_be_captured_runs_without_a_graph(replayed, monkeypatch):
    class Refuses:
        def __init__(self, *_):
            raise CaptureError("the model cannot be captured in a CUDA graph (it waits)")

    monkeypatch.setattr(module, "GraphedStep", Refuses)
    with pytest.warns(UserWarning, match=r"without a CUDA graph: .*\(it waits\)"):
        got = draw(replayed(), 4)
    assert same_bits(got, draw(sampler(), 4))
    insists = replayed()
    insists._loops._graph = True
    with pytest.raises(CaptureError):
        draw(insists, 4)


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda s: pickle.loads(pickle.dumps(s)), id="pickle"),
    ],
)
def test_a_copy_samples_the_same(copied):
    original = Sampler(smooth, DDPM, SHAPE, 4, "cpu")
    expected = draw(original, 6)
    assert same_bits(draw(copied(original), 6), expected)


def test_attributes_in_a_captured_graph_are_read_only():
    fixed = sampler()
    for name in ("model", "table", "noise"):
        with pytest.raises(AttributeError):
            setattr(fixed, name, None)


@pytest.mark.parametrize(
    ("table", "draws"),
    [
        pytest.param(StepTable.ddpm(SCHEDULE, 5), 4, id="ddpm"),
        pytest.param(StepTable.ddpm(SCHEDULE, 5, spacing="trailing"), 5, id="ddpm-above-t-0"),
        pytest.param(StepTable.ddim(SCHEDULE, 5, eta=0.5), 5, id="ddim-with-noise"),
        pytest.param(StepTable.ddim(SCHEDULE, 5), 0, id="ddim"),
    ],
)
def test_a_generator_is_drawn_from_in_the_order_of_diffusers(table, draws):
    """DDPM draws where t > 0, DDIM with eta in every step; the next micro-batch continues."""
    generator = torch.Generator().manual_seed(3)
    draw(sampler(table=table, noise=generator, micro_batch=2), 4)
    expected = torch.Generator().manual_seed(3)
    for _ in range(2 * (1 + draws)):
        torch.randn(2, *SHAPE, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_written_tensors_must_not_overlap():
    x = normals((2, 3, 4, 4), "contiguous", torch.float32, 1, "cpu")
    with pytest.raises(ValueError, match="pred_x0 must not share memory with x"):
        reverse_step_(x, x.clone(), DDPM, 0, rng=philox_rng(1), pred_x0=x)
