"""Solvers and options that diffusers has too, with the same noise tensors, in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import ddpm_fast
from cases import BackendOnDevice, backends

pytest.importorskip("diffusers", reason="needs diffusers")

from ddpm_fast import Sampler, reverse_step_
from diffusers_pairs import (
    Pair,
    ddim_pair,
    dpm_pair,
    inverse_pair,
    pairs,
    plms_pair,
    rough,
    unipc_pair,
)

SHIPPED = Path(ddpm_fast.__file__).parent / "assets" / "triangles"

SHAPE = (3, 6, 5)
ON = backends()
CPU = next((on for on in ON if on.name == "cpu"), ON[0])
REFERENCE = BackendOnDevice("reference", "cpu")


def inputs(pair: Pair, num: int = 2):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, *SHAPE, generator=generator)
    noises = torch.randn(pair.table.steps, num, *SHAPE, generator=generator)
    if pair.table.start == "data":
        x = x.mul_(0.5).add_(0.2).clamp_(-1, 1)
    return x, noises


def ours_on(states, outputs, pair: Pair, noises, dtype, on=REFERENCE):
    """Yield each of our steps from the state of diffusers before it, in a given dtype."""
    to = {"device": on.device, "dtype": dtype}
    memory = pair.table.memory(states[0].to(**to))
    for row, out in enumerate(outputs):
        x = states[row].to(**to, copy=True)
        noise = noises[row].to(**to) if pair.table.uses_noise else None
        step = {"noise": noise, "memory": memory, "backend": on.name}
        yield reverse_step_(x, out.to(**to), pair.table, row, **step).cpu().double()


@pytest.mark.parametrize("pair", pairs())
def test_each_step_on_the_trajectory_of_diffusers(pair: Pair):
    assert_steps_agree(pair, CPU)


@pytest.mark.parametrize("on", ON, ids=str)
def test_each_step_on_every_backend(on: BackendOnDevice):
    """The rows are the same on every backend: one table with all terms is enough."""
    assert_steps_agree(unipc_pair("linear", "v", steps=6), on)


def assert_steps_agree(pair: Pair, on: BackendOnDevice) -> None:
    """Each step is within 1e-5 of the largest value; errors do not accumulate.

    For an epsilon on the cosine schedule, where 1 / alpha is 20,000, the float32 tables of
    diffusers are up to 5e-4 from its own equations.
    """
    x, noises = inputs(pair)
    states, outputs = pair.trajectory(x, noises, rough(pair.model))
    exact = ours_on(states, outputs, pair, noises, torch.float64)
    ours = ours_on(states, outputs, pair, noises, torch.float32, on)
    coarse = (pair.schedule, pair.prediction) == ("cosine", "epsilon")
    for theirs, expected, got in zip(states[1:], exact, ours, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale)
        bound = (5e-4 if coarse else 1e-5) * scale
        torch.testing.assert_close(theirs.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("pair", pairs())
def test_a_whole_chain_is_no_further_from_float64_than_diffusers(pair: Pair):
    x, noises = inputs(pair)
    theirs = pair.trajectory(x, noises)[0][-1].double()

    def chain(dtype):
        source = noises.to(dtype)
        sampler = Sampler(pair.model, pair.table, SHAPE, 2, "cpu", dtype, noise=source)
        return sampler.sample(2, x_T=x.to(dtype), progress=False).double()

    exact, ours = chain(torch.float64), chain(torch.float32)
    bound = max(1e-4 * float(exact.abs().max()), 2 * float((theirs - exact).abs().max()))
    assert float((ours - exact).abs().max()) <= bound
    # diffusers runs the same chain, except for its float32 tables.
    torch.testing.assert_close(theirs, exact, rtol=0, atol=2e-3 * float(exact.abs().max()))


TRAINED = [
    pytest.param(unipc_pair("linear", "epsilon", steps=6), id="unipc"),
    *[
        pytest.param(pair, id=str(pair), marks=pytest.mark.slow)
        for pair in (
            ddim_pair("linear", "epsilon"),
            ddim_pair("linear", "epsilon", spacing="trailing", eta=0.5),
            dpm_pair("linear", "epsilon"),
            dpm_pair("linear", "epsilon", sde=True),
            plms_pair("linear", "epsilon", 10),
            inverse_pair("linear", "epsilon"),
        )
    ],
]


@pytest.mark.parametrize("pair", TRAINED)
def test_a_chain_of_the_shipped_model_is_no_further_from_float64_than_diffusers(pair: Pair):
    checkpoint = ddpm_fast.load(SHIPPED)
    shape = checkpoint.sample_shape
    wide = copy.deepcopy(checkpoint.unet).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *shape, generator=generator)
    noises = torch.randn(pair.table.steps, 2, *shape, generator=generator)
    if pair.table.start == "data":
        x = x.sign()
    with torch.no_grad():
        theirs = pair.trajectory(x, noises, checkpoint.unet)[0][-1].double()

    def chain(unet, dtype):
        sampler = Sampler(unet, pair.table, shape, 2, "cpu", dtype, noise=noises.to(dtype))
        return sampler.sample(2, x_T=x.to(dtype), progress=False).double()

    exact, ours = chain(wide, torch.float64), chain(checkpoint.unet, torch.float32)
    bound = max(1e-4 * float(exact.abs().max()), 2 * float((theirs - exact).abs().max()))
    assert float((ours - exact).abs().max()) <= bound
