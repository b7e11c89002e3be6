"""Sampler: identity of samples, sources of noise, starts, dtypes."""

from __future__ import annotations

import threading

import pytest
import torch

from cases import (
    BF16,
    F16,
    F32,
    F64,
    SCHEDULE,
    BackendOnDevice,
    backends,
    normals,
    philox,
    same_bits,
)
from ddpm_fast import Sampler, StepTable, philox_normal
from sampler_cases import (
    DDIM,
    DDPM,
    RANDOM,
    SEED,
    SHAPE,
    Net,
    chain,
    draw,
    philox_noise,
    sampler,
    smooth,
)

INTERPRETED = BackendOnDevice("triton", "cpu")  # right, but too slow for many steps
ON = pytest.mark.parametrize("on", backends(), ids=str)


@pytest.mark.parametrize("table", [DDPM, DDIM, RANDOM], ids=["ddpm", "ddim", "random-start"])
@pytest.mark.parametrize(
    "on", [b for b in backends() if (b.name, b.device) != ("triton", "cpu")], ids=str
)
def test_a_sample_has_the_same_bits_in_any_division(on, table):
    whole = draw(sampler(Net(), table, on=on))
    again = sampler(Net(), table, on=on)
    assert same_bits(draw(again, 1, first_sample=7)[0], whole[7])
    assert same_bits(draw(again, 6, first_sample=3), whole[3:9])
    assert same_bits(draw(again, 4, first_sample=4), whole[4:8])
    assert same_bits(draw(again), whole)


@ON
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
def test_sampling_is_the_public_step_from_philox_noise(on, dtype):
    if dtype == F64 and on.name not in ("reference", "cpu"):
        with pytest.raises(TypeError, match=f"float32, float16, bfloat16 for backend {on.name}"):
            sampler(on=on, dtype=dtype)
        return
    state = F64 if dtype == F64 else F32
    got, states = draw(sampler(on=on, dtype=dtype), 4, return_steps=range(6))
    x_T = philox_normal(4, SHAPE, SEED, 0, 0, on.device, on.name).to(state)
    expected = chain(smooth, DDPM, x_T, philox_noise(4, 0, on, state), dtype, on.name)
    assert got.dtype == states.dtype == state
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(states, expected)
    assert same_bits(got, expected[-1])


def test_reference_and_cpu_agree():
    table = StepTable.ddpm(SCHEDULE, 100)
    reference, cpu = (
        Sampler(smooth, table, SHAPE, 4, "cpu", backend=name).sample(4, progress=False)
        for name in ("reference", "cpu")
    )
    torch.testing.assert_close(cpu, reference, rtol=0, atol=2e-5)


class Spy:
    """Model that records its inputs."""

    def __init__(self, model=smooth):
        self.model, self.seen = model, []

    def __call__(self, x, t):
        self.seen.append((x.clone(), t.clone(), x.stride(), x.dtype))
        return self.model(x, t)


def test_every_sample_has_a_fixed_slot():
    """Sample k is in slot k % micro_batch, beside the same samples, requested or not."""
    spy = Spy()
    draw(sampler(spy), 3, first_sample=6)
    starts = [x for x, t, *_ in spy.seen if (t == DDPM.timesteps[0]).all()]
    expected = philox_normal(12, SHAPE, SEED, 0, 0)
    assert same_bits(torch.cat(starts), expected[4:12])
    assert all(x.shape == (4, *SHAPE) and t.shape == (4,) for x, t, *_ in spy.seen)
    assert all(stride == expected[:4].stride() for _, _, stride, _ in spy.seen)
    assert {t.dtype for _, t, *_ in spy.seen} == {torch.int64}


def test_without_padding_only_requested_samples_are_run():
    spy = Spy()
    got = draw(sampler(spy, pad=False), 6, first_sample=3)
    assert [len(x) for x, *_ in spy.seen] == [4] * 5 + [2] * 5
    torch.testing.assert_close(got, draw(sampler(), 6, first_sample=3))


def test_large_sample_indices():
    first = (1 << 32) - 2
    got = draw(sampler(), 4, first_sample=first)
    x_T = philox_normal(4, SHAPE, SEED, 0, first)
    expected = chain(smooth, DDPM, x_T, philox_noise(4, first))
    torch.testing.assert_close(got, expected[-1], rtol=0, atol=1e-6)


def test_starting_states_of_the_caller():
    x_T = normals((6, *SHAPE), "contiguous", F64, 1, "cpu")
    got = draw(sampler(), 6, x_T=x_T)
    expected = chain(smooth, DDPM, x_T.float(), philox_noise(6))
    torch.testing.assert_close(got, expected[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_noise_input(dtype):
    noise = normals((5, 6, *SHAPE), "contiguous", F32, 1, "cpu")
    x_T = normals((6, *SHAPE), "contiguous", F32, 2, "cpu")
    got = draw(sampler(noise=noise, dtype=dtype), 6, x_T=x_T)
    expected = chain(smooth, DDPM, x_T, lambda row: noise[row], dtype)
    torch.testing.assert_close(got, expected[-1], rtol=0, atol=1e-6)


def test_a_generator_draws_x_T_and_each_row_with_noise():
    """In micro-batches, for the requested samples; the last row has no noise."""
    got = draw(sampler(noise=torch.Generator().manual_seed(3), micro_batch=6), 8)
    generator = torch.Generator().manual_seed(3)
    for placement in (slice(0, 6), slice(6, 8)):
        num = len(got[placement])
        x_T, *noise = (torch.randn(num, *SHAPE, generator=generator) for _ in range(5))
        noise.append(torch.zeros_like(x_T))
        expected = chain(smooth, DDPM, x_T, noise.__getitem__)[-1]
        torch.testing.assert_close(got[placement], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("table", [DDPM, RANDOM], ids=["fixed", "random-start"])
def test_states_after_some_steps(table):
    every = draw(sampler(table=table), 6, return_steps=range(6))[1]
    got, some = draw(sampler(table=table), 6, return_steps=[5, 0, 3, 3])
    assert some.shape == (4, 6, *SHAPE)
    assert same_bits(some, every[[5, 0, 3, 3]])
    assert same_bits(some[0], got)
    assert same_bits(some[1], philox_normal(6, SHAPE, SEED))
    assert draw(sampler(), 2, return_steps=[])[1].shape == (0, 2, *SHAPE)


def test_a_chain_may_begin_at_any_step():
    x_T = normals((4, *SHAPE), "contiguous", F32, 1, "cpu")
    for start in (1, 7, 1000):
        table = StepTable.ddpm(SCHEDULE, None if start < 10 else 5, start=start)
        spy = Spy()
        draw(sampler(spy, table), 4, x_T=x_T)
        assert same_bits(spy.seen[0][0], x_T)
        assert spy.seen[0][1].tolist() == [start - 1] * 4
        assert spy.seen[-1][1].tolist() == [0] * 4


def first_timesteps(num, table, seed=SEED, **options):
    """Return the timestep of each sample at its first step."""
    spy = Spy(lambda x, t: torch.zeros_like(x))
    draw(sampler(spy, table, 500, **options), num, seed)
    return torch.cat([t for _, t, *_ in spy.seen[:: table.steps]])[:num]


def test_random_starts_are_uniform_and_fixed_for_each_sample():
    table = StepTable.ddim(SCHEDULE, 10, start="random")
    started = first_timesteps(4000, table)
    counts = torch.stack([(started == t).sum() for t in table.timesteps])
    assert counts.sum() == 4000
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert not torch.equal(started, first_timesteps(4000, table, SEED + 1))
    words = [philox_word(k) for k in range(50)]
    assert started[:50].tolist() == [int(table.timesteps[w * 10 >> 32]) for w in words]


def philox_word(sample):
    low, high = SEED % (1 << 32), SEED >> 32
    return philox((0, 0x7FFF_FFFF, sample, 0), (low, high))[0]


def test_a_random_start_equals_the_chain_from_that_row():
    """Without noise a chain from row r is the chain of a table whose start is that timestep + 1."""
    table = StepTable.ddim(SCHEDULE, spacing=[0, 3, 200, 500, 999], start="random")
    got = draw(sampler(table=table), 10)
    first = first_timesteps(10, table).tolist()
    assert len(set(first)) > 2
    x_T = philox_normal(10, SHAPE, SEED)
    for k, t in enumerate(first):
        shorter = StepTable.ddim(SCHEDULE, spacing=[s for s in (0, 3, 200, 500, 999) if s <= t])
        expected = chain(smooth, shorter, x_T[k : k + 1], None)[-1]
        torch.testing.assert_close(got[k : k + 1], expected, rtol=0, atol=1e-6)


def test_noise_input_of_a_random_start_is_that_of_the_row():
    """Row i adds noise[i], in whatever step a sample reaches it."""
    table = StepTable.ddpm(SCHEDULE, 5, start="random")
    noise = torch.stack([philox_noise(10)(row) for row in range(5)])
    assert same_bits(draw(sampler(table=table, noise=noise)), draw(sampler(table=table)))


def test_no_gradient_and_no_global_state():
    sample = sampler(Net())
    before = torch.get_rng_state()
    got = draw(sample)
    assert not got.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_inference_mode_before_and_after():
    sample = sampler()
    with torch.inference_mode():
        inside = draw(sample)
    outside = draw(sample)
    with torch.inference_mode():
        again = draw(sample)
    assert same_bits(inside, outside)
    assert same_bits(again, outside)


def test_no_samples():
    got, states = draw(sampler(), 0, return_steps=[1, 2])
    assert got.shape == (0, *SHAPE)
    assert states.shape == (2, 0, *SHAPE)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 4), (2, 3, 4, 5)], ids=str)
def test_samples_of_any_number_of_dimensions(shape):
    got = Sampler(smooth, DDPM, shape, 4, "cpu").sample(6, progress=False)
    assert got.shape == (6, *shape)
    one = Sampler(smooth, DDPM, shape, 4, "cpu").sample(1, first_sample=5, progress=False)
    assert same_bits(one[0], got[5])


def test_the_progress_bar_is_optional(capsys):
    sampler().sample(5, progress=False)
    assert capsys.readouterr() == ("", "")
    sampler().sample(5)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert "10/10" in shown


@pytest.mark.parametrize("shared", [False, True], ids=["two-samplers", "one-sampler"])
def test_two_threads(shared):
    one = sampler(Net())
    pair = (one, one if shared else sampler(Net()))
    expected = [draw(sampler(Net()), 8, seed) for seed in (1, 2)]
    results = {}

    def work(i):
        results[i] = [draw(pair[i], 8, i + 1) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(same_bits(got, expected[i]) for got in results[i])
