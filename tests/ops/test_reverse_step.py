"""reverse_step_: values, layouts, generated noise, ended chains, bits, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    BF16,
    F16,
    F32,
    F64,
    FIRST,
    SCHEDULE,
    SEED,
    TABLE,
    WRITABLE,
    Case,
    assert_named,
    assert_rounded_once,
    backends,
    cases,
    each,
    kernel_backends,
    normals,
    per_sample,
    same_bits,
)
from ddpm_fast import StepTable, philox_normal, philox_rng, reverse_step_
from ddpm_fast.ops.row import RowFlag, column

INF, NAN = math.inf, math.nan
ON = pytest.mark.parametrize("on", backends(), ids=str)


def changed(table: StepTable, **columns: float | list[float]) -> StepTable:
    """A table with some columns replaced."""
    rows = table.rows
    for name, values in columns.items():
        rows[:, column(name)] = torch.as_tensor(values, dtype=F64)
    return StepTable(rows, table.timesteps)


TABLES = {
    "ddpm": StepTable.ddpm(SCHEDULE, 5),
    "ddpm-beta-unclipped": StepTable.ddpm(SCHEDULE, 5, variance="beta", clip=None),
    "ddpm-v": StepTable.ddpm(SCHEDULE, 5, prediction="v"),
    "ddpm-x0": StepTable.ddpm(SCHEDULE, 5, prediction="x0", clip=0.3),
    "ddim": StepTable.ddim(SCHEDULE, 5),
    "ddim-eta-raw": StepTable.ddim(SCHEDULE, 5, eta=1.0, rederive_epsilon=False),
    "scaled-input": changed(StepTable.ddpm(SCHEDULE, 5), Cin=[0.5, 0.7, 3, 1, -2]),
    "clips-in-some-rows": changed(StepTable.ddpm(SCHEDULE, 5), clip=[1, INF, 0.1, 1, INF]),
}


def exact_step(x, out, table, step, noise=None):
    """The equation of ops.row in float64: {name: (value, sum of its terms' magnitudes)}."""
    x, out = x.cpu().double(), out.cpu().double()
    rows = table.rows[step.cpu()]

    def of(name):
        return per_sample(rows[:, column(name)], x)

    x0 = of("P") * x + of("Q") * out
    x0_terms = (of("P") * x).abs() + (of("Q") * out).abs()
    bound = of("clip").expand_as(x0) if of("clip").any() else torch.full_like(x0, INF)
    x0 = torch.minimum(torch.maximum(x0, -bound), bound)
    next_x = of("Xx") * x + of("Xx0") * x0 + of("Xo") * out
    terms = (of("Xx") * x).abs() + of("Xx0").abs() * x0_terms + (of("Xo") * out).abs()
    if noise is not None:
        next_x = next_x + of("S") * noise.cpu().double()
        terms = terms + (of("S") * noise.cpu().double()).abs()
    scale = of("Cin")
    return {
        "x": (next_x, terms),
        "pred_x0": (x0, x0_terms),
        "model_input": (scale * next_x, scale.abs() * terms),
    }


def state_of(case, device, seed=1):
    """A state of a case: float64 with float64, else float32."""
    return case.tensor(device, seed, dtype=F64 if case.dtype == F64 else F32)


@ON
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_of_a_table_is_the_equation(on, table):
    shape = (table.steps, 3, 4, 5)
    x, out, noise = (normals(shape, "channels-last", F32, s, on.device) for s in (1, 2, 3))
    step = torch.arange(table.steps, device=on.device)
    used = noise if table.uses_noise else None
    expected = exact_step(x, out, table, step, used)
    results = {"model_input": torch.empty_like(x), "pred_x0": torch.empty_like(x)}
    returned = reverse_step_(x, out, table, step, noise=used, **results, backend=on.name)
    assert returned is x
    for name, ours in {"x": x, **results}.items():
        assert_rounded_once(ours, *expected[name])


def other_tensors(case, x):
    """noise, model_input and pred_x0 of a case: the outputs in the other layout, full of NaN."""
    layout = case.other if case.other in WRITABLE else "contiguous"
    noise = normals(case.shape, layout, x.dtype, 3, str(x.device))
    model_input = case.tensor(str(x.device), 4).fill_(NAN)
    return (
        noise,
        model_input,
        normals(case.shape, layout, x.dtype, 5, str(x.device)).fill_(NAN),
    )


@pytest.mark.parametrize(("on", "case"), each(cases(WRITABLE)))
def test_every_layout_and_dtype(on, case):
    """model_output and model_input have the case's dtype, the state is float32 or float64."""
    x, out = state_of(case, on.device), case.others(on.device, 2)
    noise, model_input, pred_x0 = other_tensors(case, x)
    step = case.timesteps(on.device, TABLE.steps)
    expected = exact_step(x, out, TABLE, step, noise)
    strides = x.stride()
    results = {"model_input": model_input, "pred_x0": pred_x0}
    reverse_step_(x, out, TABLE, step, noise=noise, **results, backend=on.name)
    assert_rounded_once(x, *expected["x"])
    assert_rounded_once(pred_x0, *expected["pred_x0"])
    assert same_bits(model_input, x.to(case.dtype))
    assert x.stride() == strides


def noise_of_rows(on, shape, step, dtype=F32, seed=SEED, stream=1, first=FIRST):
    """Row i of a table adds the noise of stream + i to a sample."""
    generated = [
        philox_normal(1, shape[1:], seed, stream + i, first + n, on.device, on.name)
        for n, i in enumerate(step.tolist())
    ]
    return (
        torch.cat(generated).to(dtype)
        if generated
        else torch.empty(shape, dtype=dtype, device=on.device)
    )


@pytest.mark.parametrize(
    ("on", "case"),
    each(cases(("channels-last", "sliced")), kernel_backends())
    + each([Case("odd-hw")], backends()[:1]),
)
def test_generated_noise_is_that_of_the_row_bit_for_bit(on, case):
    out, step = case.others(on.device, 2), case.timesteps(on.device, TABLE.steps)
    rng = philox_rng(SEED, 1, FIRST, on.device)
    results = []
    for generated in (True, False):
        x = state_of(case, on.device)
        _, model_input, pred_x0 = other_tensors(case, x)
        source = {"rng": rng} if generated else {"noise": noise_of_rows(on, x.shape, step, x.dtype)}
        outputs = {"model_input": model_input, "pred_x0": pred_x0}
        reverse_step_(x, out, TABLE, step, **source, **outputs, backend=on.name)
        results.append((x, model_input, pred_x0))
    assert all(map(same_bits, *results))


@ON
def test_a_layout_does_not_change_the_bits(on):
    """Generated noise is numbered by position in the sample, not in memory."""
    results = []
    for layout in WRITABLE:
        case = Case("partial-block", layout)
        x, out = state_of(case, on.device), case.others(on.device, 2)
        rng = philox_rng(SEED, 1, 0, on.device)
        results.append(reverse_step_(x, out, TABLE, 3, rng=rng, backend=on.name))
    assert all(same_bits(x, results[0]) for x in results[1:])


@ON
@pytest.mark.parametrize("layout", ["sliced", "gapped"])
def test_memory_between_the_elements_is_left_alone(on, layout):
    """A window of larger tensors is written, and nothing beside it."""
    case = Case("odd-hw", layout, layout)
    x, out = state_of(case, on.device), case.others(on.device, 2)
    noise, model_input, pred_x0 = other_tensors(case, x)
    outputs = {"model_input": model_input, "pred_x0": pred_x0}
    reverse_step_(x, out, TABLE, 3, noise=noise, **outputs, backend=on.name)
    for tensor in (x, model_input, pred_x0):
        memory = torch.empty(0, device=on.device).set_(tensor.untyped_storage())
        assert int((~memory.isnan()).sum()) == tensor.numel()


@ON
@pytest.mark.parametrize("out_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("input_dtype", [F32, F16, BF16], ids=str)
def test_the_models_dtypes(on, out_dtype, input_dtype):
    """The next input of the model is x' of the same pass, rounded; magnitudes from 1e-8 to 1e8."""
    x = normals((2, 3, 5, 7), "contiguous", F32, 1, on.device)
    x *= 10.0 ** torch.linspace(-8, 8, x.numel(), device=on.device).view_as(x)
    out = normals(x.shape, "channels-last", out_dtype, 2, on.device)
    model_input = normals(x.shape, "channels-last", input_dtype, 3, on.device)
    table = TABLES["ddpm-beta-unclipped"]
    step = torch.tensor([1, 4], device=on.device)
    expected = exact_step(x, out, table, step, torch.zeros_like(x))
    zeros = torch.zeros_like(x)
    reverse_step_(x, out, table, step, noise=zeros, model_input=model_input, backend=on.name)
    assert_rounded_once(x, *expected["x"])
    assert same_bits(model_input, x.to(input_dtype))


@ON
def test_the_models_input_is_scaled_where_the_table_says(on):
    x, out = (normals((5, 3, 4, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    table, step = TABLES["scaled-input"], torch.arange(5, device=on.device)
    rng, model_input = philox_rng(1, device=on.device), x.half()
    reverse_step_(x, out, table, step, rng=rng, model_input=model_input, backend=on.name)
    scale = per_sample(table.rows[:, column("Cin")].float().to(on.device), x)
    assert same_bits(model_input, (scale * x).half())


@ON
def test_each_sample_may_be_at_a_row_of_its_own(on):
    """A batch at several rows is the same bits as its samples one by one."""
    x, out = (normals((6, 3, 4, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    alone, step = x.clone(), torch.tensor([4, 0, 19, 4, 7, 1], device=on.device)
    reverse_step_(x, out, TABLE, step, rng=philox_rng(SEED, 1, 5, on.device), backend=on.name)
    for n, row in enumerate(step.tolist()):
        rng = philox_rng(SEED, 1, 5 + n, on.device)
        reverse_step_(alone[n : n + 1], out[n : n + 1], TABLE, row, rng=rng, backend=on.name)
    assert same_bits(x, alone)


@ON
@pytest.mark.parametrize("generated", [False, True], ids=["input", "generated"])
def test_a_sample_outside_the_table_is_left_alone(on, generated):
    """Also where its tensors hold NaN: chains that have ended ride along."""
    step = torch.tensor([-1, 3, 20, -(2**62), 19, 2**62], device=on.device)
    x, out, noise, model_input, pred_x0 = (
        normals((6, 3, 4, 4), "contiguous", F32, s, on.device) for s in range(5)
    )
    ended = [0, 2, 3, 5]
    x[0, 0, 0, 0] = out[2] = noise[ended] = NAN
    before = [tensor.clone() for tensor in (x, model_input, pred_x0)]
    expected = exact_step(x[[1, 4]], out[[1, 4]], TABLE, step[[1, 4]], noise[[1, 4]])
    source = {"rng": philox_rng(1, device=on.device)} if generated else {"noise": noise}
    outputs = {"model_input": model_input, "pred_x0": pred_x0}
    reverse_step_(x, out, TABLE, step, **source, **outputs, backend=on.name)
    for tensor, old in zip((x, model_input, pred_x0), before, strict=True):
        assert same_bits(tensor[ended], old[ended])
        assert not same_bits(tensor[[1, 4]], old[[1, 4]])
    if not generated:
        assert_rounded_once(x[[1, 4]], *expected["x"])


@ON
@pytest.mark.parametrize("where", ["x", "out", "noise"])
def test_nan_passes_the_clip_and_stays_in_its_element(on, where):
    tensors = {
        n: normals((2, 3, 4, 4), "contiguous", F32, i, on.device) for i, n in enumerate("xon")
    }
    x, out, noise = tensors.values()
    {"x": x, "out": out, "noise": noise}[where][1, 2, 3, 0] = NAN
    pred_x0, model_input = torch.zeros_like(x), torch.zeros_like(x, dtype=F16)
    outputs = {"model_input": model_input, "pred_x0": pred_x0}
    reverse_step_(x, out, TABLES["ddpm"], 1, noise=noise, **outputs, backend=on.name)
    spot = torch.zeros_like(x, dtype=torch.bool)
    spot[1, 2, 3, 0] = True
    assert torch.equal(x.isnan(), spot)
    assert torch.equal(model_input.isnan(), spot)
    assert torch.equal(pred_x0.isnan(), spot & (where != "noise"))


@ON
def test_a_term_that_no_row_uses_is_not_read(on):
    """0 * infinity is NaN: the clip bounds x0, and Xo = 0 must not bring the output back."""
    table = TABLES["ddim"]
    assert table.flags == RowFlag.CLIP
    x, out = (normals((2, 3, 4, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    out[0, 0, 0, 0], out[1, 1, 1, 1] = INF, -INF
    pred_x0, noise = torch.zeros_like(x), torch.full_like(x, NAN)
    reverse_step_(x, out, table, 1, noise=noise, pred_x0=pred_x0, backend=on.name)
    assert x.isfinite().all()
    assert pred_x0[0, 0, 0, 0] == -1
    assert pred_x0[1, 1, 1, 1] == 1


@ON
def test_the_output_may_be_the_state(on):
    """A model that returns its own input: every element is read before it is written."""
    for table in (TABLES["ddpm"], TABLES["ddim-eta-raw"]):
        x = normals((2, 3, 20, 30), "channels-last", F32, 1, on.device)
        apart, rng = x.clone(), philox_rng(1, device=on.device)
        reverse_step_(apart, x.clone(), table, 2, rng=rng, backend=on.name)
        assert same_bits(reverse_step_(x, x, table, 2, rng=rng, backend=on.name), apart)


@ON
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:1].expand_as(x), id="first-sample"),
        pytest.param(lambda x: x.transpose(-1, -2), id="transposed"),
        pytest.param(lambda x: x[:, :, :1].expand_as(x), id="first-line"),
    ],
)
def test_the_output_may_be_another_view_of_the_state(on, view):
    x = normals((2, 3, 40, 40), "contiguous", F32, 1, on.device)
    apart = reverse_step_(x.clone(), view(x).clone(), TABLES["ddim"], 2, backend=on.name)
    assert same_bits(reverse_step_(x, view(x), TABLES["ddim"], 2, backend=on.name), apart)


@ON
@given(data=st.data())
def test_any_shape_layout_and_rows(on, data):
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    shape = [1 if math.prod(shape) > 1500 else size for size in shape]
    layouts = [data.draw(st.sampled_from(WRITABLE)) for _ in range(4)]
    x, out, noise, model_input = (
        normals(shape, layout, F32, s, on.device) for s, layout in enumerate(layouts)
    )
    rows = data.draw(st.lists(st.integers(0, 19), min_size=shape[0], max_size=shape[0]))
    step = torch.tensor(rows, dtype=torch.int64, device=on.device)
    expected = exact_step(x, out, TABLE, step, noise)
    reverse_step_(x, out, TABLE, step, noise=noise, model_input=model_input, backend=on.name)
    assert_rounded_once(x, *expected["x"])
    assert same_bits(model_input, x)


@ON
@pytest.mark.parametrize("grad", [True, False])
def test_autograd_notices_what_is_overwritten(on, grad):
    x = normals((2, 3), "contiguous", F32, 1, on.device)
    squared = (x * torch.ones(2, 3, device=on.device, requires_grad=True) * x).sum()
    with torch.set_grad_enabled(grad):
        reverse_step_(x, x, TABLES["ddim"], 3, backend=on.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@ON
def test_no_gradient_is_recorded(on):
    x = normals((2, 3), "contiguous", F32, 1, on.device)
    out, noise = (torch.ones(2, 3, device=on.device, requires_grad=True) for _ in range(2))
    reverse_step_(x, out, TABLE, 3, noise=noise, backend=on.name)
    assert not x.requires_grad


X = torch.zeros(2, 3, 4, 4)
RNG = philox_rng(1)


def step_(x=X, model_output=X, table=TABLE, step=1, noise=None, rng=RNG, **others):
    return reverse_step_(
        x.clone() if x is X else x, model_output, table, step, noise=noise, rng=rng, **others
    )


BAD = [
    ("x", None, TypeError, "torch.Tensor", "NoneType"),
    ("x", X.half(), TypeError, "float32, float64", "float16"),
    ("x", X[:1].expand_as(X), ValueError, "expanded", "clone"),
    ("x", X.clone().requires_grad_(), ValueError, "require grad", "detach"),
    ("model_output", None, TypeError, "torch.Tensor", "NoneType"),
    ("model_output", X.double(), TypeError, "float32, float16, bfloat16", "float64"),
    ("model_output", X[:, :1], ValueError, "[2, 3, 4, 4]", "[2, 1, 4, 4]"),
    ("model_output", X.to("meta"), ValueError, "cpu", "meta"),
    ("table", TABLE.rows, TypeError, "StepTable", "Tensor"),
    ("step", 1.0, TypeError, "int64", "float"),
    ("step", torch.tensor([0.5, 1]), TypeError, "int64", "float32"),
    ("step", torch.tensor([1, 2, 3]), ValueError, "2 samples", "[3]"),
    ("noise", X, ValueError, "only one of them", "both"),
    ("rng", None, ValueError, "only one of them", "neither"),
    ("rng", torch.tensor([1, 2]), ValueError, "int64 [3]", "[2]"),
    ("rng", (1, 2, 3), TypeError, "int64 [3]", "tuple"),
    ("rng", RNG.to("meta"), ValueError, "cpu", "meta"),
    ("model_input", X[:1], ValueError, "[2, 3, 4, 4]", "[1, 3, 4, 4]"),
    ("model_input", X.double(), TypeError, "float32, float16, bfloat16", "float64"),
    ("model_input", X[:1].expand_as(X), ValueError, "expanded", "clone"),
    ("pred_x0", X.half(), TypeError, "float32", "float16"),
    ("pred_x0", X.to("meta"), ValueError, "cpu", "meta"),
    ("backend", "fast", ValueError, "auto, reference, cpu, triton, cuda", "'fast'"),
    ("backend", "cuda", RuntimeError, "cannot run", "CUDA tensors"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda c: f"{c[0]}-{c[-1]}")
def test_bad_arguments_are_named_with_what_is_accepted(bad):
    assert_named(step_, bad)


def test_input_noise_has_the_dtype_of_the_state():
    with pytest.raises(TypeError, match=r"noise must be float32; got float16"):
        step_(noise=X.half(), rng=None)
