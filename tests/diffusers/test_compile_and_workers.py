"""Drop-in schedulers in compiled code, autograd, CUDA graphs and data loaders."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

from cases import same_bits
from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler
from scheduler_cases import FAST, THEIRS, assert_near, generator, normals

EACH = pytest.mark.parametrize("kind", FAST)
X, OUT = normals(0), normals(1)


def scheduled(kind, steps=10, **options):
    scheduler = FAST[kind](**options)
    scheduler.set_timesteps(steps)
    return scheduler


# torch.compile


def uses(scheduler):
    """Return functions that a caller compiles."""
    return {
        "prev_sample": lambda out, t, x: scheduler.step(out, t, x).prev_sample,
        "tuple": lambda out, t, x: scheduler.step(out, t, x, return_dict=False)[1],
        "add_noise": lambda out, t, x: scheduler.add_noise(x, out, t.expand(2)),
        "get_velocity": lambda out, t, x: scheduler.get_velocity(x, out, t.expand(2)),
    }


def with_seed(function, *args):
    torch.manual_seed(0)
    return function(*args)


@pytest.mark.parametrize(
    ("kind", "use"),
    [("ddpm", "prev_sample"), ("ddim", "tuple"), ("ddpm", "add_noise"), ("ddim", "get_velocity")],
)
def test_compiled_code_has_one_graph_for_all_timesteps(kind, use):
    scheduler = scheduled(kind)
    function = uses(scheduler)[use]
    torch._dynamo.reset()
    function(OUT, scheduler.timesteps[0], X)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for row in (2, 5, 9):
        t = scheduler.timesteps[row]
        with torch.compiler.set_stance("default" if row == 2 else "fail_on_recompile"):
            got = with_seed(compiled, OUT, t, X)
        torch.testing.assert_close(got, with_seed(function, OUT, t, X))


def test_compiled_code_follows_new_timesteps():
    scheduler = scheduled("ddim")
    function = uses(scheduler)["prev_sample"]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for steps in (10, 25):
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps[3]
        torch.testing.assert_close(with_seed(compiled, OUT, t, X), with_seed(function, OUT, t, X))


def test_a_table_that_is_missing_in_compiled_code():
    """The graph breaks, or with fullgraph an error names the remedy."""
    scheduler = scheduled("ddim")

    def function(out, t, x):
        return scheduler.step(out, t, x, eta=0.25).prev_sample

    torch._dynamo.reset()
    t = scheduler.timesteps[3]
    with pytest.raises(Exception, match="call it once with these options outside"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(OUT, t, X)
    got = with_seed(torch.compile(function, backend="aot_eager"), OUT, t, X)
    torch.testing.assert_close(got, with_seed(function, OUT, t, X))


@pytest.mark.slow
@EACH
def test_compiles_with_inductor(kind):
    scheduler = scheduled(kind)
    function = uses(scheduler)["tuple"]
    t = scheduler.timesteps[3]
    want = with_seed(function, OUT, t, X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(OUT, t, X), want)


# Modes


@EACH
def test_autocast_does_not_change_a_step(kind):
    scheduler = scheduled(kind)
    half = OUT.bfloat16()
    want = scheduler.step(half, 500, X, generator=generator(1)).prev_sample
    with torch.autocast("cpu", torch.bfloat16):
        got = scheduler.step(half, 500, X, generator=generator(1)).prev_sample
        noisy = scheduler.add_noise(X, OUT, torch.tensor([3]))
    assert same_bits(got, want)
    assert same_bits(noisy, scheduler.add_noise(X, OUT, torch.tensor([3])))


@EACH
def test_tables_of_inference_mode_serve_training(kind):
    with torch.inference_mode():
        scheduler = scheduled(kind)
        inside = scheduler.step(OUT, 500, X, generator=generator(1)).prev_sample
        scheduler.add_noise(X, OUT, torch.tensor([3]))
    x = X.clone().requires_grad_()
    got = scheduler.step(OUT, 500, x, generator=generator(1)).prev_sample
    assert got.requires_grad
    torch.testing.assert_close(got.detach(), inside)
    scheduler.add_noise(x, OUT, torch.tensor([3])).sum().backward()
    assert x.grad.isfinite().all()


@EACH
@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"prediction_type": "v_prediction"}]
)
def test_gradients_equal_diffusers(kind, options):
    grads = []
    for cls in (FAST[kind], THEIRS[kind]):
        scheduler = cls(**options)
        scheduler.set_timesteps(10)
        x, out = X.clone().requires_grad_(), OUT.clone().requires_grad_()
        result = scheduler.step(out, 500, x, generator=generator(1))
        (result.prev_sample**2 + result.pred_original_sample).sum().backward()
        grads.append((x.grad, out.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert_near(ours, theirs)


def test_gradients_through_a_learned_variance_and_a_threshold():
    grads = []
    for cls in (FastDDPMScheduler, diffusers.DDPMScheduler):
        scheduler = cls(
            variance_type="learned_range",
            thresholding=True,
            sample_max_value=3.0,
            dynamic_thresholding_ratio=0.7,
        )
        scheduler.set_timesteps(10)
        out = normals(4, (2, 6, 6, 5)).requires_grad_()
        scheduler.step(out, 500, X, generator=generator(1)).prev_sample.square().sum().backward()
        grads.append(out.grad)
    assert_near(*grads, relative=1e-4)


@EACH
def test_forward_derivatives_equal_diffusers(kind):
    tangents = []
    for cls in (FAST[kind], THEIRS[kind]):
        scheduler = cls(clip_sample=False)
        scheduler.set_timesteps(10)
        t = torch.tensor([3, 900])
        for function in (
            lambda x, s=scheduler: s.step(OUT, 500, x, generator=generator(1)).prev_sample,
            lambda x, s=scheduler, t=t: s.add_noise(x, OUT, t),
        ):
            tangents.append(torch.func.jvp(function, (X,), (OUT,))[1])
    for ours, theirs in zip(tangents[:2], tangents[2:], strict=True):
        assert float(theirs.abs().max()) > 0.1
        assert_near(ours, theirs)


def test_gradcheck_in_float64():
    scheduler = scheduled("ddim", clip_sample=False)
    x, out = (normals(s, (2, 2, 2, 2), torch.float64).requires_grad_() for s in (0, 1))

    def step(x, out):
        return scheduler.step(out, 500, x, return_dict=False)

    assert torch.autograd.gradcheck(step, (x, out))


# Graphs and workers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EACH
def test_a_captured_step_serves_all_timesteps(kind):
    scheduler = FAST[kind]()
    scheduler.set_timesteps(10, "cuda")
    x, out, t = X.cuda(), OUT.cuda(), scheduler.timesteps[3].clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        scheduler.step(out, t, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scheduler.step(out, t, x)
    for row in (4, 8):
        t.copy_(scheduler.timesteps[row])
        torch.cuda.manual_seed(row)
        graph.replay()
        torch.cuda.manual_seed(row)
        want = scheduler.step(out, scheduler.timesteps[row], x)
        torch.testing.assert_close(captured.pred_original_sample, want.pred_original_sample)
        torch.testing.assert_close(captured.prev_sample, want.prev_sample)


class Noised(Dataset):
    """Images with noise, which the workers add."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x, noise = normals(i, (3, 64, 64)), normals(i + 100, (3, 64, 64))
        return self.scheduler.add_noise(x[None], noise[None], torch.tensor([100 * i]))[0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(context):
    scheduler = FastDDIMScheduler()
    dataset = Noised(scheduler)
    want = torch.stack([dataset[i] for i in range(6)])  # torch's threads are running
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=context)
    assert same_bits(torch.cat(list(loader)), want)
