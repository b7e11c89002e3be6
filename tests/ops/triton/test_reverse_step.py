"""The terms of reverse_step_ beyond the plain step, in the Triton backend.

Each is compared with the equation in float64, and all with the bits of reverse_step_bits. Without a
GPU the kernels run in the interpreter, corrected by triton_interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import BF16, F16, F32, WRITABLE, same_bits
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.row import RowFlag, column, complete, history_depth
from reverse_step_bits import bits_of_step, exponential
from reverse_step_cases import (
    EVERYTHING,
    RANDOM_STEPS,
    SOLVER_TERMS,
    STATE,
    Inputs,
    assert_is_the_equation,
    copied,
    step_inputs,
    written,
)
from triton_cases import DEVICE, patterns, same, there

pytest.importorskip("triton")
import triton
import triton.language as tl

from ddpm_fast.ops.triton import arithmetic as core

OP = torch.ops.ddpm_fast.triton_reverse_step_
NAN, INF = float("nan"), float("inf")
READ = {  # by the flag of a term, the tensor that it reads
    RowFlag.GUIDE: "model_output2",
    RowFlag.LEARNED: "log_variance",
    RowFlag.THRESHOLD: "threshold",
    RowFlag.SECOND: "second",
}


def inputs_of(flags: RowFlag, **options) -> Inputs:
    return step_inputs(flags, **{"device": DEVICE} | options)


def after(before: Inputs) -> Inputs:
    """The tensors of a step when it has run; those before it stay as they are."""
    inputs = copied(before)
    OP(**inputs)
    return inputs


def assert_same(ours: Inputs, theirs: Inputs, but: tuple[str, ...] = ()) -> None:
    different = [
        name
        for name, tensor in written(theirs).items()
        if name not in but and not same_bits(ours[name], tensor)
    ]
    assert not different


# The exponential


@triton.jit
def _exponential_kernel(x, out, size, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    mask = at < size
    tl.store(out + at, core.exponential(tl.load(x + at, mask=mask)), mask)


def exponentials(values: Tensor) -> Tensor:
    x, out = there(values, torch.empty_like(values))
    _exponential_kernel[(triton.cdiv(len(x), 1 << 15),)](x, out, len(x), N=1 << 15)
    return out.cpu()


def exponents() -> Tensor:
    """All that matters between underflow and overflow; both ends of it; random bits."""
    ends = torch.tensor([-104.0, -103.97208, -87.33655, -0.0, 0.0, 88.72283, 89.0, INF, -INF, NAN])
    near = [torch.nextafter(ends, torch.full_like(ends, toward)) for toward in (-INF, INF)]
    return torch.cat([torch.linspace(-110, 95, 200_001), ends, *near, patterns((50_000,), F32, 1)])


def test_the_exponential_is_within_a_unit_in_the_last_place():
    x = exponents().numpy()
    ours = exponentials(torch.from_numpy(x)).numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(np.float64))
        single = exact.astype(np.float32)
        unit = np.spacing(single).astype(np.float64)
        close = np.abs(ours - exact) <= 1.1 * unit
    infinite = np.isinf(single)
    assert np.array_equal(np.isnan(ours), np.isnan(x))
    assert np.array_equal(np.isinf(ours), infinite)
    assert (close | infinite | np.isnan(x)).all()


def test_the_exponential_is_its_operations_bit_for_bit():
    x = exponents()
    assert same(exponentials(x), torch.from_numpy(exponential(x.numpy())))


# The terms


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [pytest.param(flags, F32, id=name) for name, flags in SOLVER_TERMS.items()]
    + [
        pytest.param(EVERYTHING, F16, id="every-f16"),
        pytest.param(EVERYTHING, BF16, id="every-bf16"),
    ],
)
def test_a_step_is_the_equation(flags, dtype):
    before = inputs_of(flags, dtype=dtype)
    assert_is_the_equation(after(before), before)


def random_bits(before: Inputs) -> Inputs:
    """The inputs with random bits for the values of every sample."""
    for seed, (name, tensor) in enumerate(before.items()):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name != "rows":
            tensor.copy_(patterns(tuple(tensor.shape), tensor.dtype, seed))
    return before


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        *(pytest.param(flags, F16, id=name) for name, flags in SOLVER_TERMS.items()),
        pytest.param(EVERYTHING, F32, id="every-f32"),
    ],
)
def test_a_step_is_its_operations_bit_for_bit(flags, dtype):
    """The order and the rounding of the terms: what the backends have to agree on."""
    for before in (inputs_of(flags, dtype=dtype), random_bits(inputs_of(flags, dtype=dtype))):
        before["step"][3] = RANDOM_STEPS
        ours = after(before)
        for name, expected in bits_of_step(before).items():
            if before[name] is not None:
                assert same(ours[name], expected), name


@pytest.mark.parametrize(
    ("flags", "generated", "dtype"),
    [
        pytest.param(flags, generated, dtype, id=f"{name}-{'generated' if generated else 'input'}")
        for name, flags in SOLVER_TERMS.items()
        for generated, dtype in ((False, F32), (True, F16))
    ]
    + [
        pytest.param(EVERYTHING, generated, BF16, id=f"every-{generated}-bf16")
        for generated in (False, True)
    ],
)
def test_a_step_is_that_of_cpp_bit_for_bit(flags, generated, dtype):
    before = random_bits(inputs_of(flags, dtype=dtype, generated=generated))
    before["step"][3] = -1
    theirs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in copied(before).items()}
    torch.ops.ddpm_fast.reverse_step_(**theirs)
    ours = after(before)
    for name, tensor in written(theirs).items():
        assert same(ours[name], tensor), name


def test_generated_noise_is_that_of_the_streams():
    """With a learned variance as well, in every row and sample."""
    generated = inputs_of(EVERYTHING, generated=True)
    ops = get_backend("triton", torch.device(DEVICE), F32)
    noisy = copied(generated, rng=None, noise=torch.empty_like(generated["x"]))
    for n, row in enumerate(generated["step"].tolist()):
        rng = generated["rng"] + torch.tensor([0, row, n], device=DEVICE)
        ops.philox_normal_(noisy["noise"][n : n + 1], rng)
    assert_same(after(generated), after(noisy))


def test_a_step_without_noise_does_not_read_the_learned_variance():
    before = inputs_of(SOLVER_TERMS["learned"])
    before |= {"noise": None, "log_variance": before["log_variance"] * NAN}
    assert_same(
        after(before), after(before | {"flags": int(SOLVER_TERMS["learned"] & ~RowFlag.LEARNED)})
    )
    assert after(before)["x"].isfinite().all()


@pytest.mark.parametrize("left_out", [*READ, RowFlag.H2, RowFlag.PUSH, RowFlag.PUSH_OUT], ids=str)
def test_a_term_that_is_not_flagged_is_not_evaluated(left_out):
    """Its tensor may hold anything, and is left as it is."""
    before = inputs_of(EVERYTHING)
    before["flags"] &= ~int(left_out)
    coefs = {RowFlag.H2: ["Xh2", "Yh2"], RowFlag.PUSH: ["push"], RowFlag.PUSH_OUT: ["Ho"]}
    if left_out in READ:
        before[READ[left_out]].fill_(NAN)
        without = copied(before) | {READ[left_out]: None}
    else:
        without = copied(before)
        without["rows"][:, [column(name) for name in coefs[left_out]]] = 0
    with_it = after(before)
    assert_same(with_it, after(without))
    assert with_it["x"].isfinite().all()
    if left_out == RowFlag.PUSH:
        assert same_bits(with_it["history"], before["history"])
    if left_out == RowFlag.SECOND:
        assert with_it["second"].isnan().all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_only_the_past_values_that_are_flagged_are_read(k):
    """The other slots of the ring may hold anything."""
    flags = RowFlag[f"H{k}"] | RowFlag.PUSH
    before = inputs_of(EVERYTHING)
    slot = before["rows"][before["step"], column("slot")].long()
    samples = torch.arange(len(slot), device=DEVICE)
    stored = before["history"][(slot - k) % 3, samples].clone()
    before["history"].fill_(NAN)
    before["history"][(slot - k) % 3, samples] = stored
    before["flags"] = int(flags)
    ours = after(before)
    assert ours["x"].isfinite().all()
    pushes = before["rows"][before["step"], column("push")] != 0
    pushed = ours["history"][slot, samples]
    assert pushed[pushes].isfinite().all()
    if k < 3:
        assert pushed[~pushes].isnan().all()


def test_a_ring_of_past_values_over_many_steps():
    """Rows that push and rows that do not; a step may read the oldest value and replace it."""
    flags = SOLVER_TERMS["outputs-past"]
    depth = history_depth(flags)
    inputs = inputs_of(flags, shape=(2, 3, 8, 8))
    rows = inputs["rows"]
    rows.copy_(complete(rows, depth))
    rows[:, :3] *= 0.5  # no growth
    before = copied(inputs)
    for i in range(RANDOM_STEPS):
        inputs["step"].fill_(i)
        before = copied(inputs)
        OP(**inputs)
        assert_is_the_equation(inputs, before)


# Tiles and layouts


@pytest.mark.parametrize("shape", [(37, 5), (300, 2), (3, 1500), (1030,), (2, 3, 2, 5, 3)], ids=str)
def test_samples_of_a_tile_have_rows_slots_and_thresholds_of_their_own(shape):
    """Several samples in a tile, several tiles for a sample; some outside the table."""
    before = inputs_of(EVERYTHING, shape=shape, layout="contiguous")
    before["step"][1::7] = -1
    ours = after(before)
    assert_is_the_equation(ours, before)
    for n in (0, 1, shape[0] - 1):
        section = {
            k: v[n : n + 1] if isinstance(v, Tensor) and k not in {"rows", "history"} else v
            for k, v in copied(before).items()
        }
        section["history"] = before["history"][:, n : n + 1].clone()
        alone = after(section)
        for name in STATE:
            each = ours[name][:, n : n + 1] if name == "history" else ours[name][n : n + 1]
            assert same_bits(alone[name], each)


@pytest.mark.parametrize(
    ("layout", "other"),
    [("contiguous", other) for other in WRITABLE[1:]]
    + [(layout, "contiguous") for layout in WRITABLE[1:]]
    + [("sliced", "sliced"), ("channels-last", "channels-last")],
)
def test_a_layout_does_not_change_the_bits(layout, other):
    """Of generated noise as well, and nothing beside the elements is written."""
    shape = (2, 3, 7, 5)
    expected = after(inputs_of(EVERYTHING, shape=shape, layout="contiguous", generated=True))
    before = inputs_of(EVERYTHING, shape=shape, layout=layout, other=other, generated=True)
    OP(**before)
    assert_same(before, expected)
    for name, tensor in written(before).items():
        if (other if name == "model_input" else layout) in ("sliced", "gapped"):
            memory = torch.empty(0, device=DEVICE).set_(tensor.untyped_storage())
            assert int((~memory.isnan()).sum()) == tensor.numel(), name


@pytest.mark.parametrize(
    ("dtype", "generated", "last"),
    [
        pytest.param(F32, True, True, id="f32-channels-last"),
        pytest.param(F16, False, True, id="f16-channels-last"),
        pytest.param(BF16, True, False, id="bf16-contiguous"),
    ],
)
def test_output_and_variance_are_halves_of_what_a_network_returns(dtype, generated, last):
    before = inputs_of(SOLVER_TERMS["guided-and-learned"], dtype=dtype, generated=generated)
    names = ("model_output", "log_variance")
    expected = after(before)
    both = torch.cat([before[name] for name in names], dim=1)
    both = both.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    split_output = dict(zip(names, both.chunk(2, dim=1), strict=True))
    inputs = copied(before) | split_output
    OP(**inputs)
    assert_same(inputs, expected)


def test_slots_more_than_2_to_the_31_elements_apart(sparse):
    if DEVICE != "cpu":
        pytest.skip("holes are files on the host")
    before = inputs_of(EVERYTHING, shape=(2, 3, 4, 4), layout="contiguous")
    far = (1 << 31) + 8
    ring = sparse(F32, 3 * far).as_strided(before["history"].shape, (far, 48, 16, 4, 1))
    inputs = copied(before) | {"history": ring.copy_(before["history"])}
    OP(**inputs)
    assert_same(inputs, after(before))


# Samples outside the table, and NaN


@pytest.mark.parametrize("generated", [False, True], ids=["input", "generated"])
def test_a_sample_outside_the_table_is_left_alone(generated):
    before = inputs_of(EVERYTHING, shape=(6, 3, 4, 4), generated=generated)
    ended = [1, 2, 4, 5]
    before["step"][ended] = torch.tensor([-1, RANDOM_STEPS, 1 << 40, -(1 << 62)], device=DEVICE)
    before["threshold"][2] = before["model_output2"][4, 0, 0, 0] = NAN
    ours = after(before)
    for name, tensor in written(ours).items():
        old = before[name]
        if name == "history":
            tensor, old = tensor.transpose(0, 1), old.transpose(0, 1)
        assert same_bits(tensor[ended], old[ended]), name
        assert not same_bits(tensor[0], old[0]), name


def test_slots_outside_the_ring_stay_inside_it():
    """A table that is wrong about its slots reads and writes no other memory."""
    before = inputs_of(EVERYTHING, shape=(4, 3, 4, 4), layout="gapped")
    before["rows"][:, column("slot")] = torch.tensor([-1, 3, 1e9, -1e9]).repeat(3)
    OP(**before)
    assert before["x"].isfinite().all()
    memory = torch.empty(0, device=DEVICE).set_(before["history"].untyped_storage())
    assert int((~memory.isnan()).sum()) == before["history"].numel()


@pytest.mark.parametrize("where", ["x", "model_output2", "log_variance", "second", "history"])
def test_nan_passes_and_stays_in_its_element(where):
    before = inputs_of(EVERYTHING, shape=(2, 3, 4, 4))
    spot = torch.zeros_like(before["x"], dtype=torch.bool)
    spot[0, 2, 3, 0] = True
    tensor = before[where]
    (tensor[:, 0, 2, 3, 0] if where == "history" else tensor[0, 2, 3, :1]).fill_(NAN)
    ours = after(before)
    assert torch.equal(ours["x"].isnan(), spot)
    assert torch.equal(ours["model_input"].isnan(), spot)
    in_x0 = where in ("x", "model_output2")
    assert torch.equal(ours["pred_x0"].isnan(), spot & in_x0)
    assert torch.equal(ours["second"].isnan(), spot & (where != "log_variance"))
    of_history = ours["history"].isnan()
    assert not of_history[:, ~spot].any()
    assert bool(of_history.any()) == (in_x0 or where == "history")


def test_a_threshold_bounds_x0_and_is_its_unit():
    before = inputs_of(RowFlag.THRESHOLD | RowFlag.CLIP, shape=(4, 3, 4, 4))
    before["rows"][:, column("clip")] = 1e-3  # not read
    before["threshold"].copy_(torch.tensor([1.0, 2.0, 1e30, NAN]))
    before["model_output"][0, 0, 0, :2] = torch.tensor([INF, -INF])
    before["model_output"][1, 0, 0, 0] = NAN
    ours = after(before)["pred_x0"]
    unclipped = after(before | {"flags": 0})["pred_x0"]
    assert ours[0, 0, 0, :2].abs().tolist() == [1, 1]
    assert float(ours[:2].nan_to_num().abs().max()) == 1
    assert ours[1].isnan().sum() == 1
    assert same_bits(ours[2], unclipped[2] / 1e30)
    assert ours[3].isnan().all()


@pytest.mark.parametrize(("name", "layout"), [("every", "channels-last"), ("one-past", "sliced")])
def test_opcheck(name, layout):
    before = inputs_of(SOLVER_TERMS[name], shape=(2, 3, 5, 4), layout=layout)
    torch.library.opcheck(OP.default, (), before)
