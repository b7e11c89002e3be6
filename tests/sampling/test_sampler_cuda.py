"""The captured step on a GPU: bits, no synchronisation, models that cannot be captured."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from cases import F16, F32, SCHEDULE, BackendOnDevice, backends, same_bits
from ddpm_fast import StepTable, philox_normal
from sampler_cases import DDPM, SEED, SHAPE, Net, draw, sampler, smooth

pytestmark = pytest.mark.cuda
ON_GPU = [b for b in backends() if b.device == "cuda"] or [BackendOnDevice("cuda", "cuda")]
ON = pytest.mark.parametrize("on", ON_GPU, ids=str)
GPU = ON_GPU[-1]


@ON
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(StepTable.ddpm(SCHEDULE, 21), id="ddpm"),  # two long replays, then short ones
        pytest.param(StepTable.ddim(SCHEDULE, 21), id="ddim"),
        pytest.param(StepTable.ddpm(SCHEDULE, 21, start="random"), id="random-start"),
    ],
)
def test_replay_has_the_bits_of_the_loop(on, dtype, table):
    net = Net().to("cuda", dtype)
    looped, replayed = (
        draw(sampler(net, table, on=on, graph=graph), 10, return_steps=[0, 1, 4, 21])
        for graph in (False, True)
    )
    assert all(map(same_bits, replayed, looped))


@ON
def test_a_sample_has_the_same_bits_in_any_division(on):
    net = Net().cuda()
    whole = draw(sampler(net, on=on, graph=True))
    again = sampler(net, on=on, graph=True)
    assert same_bits(draw(again, 1, first_sample=7)[0], whole[7])
    assert same_bits(draw(again, 6, first_sample=3), whole[3:9])


@ON
@pytest.mark.parametrize("noise", ["tensor", "generator"])
def test_replay_reads_the_noise_of_its_step(on, noise):
    def source():
        generator = torch.Generator("cuda").manual_seed(1)
        if noise == "generator":
            return generator
        return torch.randn(5, 6, *SHAPE, device="cuda", generator=generator)

    looped, replayed = (
        draw(sampler(on=on, noise=source(), graph=graph), 6) for graph in (False, True)
    )
    assert same_bits(replayed, looped)


def test_the_starting_noise_is_that_of_the_cpu():
    assert same_bits(
        draw(sampler(on=GPU), 6, return_steps=[0])[1][0], philox_normal(6, SHAPE, SEED)
    )


@ON
def test_a_step_does_not_synchronise(on):
    for graph in (False, True):
        sample = sampler(Net(), on=on, graph=graph)
        draw(sample, 4)
        loop, advance, _ = sample._loop(4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.rewind()
            advance(DDPM.steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_a_captured_step_reads_new_weights():
    net = Net().cuda()
    sample = sampler(net, on=GPU, graph=True)
    draw(sample, 4)
    with torch.no_grad():
        net.outer.weight.mul_(2)  # in place: the graph reads them
    assert same_bits(draw(sample, 4), draw(sampler(net, on=GPU, graph=False), 4))
    net.outer.weight = torch.nn.Parameter(net.outer.weight.detach() / 3)  # elsewhere: a new graph
    assert same_bits(draw(sample, 4), draw(sampler(net, on=GPU, graph=False), 4))


def waits(x, t):
    """Model that reads a number from the GPU, which cannot be captured."""
    return smooth(x, t) * (1.0 if float(x.sum()) < 1e30 else 0.0)


def test_auto_warns_and_runs_without_a_graph():
    sample = sampler(waits, on=GPU)
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*cannot be captured"):
        got = draw(sample)
    assert same_bits(got, draw(sampler(waits, on=GPU, graph=False)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(draw(sample), got)


def test_graph_true_raises_if_capture_fails():
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*graph=False"):
        draw(sampler(waits, on=GPU, graph=True))
    assert draw(sampler(on=GPU, graph=True)).isfinite().all()


def test_errors_of_the_model_are_passed_on():
    def broken(x, t):
        raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        draw(sampler(broken, on=GPU))


@ON
def test_the_current_stream_is_used(on):
    """The chain is ordered after earlier work on the stream, and before later work."""
    x_T = torch.empty(4, *SHAPE, device="cuda")
    sample = sampler(on=on)
    expected = draw(sample, 4, x_T=torch.full_like(x_T, 0.5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x_T.fill_(0.5)
        got = draw(sample, 4, x_T=x_T).cpu()
    assert same_bits(got, expected)


def test_two_threads_with_a_stream_each():
    expected = [draw(sampler(Net(), on=GPU), 8, seed) for seed in (1, 2)]
    results = {}

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            sample = sampler(Net(), on=GPU)
            results[i] = [draw(sample, 8, i + 1) for _ in range(3)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(same_bits(got, expected[i]) for got in results[i])


def test_backends_agree_within_float32():
    table = StepTable.ddpm(SCHEDULE, 100)
    on_cpu = draw(sampler(table=table), 4)
    for on in ON_GPU:
        got = draw(sampler(table=table, on=on), 4)
        torch.testing.assert_close(got.cpu(), on_cpu, rtol=0, atol=2e-5)


def test_a_step_needs_no_more_memory_than_before():
    sample = sampler(Net(), on=GPU, graph=True)
    draw(sample, 8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(3):
        draw(sample, 8, seed)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
