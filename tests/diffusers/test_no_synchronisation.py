"""Operators of a step of the drop-in schedulers, none of which synchronises with a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

import ddpm_fast.diffusers.scheduler_base as module
from ddpm_fast.utils import checks
from scheduler_cases import FAST, assert_near, generator, normals

EACH = pytest.mark.parametrize("kind", FAST)
X, OUT = normals(0), normals(1)


def scheduled(kind="ddpm", steps=10, device=None, **options):
    scheduler = FAST[kind](**options)
    scheduler.set_timesteps(steps, device)
    return scheduler


SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"}
VIEWS = {"aten::expand", "aten::slice", "aten::select", "aten::alias", "aten::detach"}
VIEWS |= {"aten::view", "aten::split", "aten::promote_types"}


class Operators(TorchDispatchMode):
    """Record the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(step):
    step()  # computes the tables
    with Operators() as found:
        step()
    return [name for name in found.seen if name not in VIEWS]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Treat timesteps as if they were in GPU memory."""
    index = checks.index
    monkeypatch.setattr(module, "_on_host", lambda timestep: False)
    monkeypatch.setattr(
        checks, "index", lambda name, value, like, end: index(name, value, like, None)
    )


def test_a_step_is_one_operator_and_one_draw(as_on_a_gpu):
    ours, learned = scheduled(), scheduled(variance_type="learned_range")
    t, foreign = ours.timesteps[3], ours.timesteps[3].clone()
    both = normals(4, (2, 6, 6, 5))
    for step in (
        lambda: ours.step(OUT, t, X),
        lambda: ours.step(OUT, foreign, X),
        lambda: ours.step(OUT, 500, X),
        lambda: learned.step(both, t, X),
    ):
        assert operators(step) == ["aten::randn", "ddpm_fast::reverse_step"]
    ddim = scheduled("ddim")
    assert operators(lambda: ddim.step(OUT, t, X)) == ["ddpm_fast::reverse_step"]
    assert operators(lambda: ddim.step(OUT, foreign, X)) == ["ddpm_fast::reverse_step"]
    assert operators(lambda: ours.add_noise(X, OUT, t.expand(2))) == ["ddpm_fast::q_sample"]


def test_a_step_of_diffusers_synchronises_and_ours_does_not(as_on_a_gpu):
    ours, theirs = scheduled(), diffusers.DDPMScheduler()
    theirs.set_timesteps(10)
    threshold = scheduled(thresholding=True)
    t = ours.timesteps[3].clone()

    def synchronisations(step):
        return sum(name in SYNCHRONISING for name in operators(step))

    assert synchronisations(lambda: theirs.step(OUT, theirs.timesteps[3], X)) >= 3
    assert synchronisations(lambda: ours.step(OUT, t, X)) == 0
    assert synchronisations(lambda: threshold.step(OUT, t, X)) == 0
    assert synchronisations(lambda: ours.previous_timestep(t)) == 0


def test_timesteps_are_identified_by_their_storage(as_on_a_gpu):
    """No noise is drawn at t = 0, and a timestep outside of the chain gives NaN."""
    ours = scheduled()
    for t, draws in (
        (ours.timesteps[-1], False),
        (torch.tensor(0), True),
        (ours.timesteps[2], True),
    ):
        source = generator(1)
        ours.step(OUT, t, X, generator=source)
        assert (torch.randn(1, generator=source) == torch.randn(1, generator=generator(1))) != draws
    large = scheduled(variance_type="fixed_large")
    last = large.step(OUT, large.timesteps[-1], X).prev_sample
    assert torch.equal(large.step(OUT, torch.tensor(0), X).prev_sample, last)
    got = ours.step(OUT, torch.tensor(901), X)
    assert got.prev_sample.isnan().all()
    assert got.pred_original_sample.isnan().all()
    assert int(ours.previous_timestep(torch.tensor(901))) == -1
    ddim, theirs = scheduled("ddim"), diffusers.DDIMScheduler()
    theirs.set_timesteps(10)
    full = ddim.timesteps
    ddim.timesteps = full[::2]  # the timesteps in between are not in the chain
    for t in (full[1], full.view(torch.int32)[4]):
        want = theirs.step(OUT, int(t), X).prev_sample
        assert_near(ddim.step(OUT, t, X).prev_sample, want)
    short = scheduled()
    short.timesteps = short.timesteps[4:]
    assert int(short.previous_timestep(short.timesteps[1])) == int(short.timesteps[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EACH
def test_a_step_on_a_gpu_does_not_synchronise(kind):
    ours = scheduled(kind, device="cuda")
    x, out = X.cuda(), OUT.cuda()
    ours.step(out, ours.timesteps[0], x)
    ours.add_noise(x, out, ours.timesteps[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in ours.timesteps:
            x = ours.step(out, t, x).prev_sample
            ours.step(out, t.clone(), x)
            ours.add_noise(x, out, t.expand(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()
