"""reverse_step: the step whose results are new tensors. Values, layouts, bits, gradients, errors.

The operator is called directly. Every column that the flags do not use is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    F16,
    F32,
    F64,
    BackendOnDevice,
    Case,
    assert_rounded_once,
    backends,
    cases,
    each,
    kernel_backends,
    same_bits,
)
from ddpm_fast.ops import reference
from ddpm_fast.ops.row import FUNCTIONAL_FLAGS, RowFlag
from reverse_step_cases import INF, NAN, STEPS, Step, exact, output_and_variance, rows_for

ON = pytest.mark.parametrize("on", backends(), ids=str)
KERNELS_ON = pytest.mark.parametrize("on", kernel_backends(), ids=str)
CPU = BackendOnDevice("cpu", "cpu")
FLAGS = {
    "plain": RowFlag(0),
    "clipped": RowFlag.CLIP,
    "raw": RowFlag.CLIP | RowFlag.RAW_OUT,
    "learned": RowFlag.CLIP | RowFlag.LEARNED,
    "learned-raw": RowFlag.LEARNED | RowFlag.RAW_OUT,
    "threshold": RowFlag.THRESHOLD,
    "every": FUNCTIONAL_FLAGS,
}
EVERY_FLAG = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def step_of(
    flags: RowFlag, case: Case, device: str, noisy: bool = True, split: bool = False
) -> Step:
    """A step with the tensors that the flags need, in the dtype of the case.

    split: the variance is the second half of one tensor with the output.
    """
    arithmetic = F64 if case.dtype == F64 else F32
    out, variance = output_and_variance(case, device, split)
    bounds = torch.linspace(0.3, 1.2, 2 * case.shape[0], dtype=arithmetic, device=device)
    return Step(
        case.tensor(device, 1),
        out,
        rows_for(flags, 0, arithmetic, device),
        case.timesteps(device, STEPS),
        noise=case.others(device, 4) if noisy else None,
        flags=int(flags),
        log_variance=variance if flags & RowFlag.LEARNED else None,
        threshold=bounds[::2] if flags & RowFlag.THRESHOLD else None,
    )


def arguments(step: Step) -> tuple[Any, ...]:
    """Of the operator, in its order."""
    read = (step.x, step.model_output, step.rows, step.step, step.noise)
    return *read, step.flags, step.log_variance, step.threshold


def results(step: Step, on: BackendOnDevice) -> tuple[Tensor, Tensor]:
    """x' and x0; what is read has to stay as it was."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments(step)]
    found = on.ops.reverse_step(*arguments(step))
    for old, new in zip(before, arguments(step), strict=True):
        assert same_bits(old, new) if isinstance(old, Tensor) else old == new
    return found


def assert_exact(step: Step, on: BackendOnDevice) -> None:
    expected = exact(step, step.noise)
    for ours, name in zip(results(step, on), ("x", "pred_x0"), strict=True):
        assert_rounded_once(ours, expected[name].value, 2 * expected[name].magnitude)
        assert ours.dtype == step.x.dtype
        assert ours.device == step.x.device
        assert ours.stride() == torch.empty_like(step.x).stride()


@ON
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "no-noise"])
@EVERY_FLAG
def test_each_term_is_the_equation(on, flags, noisy):
    assert_exact(step_of(flags, Case("odd-hw", "channels-last"), on.device, noisy), on)


@pytest.mark.parametrize(
    ("name", "split"), [("clipped", False), ("every", True)], ids=["clipped-apart", "every-split"]
)
@pytest.mark.parametrize(("on", "case"), each(cases()))
def test_every_layout_and_dtype(on, case, split, name):
    assert_exact(step_of(FLAGS[name], case, on.device, split=split), on)


@ON
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_read_may_have_another_dtype_than_x(on, dtype):
    step = step_of(FLAGS["every"], Case("odd-hw", dtype=dtype), on.device)
    other = F32 if dtype == F16 else F16
    step.model_output, step.log_variance = step.model_output.to(other), step.log_variance.to(other)
    assert_exact(step, on)


@ON
@EVERY_FLAG
def test_the_bits_are_those_of_a_step_in_place(on, flags):
    step = step_of(flags, Case("partial-block", "channels-last"), on.device, split=True)
    ours = results(step, on)
    step.x, step.pred_x0 = step.x.clone(), torch.empty_like(step.x)
    step.run(on)
    assert all(map(same_bits, ours, (step.x, step.pred_x0)))


@pytest.mark.parametrize(("on", "case"), each(cases(), kernel_backends()[1:]))
def test_kernels_agree_bit_for_bit_with_cpu(on, case):
    flags = FLAGS["every"]
    ours = results(step_of(flags, case, on.device, split=True), on)
    assert all(map(same_bits, ours, results(step_of(flags, case, "cpu", split=True), CPU)))


@pytest.mark.parametrize(
    ("flags", "layout", "kernels"),
    [
        pytest.param(flags, "channels-last", kernels, id=f"{name}-{kernels}")
        for name, flags in FLAGS.items()
        for kernels in ("baseline", "avx512")
    ]
    + [pytest.param(FLAGS["every"], "channels-last", "avx2", id="every-avx2")]
    + [
        pytest.param(FLAGS["every"], layout, "avx512", id=f"every-{layout}")
        for layout in ("contiguous", "sliced")
    ],
)
def test_instruction_sets_and_threads_agree_bit_for_bit(
    cpu_kernels, two_threads, flags, layout, kernels
):
    step = step_of(flags, Case("many-blocks", layout), "cpu", split=True)
    expected = results(step, CPU)
    torch.set_num_threads(1)
    cpu_kernels(kernels)
    assert all(map(same_bits, results(step, CPU), expected))


@ON
@pytest.mark.parametrize(
    ("flags", "name"),
    [pytest.param(flags, "many-samples", id=name) for name, flags in FLAGS.items()]
    + [pytest.param(FLAGS["every"], shape, id=shape) for shape in ("partial-block", "two-dim")],
)
def test_a_sample_outside_the_table_is_nan_and_no_other_is(on, flags, name):
    """Whatever the memory of the results held before, and where every value is finite."""
    case = Case(name, "channels-last")
    step = step_of(flags, case, on.device)
    ended = torch.arange(case.shape[0], device=on.device) % 2 == 0
    far = torch.tensor([-1, STEPS, -(2**62), 2**62], device=on.device)
    whole = results(step, on)
    step.step = torch.where(ended, far.repeat(case.shape[0])[: case.shape[0]], step.step)
    for ours, before in zip(results(step, on), whole, strict=True):
        assert ours[ended].isnan().all()
        assert same_bits(ours[~ended], before[~ended])


@ON
def test_each_sample_may_be_at_a_row_of_its_own_or_all_at_one(on):
    step = step_of(FLAGS["every"], Case("many-samples"), on.device)
    step.step = torch.full((1,), 2, device=on.device).expand(16)
    together = results(step, on)
    step.step = step.step.clone()
    assert all(map(same_bits, results(step, on), together))
    step.step[5] = 1
    for ours, others in zip(results(step, on), together, strict=True):
        assert same_bits(ours[6:], others[6:])
        assert not same_bits(ours[5], others[5])


@ON
@pytest.mark.parametrize("where", ["x", "model_output", "log_variance", "noise"])
def test_nan_stays_in_its_element(on, where):
    step = step_of(FLAGS["every"], Case("odd-hw", "channels-last"), on.device)
    getattr(step, where)[1, 2, 3, 0] = NAN
    spot = torch.zeros_like(step.x, dtype=torch.bool)
    spot[1, 2, 3, 0] = True
    next_x, pred_x0 = results(step, on)
    assert torch.equal(next_x.isnan(), spot)
    assert torch.equal(pred_x0.isnan(), spot & (where in ("x", "model_output")))


@ON
def test_a_term_that_no_row_uses_is_not_read(on):
    """0 * infinity is NaN: the clip bounds x0, and Xo is NaN in these rows."""
    step = step_of(RowFlag.CLIP, Case("odd-hw"), on.device)
    step.model_output[0, 0, 0, 0], step.model_output[1, 1, 1, 1] = INF, -INF
    assert all(result.isfinite().all() for result in results(step, on))


@ON
def test_what_is_read_may_be_one_tensor(on):
    step = step_of(FLAGS["learned"], Case("partial-block"), on.device)
    step.model_output = step.noise = step.log_variance = step.x
    together = results(step, on)
    step.model_output, step.noise, step.log_variance = (step.x.clone() for _ in range(3))
    assert all(map(same_bits, results(step, on), together))


# Gradients, and torch.compile


@pytest.mark.parametrize(
    ("flags", "layout"),
    [pytest.param(flags, "channels-last", id=name) for name, flags in FLAGS.items()]
    + [pytest.param(FLAGS["every"], layout, id=layout) for layout in ("contiguous", "sliced")],
)
def test_the_reference_is_differentiable(flags, layout):
    """In all that is read but the rows; with a sample outside the table, whose gradient is 0."""
    step = step_of(flags, Case("tiny", layout, dtype=F64), "cpu")
    step.step = torch.tensor([1])
    names = ["x", "model_output", "noise"]
    names += ["log_variance"] if flags & RowFlag.LEARNED else []
    names += ["threshold"] if flags & RowFlag.THRESHOLD else []

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        fresh = Step(*step.arguments())
        for name, tensor in zip(names, tensors, strict=True):
            setattr(fresh, name, tensor)
        return reference.reverse_step(*arguments(fresh))

    tensors = tuple(getattr(step, name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
    strides = torch.empty_like(step.x).stride()
    assert [result.stride() for result in run(*tensors)] == [strides, strides]
    step.step = torch.tensor([STEPS])
    grads = torch.autograd.grad([r.sum() for r in run(*tensors)], tensors)
    assert not any(grad.any() for grad in grads)


@KERNELS_ON
@pytest.mark.parametrize("flags", [FLAGS["clipped"], FLAGS["every"]], ids=["clipped", "every"])
def test_opcheck(on, flags):
    for case in (Case("odd-hw", "channels-last"), Case("odd-hw", "sliced", dtype=F16)):
        step = step_of(flags, case, on.device, split=True)
        torch.library.opcheck(on.ops.reverse_step.default, arguments(step))


@ON
def test_compiles_as_one_graph(on):
    step = step_of(FLAGS["every"], Case("odd-hw", "channels-last"), on.device)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        step.x = x + 1
        return on.ops.reverse_step(*arguments(step))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = step.x
    assert all(map(same_bits, compiled(x), run(x)))


# Errors

ELSEWHERE = [*(flag for flag in RowFlag if flag not in FUNCTIONAL_FLAGS), 4096]


@ON
@pytest.mark.parametrize("flag", ELSEWHERE, ids=str)
def test_a_term_that_only_a_step_in_place_has_is_refused(on, flag):
    step = step_of(RowFlag.CLIP, Case("odd-hw"), on.device)
    step.flags |= int(flag)
    with pytest.raises((ValueError, RuntimeError), match=f"flags {step.flags} has a term that"):
        on.ops.reverse_step(*arguments(step))


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("model_output", lambda v: v[:1], "model_output must have the shape"),
    ("noise", lambda v: v[..., :1], "noise must have the shape"),
    ("log_variance", lambda v: v[:, :1], "log_variance must have the shape"),
    ("log_variance", lambda v: None, "log_variance must be a tensor with these flags"),
    ("threshold", lambda v: None, "threshold must be a tensor with these flags"),
    ("threshold", lambda v: v.double(), "threshold must be float32 with one value"),
    ("threshold", lambda v: v[:1], "threshold must be float32 with one value"),
    ("rows", lambda v: v[:, :31], r"rows must be a contiguous \[rows, 32\]"),
    ("rows", lambda v: v.double(), "rows must be float32"),
    ("step", lambda v: v.int(), "step must be int64"),
    ("step", lambda v: v[:1], "step must be int64 with one value for each sample"),
    ("flags", lambda v: 0, "must be None with these flags"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{b[0]}-{b[2]}" for b in BAD])
def test_the_compiled_operator_names_what_does_not_fit(name, change, message):
    step = step_of(FUNCTIONAL_FLAGS, Case("odd-hw"), "cpu")
    setattr(step, name, change(getattr(step, name)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddpm_fast.reverse_step(*arguments(step))
