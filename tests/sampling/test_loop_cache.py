"""Cached loops: shared by samplers of one model, bounded, freed when evicted."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from cases import SCHEDULE, same_bits
from ddpm_fast import Sampler, StepTable
from ddpm_fast.sampling.step_loop import StepLoop
from sampler_cases import DDPM, RANDOM, SHAPE, Net, draw, sampler

ETA = [StepTable.ddim(SCHEDULE, 5, eta=eta) for eta in (0.2, 0.7)]


@pytest.fixture
def built(monkeypatch):
    """Return weak references to every new loop."""
    loops = []
    original = StepLoop.__init__

    def init(self, *args, **options):
        original(self, *args, **options)
        loops.append(weakref.ref(self))

    monkeypatch.setattr(StepLoop, "__init__", init)
    return loops


def test_tables_of_one_kind_share_a_loop(built):
    first = sampler(Net(), ETA[0])
    second = first.with_table(ETA[1])
    assert second.table is ETA[1]
    expected = [draw(sampler(Net(), table)) for table in ETA]
    del built[:]
    for _ in range(2):  # forth and back
        assert same_bits(draw(first), expected[0])
        assert same_bits(draw(second), expected[1])
    assert len(built) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(StepTable.ddim(SCHEDULE, 6, eta=0.7), id="longer"),
        pytest.param(StepTable.ddim(SCHEDULE, 5), id="no-noise"),
        pytest.param(StepTable.ddim(SCHEDULE, 5, eta=0.7, clip=None), id="no-clip"),
        pytest.param(RANDOM, id="random-start"),
    ],
)
def test_tables_of_another_kind_have_another_loop(built, other):
    first = sampler(Net(), ETA[0])
    draw(first)
    assert same_bits(draw(first.with_table(other)), draw(sampler(Net(), other)))
    assert len(built) == 3


def test_evicted_loops_are_freed(built):
    shared = sampler(Net(), DDPM, loops_kept=2)
    for steps in (3, 4, 5, 6):
        draw(shared.with_table(StepTable.ddpm(SCHEDULE, steps)))
    gc.collect()
    assert [ref() is not None for ref in built] == [False, False, True, True]
    draw(shared.with_table(StepTable.ddpm(SCHEDULE, 5)))  # the newest is used again: kept longest
    draw(shared.with_table(StepTable.ddpm(SCHEDULE, 7)))
    gc.collect()
    assert [ref() is not None for ref in built] == [False, False, True, False, True]


def test_samplers_of_one_cache_run_one_at_a_time():
    """Chains of several threads, with different tables and batch sizes, do not mix."""
    shared = sampler(Net(), DDPM, pad=False)
    tables = [StepTable.ddpm(SCHEDULE, steps) for steps in (5, 5, 9)]
    jobs = [(shared.with_table(table), seed) for seed, table in enumerate(tables * 2)]
    expected = [draw(sampler(Net(), job.table, pad=False), 6, seed) for job, seed in jobs]
    got = [None] * len(jobs)

    def run(i):
        for _ in range(3):
            got[i] = draw(jobs[i][0], 6, jobs[i][1])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(same_bits, got, expected))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="table must be a StepTable; got int"):
        sampler().with_table(5)
    with pytest.raises(ValueError, match=r"loops_kept must be an integer in \[1, .*got 0"):
        sampler(loops_kept=0)


def test_device_and_dtype_from_attributes_of_the_model():
    class Doubled:
        device, dtype = torch.device("cpu"), torch.float64

        def __call__(self, x, t):
            assert x.dtype == torch.float64
            return x * 0.5

    built = Sampler(Doubled(), DDPM, SHAPE, 4)
    assert (built.device, built.dtype) == (torch.device("cpu"), torch.float64)
    assert draw(built, 2).dtype == torch.float64
