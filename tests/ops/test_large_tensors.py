"""Tensors whose offsets, and samples whose elements, go beyond 32-bit numbers."""

from __future__ import annotations

import pytest
import torch

from cases import BF16, F16, F32, F64, SCHEDULE, TABLE, backends, exact_normals, normals, same_bits
from ddpm_fast import StepTable, philox_rng, q_posterior, q_sample, q_sample_philox, reverse_step_
from ddpm_fast.ops.row import ROW_WIDTH, column

FAR = (1 << 31) + 7
SHAPE = (2, 2, 3, 4)
ON_CPU = pytest.mark.parametrize("on", [b for b in backends() if b.device == "cpu"], ids=str)
ON_KERNELS = pytest.mark.parametrize(
    "on", [b for b in backends() if b.name == "cpu" or b.device == "cuda"], ids=str
)


@ON_CPU
def test_inputs_with_offsets_beyond_2_31_elements(on, sparse):
    """Samples and channels that lie more than 2^31 elements apart, in a file of holes."""
    near, noise = (normals(SHAPE, "contiguous", F16, s, "cpu") for s in (1, 2))
    x0 = sparse(F16, 4 * FAR).as_strided(SHAPE, (2 * FAR, FAR, 4, 1)).copy_(near)
    t = torch.tensor([3, 900])
    expected = q_sample(near, t, noise, SCHEDULE, backend=on.name)
    assert same_bits(q_sample(x0, t, noise, SCHEDULE, backend=on.name), expected)
    expected, *_ = q_posterior(near, noise, t, SCHEDULE, backend=on.name)
    assert same_bits(q_posterior(x0, noise, t, SCHEDULE, backend=on.name)[0], expected)


@ON_CPU
def test_a_state_with_offsets_beyond_2_31_elements(on, sparse):
    """Written in place, and so is the model's input."""
    near, out = (normals(SHAPE, "contiguous", F32, s, "cpu") for s in (1, 2))
    x = sparse(F32, 4 * FAR).as_strided(SHAPE, (2 * FAR, FAR, 4, 1)).copy_(near)
    model_input = sparse(F16, 4 * FAR).as_strided(SHAPE, (FAR, 2 * FAR, 4, 1))
    rng = philox_rng(5)
    reverse_step_(x, out, TABLE, 3, rng=rng, model_input=model_input, backend=on.name)
    reverse_step_(near, out, TABLE, 3, rng=rng, backend=on.name)
    assert same_bits(x, near)
    assert same_bits(model_input, near.half())


ELEMENTS = (1 << 31) + 3
LAST_BLOCK = (1 << 29) - 1  # elements 2^31 - 4 .. 2^31 - 1; the last three are of the next


def last_normals(stream, seed):
    values = [*exact_normals(LAST_BLOCK, stream, 0, seed), *exact_normals(1 << 29, stream, 0, seed)]
    return torch.tensor(values[:7], dtype=F64)


def constant(value, dtype, device):
    """One sample of more than 2^31 elements that all are one number in memory."""
    return torch.full((1, 1), value, dtype=dtype, device=device).expand(1, ELEMENTS)


@pytest.mark.slow
@ON_KERNELS
def test_more_than_2_31_elements_in_a_sample(on, needs_memory):
    """From expanded inputs: 4 GiB for each result in bfloat16, then 8 for a float32 state."""
    needs_memory(on.device, 4 * ELEMENTS)
    x0, noise = (constant(value, BF16, on.device) for value in (0.5, 1.0))
    a, b = (float(c) for c in SCHEDULE.q_sample_coefs(dtype=F64)[500])
    x_t = q_sample(x0, 500, noise, SCHEDULE, backend=on.name)
    assert bool((x_t[0, ::4099] == x_t[0, -1]).all())
    torch.testing.assert_close(x_t[0, -1].item(), a / 2 + b, rtol=2**-8, atol=0)
    del x_t
    x_t, generated = q_sample_philox(x0, 500, SCHEDULE, 1, 2, backend=on.name)
    last = generated[0, -7:].cpu().double()
    torch.testing.assert_close(last, last_normals(2, 1), rtol=2**-8, atol=1e-6)
    expected = a / 2 + b * last
    torch.testing.assert_close(x_t[0, -7:].cpu().double(), expected, rtol=2**-8, atol=1e-6)
    del x_t, generated

    rows = torch.zeros(1, ROW_WIDTH, dtype=F64)
    for name in ("G0", "Xx", "S", "Cin"):
        rows[0, column(name)] = 1  # a row that adds noise, and nothing else
    x, rng = torch.ones(1, ELEMENTS, device=on.device), philox_rng(1, 2, 0, on.device)
    reverse_step_(x, x0, StepTable(rows, [0]), 0, rng=rng, backend=on.name)
    last = x[0, -7:].cpu().double()
    torch.testing.assert_close(last, 1 + last_normals(2, 1), rtol=0, atol=1e-6)
