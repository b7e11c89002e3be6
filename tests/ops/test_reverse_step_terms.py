"""reverse_step_ with guidance, a learned variance, thresholds, past values and a second state.

The operator is called directly. Every column that the flags do not use is NaN.
"""

from __future__ import annotations

import pytest
import torch

from cases import (
    BF16,
    F16,
    F32,
    F64,
    WRITABLE,
    Case,
    backends,
    cases,
    each,
    normals,
    same_bits,
)
from ddpm_fast.ops.row import RowFlag, column
from reverse_step_cases import (
    EVERYTHING,
    INF,
    NAN,
    PAST,
    STATE,
    STEPS,
    TERMS,
    Step,
    assert_exact,
    rows_for,
    step_of,
)

BACKENDS = backends()
KERNELS = [b for b in BACKENDS if b.name != "reference"]
ON = pytest.mark.parametrize("on", BACKENDS, ids=str)
KERNELS_ON = pytest.mark.parametrize("on", KERNELS, ids=str)


@ON
@pytest.mark.parametrize(
    ("flags", "source"),
    [pytest.param(flags, "input", id=name) for name, flags in TERMS.items()]
    + [
        pytest.param(TERMS[name], source, id=f"{name}-{source}")
        for name in ("learned", "everything")
        for source in ("generated", "none")
    ],
)
def test_each_term_is_the_equation(on, flags, source):
    assert_exact(step_of(flags, Case("odd-hw", "channels-last"), on.device, source), on)


@ON
@pytest.mark.parametrize("flags", list(RowFlag), ids=lambda flag: flag.name)
def test_all_terms_but_one(on, flags):
    chosen = EVERYTHING & ~flags
    if not chosen & RowFlag.PUSH:
        chosen &= ~(PAST | RowFlag.PUSH_OUT)
    assert_exact(step_of(chosen, Case("odd-hw", "channels-last"), on.device, "generated"), on)


@pytest.mark.parametrize(("on", "case"), each(cases(WRITABLE), BACKENDS))
def test_every_layout_and_dtype(on, case):
    """The outputs and model_input have the dtype of the case, the state float32 or float64.

    Output and variance are halves of one tensor, but for contiguous tensors.
    """
    step = step_of(EVERYTHING, case, on.device, split=case.layout != "contiguous")
    strides = {name: getattr(step, name).stride() for name in STATE}
    assert_exact(step, on)
    assert strides == {name: getattr(step, name).stride() for name in STATE}


@KERNELS_ON
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [*((channels, F16) for channels in (1, 2, 3, 4, 5, 17)), (3, F32), (5, BF16), (3, F64)],
    ids=str,
)
def test_halves_of_an_output_are_the_bits_of_tensors_apart(on, channels, dtype):
    """[N, 2 C, H, W] channels-last: runs of C elements, from any first one of a block on."""
    if dtype == F64 and on.name not in ("reference", "cpu"):
        pytest.skip("float64 runs in the backends reference and cpu only")
    state = F64 if dtype == F64 else F32
    shape = (2, channels, 37, 41)
    whole = normals((2, 2 * channels, 37, 41), "channels-last", dtype, 2, on.device)
    results = []
    for apart in (False, True):
        out, variance = whole[:, :channels], whole[:, channels:]
        step = Step(
            normals(shape, "channels-last", state, 1, on.device),
            out.contiguous() if apart else out,
            rows_for(RowFlag.LEARNED, 0, state, on.device),
            torch.tensor([1, 3], device=on.device),
            noise=normals(shape, "channels-last", state, 3, on.device),
            flags=int(RowFlag.LEARNED),
            log_variance=variance.contiguous() if apart else variance,
        )
        results.append(step.run(on).x)
    assert same_bits(*results)


@ON
def test_a_plain_step_of_halves(on):
    """The first half of an output whose variance is not used."""
    whole = normals((2, 6, 37, 41), "channels-last", F32, 2, on.device)
    case = Case("odd-hw")
    results = []
    for out in (whole[:, :3], whole[:, :3].contiguous()):
        step = step_of(RowFlag.CLIP, case, on.device, "none")
        step.x = normals(out.shape, "channels-last", F32, 1, on.device)
        step.model_output, step.model_input, step.pred_x0 = out, None, None
        results.append(step.run(on).x)
    assert same_bits(*results)


@ON
@pytest.mark.parametrize(
    ("reads", "depth"), [(reads, depth) for depth in (1, 2, 3) for reads in range(1, depth + 1)]
)
def test_a_chain_reads_what_it_has_pushed(on, reads, depth):
    """Row after row, each with its slot: h_k is what was pushed k pushes ago."""
    flags = RowFlag[f"H{reads}"] | RowFlag.PUSH | RowFlag.CLIP
    step = step_of(flags, Case("odd-hw"), on.device, "none", depth)
    pushes = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=F64)
    rows = step.rows[1:2].cpu().double().repeat(len(pushes), 1)
    rows[:, column("push")] = pushes
    rows[:, column("slot")] = (pushes.cumsum(0) - pushes) % depth
    step.rows = rows.to(step.rows)
    stored = [step.history[(-1 - k) % depth].cpu().double() for k in range(depth)]  # newest first
    of = {name: float(step.rows[0, column(name)]) for name in ("P", "Q", "Xx", "Xx0", "Hx", "Hv")}
    past = float(step.rows[0, column(f"Xh{reads}")])
    for i, push in enumerate(pushes.tolist()):
        x = step.x.cpu().double()
        x0 = (of["P"] * x + of["Q"] * step.model_output.cpu().double()).clamp(-0.4, 0.4)
        expected = of["Xx"] * x + of["Xx0"] * x0 + past * stored[reads - 1]
        if push:
            stored = [of["Hx"] * x + of["Hv"] * x0, *stored][:depth]
        step.step = torch.full_like(step.step, i)
        step.run(on)
        torch.testing.assert_close(step.x.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@ON
@pytest.mark.parametrize("source", ["input", "generated"])
def test_a_sample_outside_the_table_is_left_alone(on, source):
    """In every tensor, also where its values are NaN."""
    case = Case("many-samples", "channels-last")
    step = step_of(EVERYTHING, case, on.device, source, split=True)
    ended = torch.arange(case.shape[0], device=on.device) % 2 == 0
    far = torch.tensor([-1, STEPS, -(2**62), 2**62], device=on.device)
    step.step = torch.where(ended, far.repeat(case.shape[0] // 4), step.step)
    step.second[ended, 0] = step.history[:, ended, 1] = step.model_output2[ended] = NAN
    before = step.copy()
    step.run(on)
    for name in STATE:
        new, old = getattr(step, name), getattr(before, name)
        samples = 1 if name == "history" else 0
        new, old = new.movedim(samples, 0), old.movedim(samples, 0)
        assert same_bits(new[ended], old[ended])
        assert not same_bits(new[~ended], old[~ended])


@ON
def test_nothing_is_pushed_where_the_row_does_not(on):
    step = step_of(TERMS["one-past"], Case("odd-hw"), on.device)
    step.step = torch.tensor([0, 1], device=on.device)  # the first row does not push
    before = step.copy()
    step.run(on)
    assert same_bits(step.history[:, 0], before.history[:, 0])
    assert not same_bits(step.history[:, 1], before.history[:, 1])


@ON
@pytest.mark.parametrize("layout", ["sliced", "gapped"])
def test_memory_between_the_elements_is_left_alone(on, layout):
    step = step_of(EVERYTHING, Case("odd-hw", layout, layout), on.device).run(on)
    for tensor in (step.x, step.model_input, step.pred_x0, step.second, step.history):
        memory = torch.empty(0, dtype=tensor.dtype, device=on.device)
        memory.set_(tensor.untyped_storage())
        assert int((~memory.isnan()).sum()) == tensor.numel()


@ON
@pytest.mark.parametrize("where", ["x", "model_output", "model_output2", "log_variance", "noise"])
def test_nan_passes_the_threshold_and_stays_in_its_element(on, where):
    step = step_of(EVERYTHING, Case("odd-hw", "channels-last"), on.device)
    getattr(step, where)[1, 2, 3, 0] = NAN
    step.run(on)
    spot = torch.zeros_like(step.x, dtype=torch.bool)
    spot[1, 2, 3, 0] = True
    of_noise = where in ("log_variance", "noise")
    assert torch.equal(step.x.isnan(), spot)
    assert torch.equal(step.model_input.isnan(), spot)
    for tensor in (step.pred_x0, step.second, *step.history.sum(0, keepdim=True)):
        assert torch.equal(tensor.isnan(), spot & (not of_noise))


@ON
def test_an_infinite_x0_is_thresholded(on):
    step = step_of(RowFlag.THRESHOLD, Case("odd-hw"), on.device)
    step.model_output[0, 0, 0, 0], step.model_output[1, 2, 3, 4] = INF, -INF
    signs = torch.sign(step.rows[step.step, column("Q")])
    step.run(on)
    assert step.x.isfinite().all()
    assert step.pred_x0[0, 0, 0, 0] == signs[0]
    assert step.pred_x0[1, 2, 3, 4] == -signs[1]


@ON
def test_a_variance_without_noise_is_not_read(on):
    step = step_of(RowFlag.LEARNED, Case("odd-hw"), on.device, "none")
    step.log_variance.fill_(NAN)
    assert step.run(on).x.isfinite().all()


@KERNELS_ON
@pytest.mark.parametrize(
    "case", [Case("partial-block", "channels-last"), Case("many-samples")], ids=str
)
def test_kernels_agree_bit_for_bit(on, case):
    """Every backend with kernels, and on the CPU every instruction set."""
    use = torch.ops.ddpm_fast.use_cpu_kernels
    step = step_of(EVERYTHING, case, on.device, "generated", split=True)
    expected = step.copy().run(KERNELS[0])
    try:
        for name in ("baseline", "avx2", "avx512") if on.name == "cpu" else ("auto",):
            try:
                use(name)
            except RuntimeError:
                continue  # cannot run here
            got = step.copy().run(on)
            assert all(same_bits(getattr(got, n), getattr(expected, n)) for n in STATE), name
    finally:
        use("auto")


@KERNELS_ON
@pytest.mark.parametrize(
    ("flags", "source"),
    [
        pytest.param(TERMS["one-past"], "input", id="one-past"),
        pytest.param(EVERYTHING, "generated", id="everything"),
    ],
)
def test_opcheck(on, flags, source):
    step = step_of(flags, Case("odd-hw", "channels-last"), on.device, source)
    torch.library.opcheck(on.ops.reverse_step_.default, step.arguments())


BAD = [
    ("model_output2", lambda v: None, "model_output2 must be a tensor with these flags"),
    ("log_variance", lambda v: None, "log_variance must be a tensor with these flags"),
    ("threshold", lambda v: None, "threshold must be a tensor with these flags"),
    ("second", lambda v: None, "second must be a tensor with these flags"),
    ("history", lambda v: None, "history must be a tensor with these flags"),
    ("model_output2", lambda v: v[:1], "model_output2 must have the shape"),
    ("log_variance", lambda v: v[:, :1], "log_variance must have the shape"),
    ("second", lambda v: v[..., :1], "second must have the shape"),
    ("second", lambda v: v.double(), "second must have the dtype"),
    ("history", lambda v: v.half(), "history must have the dtype"),
    ("history", lambda v: v[:2], "history must be .* 3 to 3 slots"),
    ("history", lambda v: v.repeat(2, 1, 1, 1, 1), "history must be .* 3 to 3 slots"),
    ("history", lambda v: v[0], "history must be"),
    ("history", lambda v: v[:, :, :1], "history must have the shape"),
    ("threshold", lambda v: v[:1], "threshold must be float32 with one value"),
    ("threshold", lambda v: v.double(), "threshold must be float32"),
    ("threshold", lambda v: v[:, None], "threshold must be float32 with one value"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[b[2].split(" .")[0] for b in BAD])
def test_the_compiled_operator_names_what_does_not_fit(name, change, message):
    step = step_of(EVERYTHING, Case("odd-hw"), "cpu")
    setattr(step, name, change(getattr(step, name)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddpm_fast.reverse_step_(*step.arguments())


@pytest.mark.parametrize(
    "name", ["model_output2", "log_variance", "threshold", "second", "history"]
)
def test_the_compiled_operator_refuses_a_term_without_its_flag(name):
    step = step_of(EVERYTHING, Case("odd-hw"), "cpu")
    step.flags = int(RowFlag.RAW_OUT)
    for other in ("model_output2", "log_variance", "threshold", "second", "history"):
        if other != name:
            setattr(step, other, None)
    with pytest.raises(RuntimeError, match=f"{name} must be None with these flags; got a tensor"):
        torch.ops.ddpm_fast.reverse_step_(*step.arguments())
