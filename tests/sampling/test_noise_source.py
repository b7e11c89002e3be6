"""Noise from generators: one, or one for each sample; dtypes; several sources on one sampler."""

from __future__ import annotations

import pytest
import torch

from cases import F16, F32, same_bits
from ddpm_fast.sampling.noise_source import GeneratorNoise
from sampler_cases import DDPM, SHAPE, chain, draw, sampler, smooth


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(generator: torch.Generator, num: int, first=F32, rest=F32):
    """Return x_T and the noise of each row with noise, in the order of diffusers."""
    x_T = torch.randn(num, *SHAPE, generator=generator, dtype=first).float()
    noise = [torch.randn(num, *SHAPE, generator=generator, dtype=rest).float() for _ in range(4)]
    return x_T, [*noise, torch.zeros_like(x_T)]


def test_a_generator_for_each_sample_draws_that_sample_alone():
    """For any micro-batch: samples 0 to 3, then 4."""
    got = draw(sampler(noise=generators(1, 2, 3, 4, 5)), 5)
    for k, generator in enumerate(generators(1, 2, 3, 4, 5)):
        x_T, noise = drawn(generator, 1)
        expected = chain(smooth, DDPM, x_T, noise.__getitem__)[-1]
        torch.testing.assert_close(got[k : k + 1], expected, rtol=0, atol=1e-6)


def test_a_list_of_one_generator_draws_the_whole_batch():
    assert same_bits(
        draw(sampler(noise=generators(7)), 4), draw(sampler(noise=generators(7)[0]), 4)
    )


def test_noise_of_another_dtype_than_the_state():
    """float16 normals are different numbers, not rounded float32 ones."""
    noise = GeneratorNoise(generators(3)[0], x_T_dtype=F16, step_dtype=F32)
    got = draw(sampler(noise=noise), 4)
    x_T, rest = drawn(generators(3)[0], 4, first=F16)
    assert not torch.equal(x_T, drawn(generators(3)[0], 4)[0])
    torch.testing.assert_close(
        got, chain(smooth, DDPM, x_T, rest.__getitem__)[-1], rtol=0, atol=1e-6
    )


def test_with_noise_shares_the_buffers():
    """The buffers are shared; a generator continues from its state."""
    philox = sampler()
    by_generator = philox.with_noise(generators(3)[0])
    expected = draw(sampler(noise=generators(3)[0]), 4)
    assert same_bits(draw(by_generator, 4), expected)
    assert not same_bits(draw(by_generator, 4), expected)
    assert same_bits(draw(by_generator.with_noise("philox"), 4), draw(philox, 4))


@pytest.mark.parametrize("num", [3, 5])
def test_one_generator_for_each_sample_is_required(num: int):
    with pytest.raises(ValueError, match=rf"noise .* one for each of {num} samples"):
        draw(sampler(noise=generators(1, 2, 3, 4)), num)


class Bar:
    taken = 0

    def update(self, n: int) -> None:
        self.taken += n


def test_a_progress_bar_of_the_caller(capsys):
    bar = Bar()
    sampler().sample(5, progress=bar)
    assert bar.taken == 10  # two micro-batches
    assert capsys.readouterr() == ("", "")
