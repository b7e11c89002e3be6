"""The operators torch.ops.ddpm_fast.*: one set of bits, opcheck, gradients, torch.compile."""

from __future__ import annotations

import logging

import pytest
import torch

from cases import (
    F16,
    F32,
    F64,
    SCHEDULE,
    WRITABLE,
    BackendOnDevice,
    Case,
    backends,
    cases,
    each,
    kernel_backends,
    normals,
    per_sample,
    same_bits,
    sample_inputs,
)
from ddpm_fast import (
    StepTable,
    philox_normal,
    philox_rng,
    q_posterior,
    q_sample,
    q_sample_philox,
    reverse_step_,
)
from ddpm_fast.ops import get_backend, unavailable_reason
from ddpm_fast.ops.dispatch import runs_on
from ddpm_fast.ops.registry import DIFFUSION_OPS, NOT_LOADED

ON = pytest.mark.parametrize("on", backends(), ids=str)
KERNELS_ON = pytest.mark.parametrize("on", kernel_backends(), ids=str)
CPU = BackendOnDevice("cpu", "cpu")
FORWARD = ("q_sample", "q_sample_philox", "q_posterior")
IN_PLACE = ("reverse_step_", "philox_normal_")


def results(op, on, case, generated=True):
    """All that an operator returns or writes."""
    args = sample_inputs(op, case, on.device, generated)
    returned = getattr(on.ops, op)(*args)
    if returned is not None:
        return returned if isinstance(returned, tuple) else (returned,)
    return [args[i] for i in ((0,) if op == "philox_normal_" else (0, 6, 7)) if args[i] is not None]


FEW = [
    *(Case("odd-hw", layout) for layout in WRITABLE),
    Case("partial-block", "channels-last", "contiguous", F16),
    Case("one-dim"),
    Case("five-dim", "channels-last"),
    Case("empty-batch"),
]


def variants(on):
    return [
        pytest.param(op, *param.values, id=f"{op}-{param.id}")
        for op in DIFFUSION_OPS
        for param in each(FEW if op in IN_PLACE else FEW[:3], on)
    ]


@pytest.mark.parametrize(("op", "on", "case"), variants(kernel_backends()[1:]))
def test_kernels_agree_bit_for_bit_with_cpu(op, on, case):
    for generated in (True, False) if op == "reverse_step_" else (True,):
        assert all(
            map(same_bits, results(op, on, case, generated), results(op, CPU, case, generated))
        )


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("op", DIFFUSION_OPS)
@pytest.mark.parametrize("case", [c for c in cases(WRITABLE) if "block" in c.name], ids=str)
def test_instruction_sets_agree_bit_for_bit(cpu_kernels, kernels, op, case):
    expected = results(op, CPU, case)
    cpu_kernels(kernels)
    assert all(map(same_bits, results(op, CPU, case), expected))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", DIFFUSION_OPS)
def test_threads_do_not_change_bits(two_threads, op, layout):
    case = Case("many-blocks", layout)
    two = results(op, CPU, case)
    torch.set_num_threads(1)
    assert all(map(same_bits, results(op, CPU, case), two))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match=r"name must be auto or one of baseline.*; got 'sse'"):
        torch.ops.ddpm_fast.use_cpu_kernels("sse")
    assert torch.ops.ddpm_fast.use_cpu_kernels("auto") in ("baseline", "avx2", "avx512")


OPCHECK = [Case("odd-hw", "channels-last", "channels-last"), Case("odd-hw", "sliced")]
SLOW_OPCHECK = [
    Case("odd-hw"),
    Case("odd-hw", "transposed", "channels-last"),
    Case("empty-batch"),
    *(Case("odd-hw", layout) for layout in ("gapped", "expanded", "expanded-batch")),
    Case("odd-hw", "channels-last", "contiguous", F16),
    Case("one-dim"),
    Case("five-dim", "channels-last"),
]


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case}") for op in DIFFUSION_OPS for case in OPCHECK]
    + [
        pytest.param(op, case, id=f"{op}-{case}", marks=pytest.mark.slow)
        for op in DIFFUSION_OPS
        for case in SLOW_OPCHECK
        if op not in IN_PLACE or case.layout in WRITABLE
    ],
)
@KERNELS_ON
def test_opcheck(on, op, case):
    overload = getattr(on.ops, op).default
    args = sample_inputs(op, case, on.device)
    torch.library.opcheck(overload, args)
    if op in FORWARD and case.layout in ("channels-last", "expanded"):
        torch.library.opcheck(overload, (args[0].requires_grad_(), *args[1:]))


@KERNELS_ON
def test_compiled_and_triton_operators_have_names_of_their_own(on):
    prefix = "triton_" if on.name == "triton" else ""
    for op in DIFFUSION_OPS:
        assert str(getattr(on.ops, op)) == f"ddpm_fast.{prefix}{op}"


def test_the_schemas_show_what_is_written():
    for op in DIFFUSION_OPS:
        written = [
            a.name
            for a in getattr(torch.ops.ddpm_fast, op).default._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        expected = {
            "reverse_step_": ["x", "model_input", "pred_x0", "second", "history"],
            "philox_normal_": ["out"],
        }
        assert written == expected.get(op, [])
        assert op.endswith("_") == bool(written)


# Gradients


def differentiable(on, op, t):
    """A function of the tensors that an update is differentiable in."""

    def run(x0, other=None):
        if op == "q_sample":
            return q_sample(x0, t, other, SCHEDULE, backend=on.name)
        if op == "q_posterior":
            return q_posterior(x0, other, t, SCHEDULE, backend=on.name)[0]
        return q_sample_philox(x0, t, SCHEDULE, 1, backend=on.name)[0]

    return run


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("on", [b for b in backends() if b.name in ("reference", "cpu")], ids=str)
def test_gradients_in_float64(on, op, layout):
    tensors = [normals((2, 2, 3, 2), layout, F64, s, on.device) for s in (1, 2)]
    tensors = tensors[: 1 if op == "q_sample_philox" else 2]
    run = differentiable(on, op, torch.tensor([3, 700], device=on.device))
    inputs = tuple(x.requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@ON
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("op", FORWARD)
def test_the_gradient_is_the_coefficient(on, op, dtype):
    x0, other = (normals((2, 3, 4), "contiguous", dtype, s, on.device) for s in (1, 2))
    t = torch.tensor([3, 700], device=on.device)
    inputs = (x0,) if op == "q_sample_philox" else (x0, other)
    for x in inputs:
        x.requires_grad_()
    upstream = normals((2, 3, 4), "contiguous", dtype, 3, on.device)
    differentiable(on, op, t)(*inputs).backward(upstream)
    coefs = SCHEDULE.q_posterior_coefs() if op == "q_posterior" else SCHEDULE.q_sample_coefs()
    for i, x in enumerate(inputs):
        scale = per_sample(coefs[[3, 700], i], x).to(on.device)
        torch.testing.assert_close(x.grad, (scale * upstream.float()).to(dtype))


@ON
def test_what_does_not_depend_on_the_inputs_has_no_gradient(on):
    x = torch.ones(2, 3, device=on.device, requires_grad=True)
    _, noise = q_sample_philox(x, 3, SCHEDULE, 1, backend=on.name)
    mean, variance, log_variance = q_posterior(x, x, 3, SCHEDULE, backend=on.name)
    required = [y.requires_grad for y in (noise, mean, variance, log_variance)]
    assert required == [False, True, False, False]


# Modes


@ON
def test_inference_mode_and_back(on):
    x0, noise = (normals((2, 3, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    table = StepTable.ddpm(SCHEDULE, 10)
    fresh = type(SCHEDULE).linear(1001)
    with torch.inference_mode():
        x_t = q_sample(x0, 3, noise, fresh, backend=on.name)
        q_posterior(x0, noise, 3, fresh, backend=on.name)
        x = philox_normal(2, (3, 4), 1, device=on.device, backend=on.name)
        reverse_step_(x, x_t, table, 1, noise=noise, backend=on.name)
    leaf = x0.clone().requires_grad_()
    again = q_sample(leaf, 3, noise, fresh, backend=on.name)
    again.sum().backward()
    assert same_bits(again, x_t)
    state = noise.clone()
    reverse_step_(state, x_t, table, 1, noise=noise, backend=on.name)
    assert state.isfinite().all()


def chain(on, device):
    """A function of every public update, that changes its first argument in place."""
    table, rng = StepTable.ddpm(SCHEDULE, 10), philox_rng(1, device=device)

    def run(x, out, t, step):
        x_t = q_sample(x, t, out, SCHEDULE, backend=on.name)
        mean, variance, _ = q_posterior(x, x_t, t, SCHEDULE, backend=on.name)
        generated, noise = q_sample_philox(x, t, SCHEDULE, 1, backend=on.name)
        before = x * 2
        model_input = torch.zeros_like(x, dtype=F16)
        reverse_step_(x, out, table, step, rng=rng, model_input=model_input, backend=on.name)
        return before + x, mean + variance + generated - noise, model_input

    return run


def chain_inputs(device, seed):
    x, out = (normals((3, 2, 4, 4), "channels-last", F32, s, device) for s in (seed, 2))
    t = torch.tensor([3 * seed, 700, 999 - seed], device=device)
    return x, out, t, torch.tensor([0, seed, -1], device=device)


def assert_compiled_equals_eager(on, backend):
    run = chain(on, on.device)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for seed in (1, 2):
        eager, inputs = chain_inputs(on.device, seed), chain_inputs(on.device, seed)
        expected = run(*eager)
        with torch.compiler.set_stance("default" if seed == 1 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*inputs), expected)
        assert same_bits(inputs[0], eager[0])


@KERNELS_ON
def test_compiles_as_one_graph_and_not_again_for_other_timesteps(on):
    assert_compiled_equals_eager(on, "aot_eager")


@pytest.mark.slow
@KERNELS_ON
def test_compiles_with_inductor(on):
    assert_compiled_equals_eager(on, "inductor")


def test_compiled_training_has_the_gradient_of_eager():
    def loss(x0, noise, t):
        return (q_sample(x0, t, noise, SCHEDULE, backend="cpu") ** 2).sum()

    noise, t = normals((3, 2, 4), "contiguous", F32, 2, "cpu"), torch.tensor([1, 500, 900])
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x0 = normals((3, 2, 4), "contiguous", F32, 1, "cpu").requires_grad_()
        function(x0, noise, t).backward()
        grads.append(x0.grad)
    torch.testing.assert_close(*grads)


# Choice


def test_auto_is_the_fastest_that_runs_and_is_logged(caplog, monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.dispatch._CACHE", {})
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        assert get_backend("auto", torch.device("cpu"), F32).name == "cpu"
        assert get_backend("auto", torch.device("meta"), F32).name == "reference"
    assert "backend auto: cpu on cpu for torch.float32" in caplog.text


def test_auto_falls_back_where_the_library_is_not_built(monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.dispatch._CACHE", {})
    monkeypatch.setitem(NOT_LOADED, "cpu", "ddpm_fast/_ops_cpu is not built")
    assert get_backend("auto", torch.device("cpu"), F32).name == "reference"
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: .* not built; build it with `pip"):
        get_backend("cpu", torch.device("cpu"), F32)


def test_every_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    where = torch.device("cpu")
    assert "TRITON_INTERPRET=1" in unavailable_reason("triton", where)
    assert "CUDA tensors" in unavailable_reason("cuda", where)
    assert "CPU tensors" in unavailable_reason("cpu", torch.device("meta"))
    assert [unavailable_reason(b, where) for b in ("reference", "cpu")] == [None, None]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        pytest.param("80 86", (8, 6), True, id="built-for-it"),
        pytest.param("80", (8, 9), True, id="same-major-newer"),
        pytest.param("86", (8, 0), False, id="same-major-older"),
        pytest.param("80", (9, 0), False, id="other-major"),
        pytest.param("80+PTX", (9, 0), True, id="ptx-compiles-on"),
        pytest.param("90a+PTX", (8, 9), False, id="ptx-for-a-newer-one"),
        pytest.param("90a", (9, 0), True, id="specific"),
        pytest.param("90a", (9, 1), False, id="specific-other-minor"),
        pytest.param("90a+PTX", (12, 0), True, id="specific-ptx"),
        pytest.param("", (9, 0), False, id="nothing-built"),
    ],
)
def test_which_gpus_a_build_covers(built, capability, runs):
    assert runs_on(built.split(), capability) is runs
