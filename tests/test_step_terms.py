"""reverse_step_ with guidance, a learned variance, thresholds, past values and a second state.

Straight through the operator, on rows made by hand. Every column that the flags leave out is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from cases import (
    BF16,
    F16,
    F32,
    F64,
    FIRST,
    SEED,
    WRITABLE,
    Case,
    assert_rounded_once,
    backends,
    cases,
    each,
    normals,
    per_sample,
    same_bits,
)
from ddpm_fast import philox_normal, philox_rng
from ddpm_fast.ops import implementation
from ddpm_fast.row import ROW_WIDTH, RowFlag, column, history_depth

INF, NAN = math.inf, math.nan
STEPS = 4
BACKENDS = backends()
KERNELS = [b for b in BACKENDS if b.name != "reference"]
ON = pytest.mark.parametrize("on", BACKENDS, ids=str)
KERNELS_ON = pytest.mark.parametrize("on", KERNELS, ids=str)

PAST = RowFlag.H1 | RowFlag.H2 | RowFlag.H3
EVERYTHING = RowFlag(sum(RowFlag)) & ~RowFlag.CLIP
TERMS = {
    "guided": RowFlag.GUIDE | RowFlag.CLIP,
    "guided-raw": RowFlag.GUIDE | RowFlag.RAW_OUT,
    "learned": RowFlag.LEARNED | RowFlag.CLIP,
    "threshold": RowFlag.THRESHOLD,
    "threshold-before-clip": RowFlag.THRESHOLD | RowFlag.CLIP,
    "one-past": RowFlag.H1 | RowFlag.PUSH | RowFlag.CLIP,
    "second-past-alone": RowFlag.H2 | RowFlag.PUSH,
    "three-past-of-outputs": PAST | RowFlag.PUSH | RowFlag.PUSH_OUT | RowFlag.RAW_OUT,
    "second": RowFlag.SECOND,
    "second-with-past": RowFlag.SECOND | RowFlag.H1 | RowFlag.H2 | RowFlag.PUSH | RowFlag.CLIP,
    "everything": EVERYTHING,
}
USED = {
    RowFlag(0): ("P", "Q", "Xx", "Xx0", "S"),
    RowFlag.CLIP: ("clip",),
    RowFlag.RAW_OUT: ("Xo",),
    RowFlag.SCALE_IN: ("Cin",),
    RowFlag.GUIDE: ("G0", "G1"),
    RowFlag.LEARNED: ("Lmin", "Lmax"),
    RowFlag.H1: ("Xh1", "slot"),
    RowFlag.H2: ("Xh2", "slot"),
    RowFlag.H3: ("Xh3", "slot"),
    RowFlag.PUSH: ("Hx", "Hv", "push", "slot"),
    RowFlag.PUSH_OUT: ("Ho",),
    RowFlag.SECOND: ("Xy", "Yx", "Yy", "Yx0"),
    RowFlag.SECOND | RowFlag.H1: ("Yh1",),
    RowFlag.SECOND | RowFlag.H2: ("Yh2",),
    RowFlag.SECOND | RowFlag.H3: ("Yh3",),
}


@dataclass
class Step:
    """The arguments of the operator, in its order."""

    x: Tensor
    model_output: Tensor
    rows: Tensor
    step: Tensor
    noise: Tensor | None = None
    rng: Tensor | None = None
    model_input: Tensor | None = None
    pred_x0: Tensor | None = None
    flags: int = 0
    model_output2: Tensor | None = None
    log_variance: Tensor | None = None
    threshold: Tensor | None = None
    second: Tensor | None = None
    history: Tensor | None = None

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))

    def run(self, on) -> Step:
        device = self.x.device
        implementation(on.name, device, self.x.dtype).reverse_step_(*self.arguments())
        return self

    def copy(self) -> Step:
        """With state of its own; the same strides."""
        fresh = Step(*self.arguments())
        for name in STATE:
            if (tensor := getattr(self, name)) is not None:
                setattr(fresh, name, torch.empty_like(tensor).copy_(tensor))
        return fresh

    def has(self, flag: RowFlag) -> bool:
        return bool(self.flags & flag)


STATE = ("x", "pred_x0", "model_input", "second", "history")


def rows_for(flags: RowFlag, depth: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of coefficients in [-1, 1): every slot in turn, pushes in all rows but the first."""
    random = torch.rand(STEPS, ROW_WIDTH, generator=torch.Generator().manual_seed(7), dtype=F64)
    values = {"clip": 0.4, "push": [0, 1, 1, 1], "slot": [i % max(depth, 1) for i in range(STEPS)]}
    rows = torch.full((STEPS, ROW_WIDTH), NAN, dtype=F64)
    for flag, names in USED.items():
        if flag & flags != flag:
            continue
        for name in names:
            chosen = values.get(name, 2 * random[:, column(name)] - 1)
            rows[:, column(name)] = torch.as_tensor(chosen, dtype=F64)
    rows[:, column("ratio")] = rows[:, column("Q")] / rows[:, column("P")]
    return rows.to(device, dtype)


def halves(case: Case, device: str, split: bool) -> tuple[Tensor, Tensor]:
    """An output and its variance, in one tensor where they can be."""
    if not split or len(case.shape) < 2:
        return case.others(device, 2), case.others(device, 3)
    n, channels, *space = case.shape
    whole = normals((n, 2 * channels, *space), case.layout, case.dtype, 2, device)
    return whole[:, :channels], whole[:, channels:]


def step_of(
    flags: RowFlag,
    case: Case,
    device: str,
    source: str = "given",
    depth: int | None = None,
    split: bool = False,
) -> Step:
    """A step with all the tensors that the flags need; source: given, made or none."""
    state = F64 if case.dtype == F64 else F32
    depth = history_depth(flags) if depth is None else depth
    layout = case.other if case.other in WRITABLE else "contiguous"

    def like_state(seed: int) -> Tensor:
        return normals(case.shape, layout, state, seed, device)

    out, variance = halves(case, device, split)
    made = Step(
        case.tensor(device, 1, dtype=state),
        out,
        rows_for(flags, depth, state, device),
        case.timesteps(device, STEPS),
        noise=like_state(4) if source == "given" else None,
        rng=philox_rng(SEED, 1, FIRST, device) if source == "made" else None,
        model_input=case.tensor(device, 5).fill_(NAN),
        pred_x0=like_state(6).fill_(NAN),
        flags=int(flags),
    )
    if flags & RowFlag.GUIDE:
        made.model_output2 = case.others(device, 8)
    if flags & RowFlag.LEARNED:
        made.log_variance = variance
    if flags & RowFlag.THRESHOLD:
        bounds = torch.linspace(0.3, 1.2, 2 * case.shape[0], dtype=state, device=device)
        made.threshold = bounds[::2]
    if flags & RowFlag.SECOND:
        made.second = like_state(9)
    if depth:
        slots = [normals(case.shape, case.layout, state, 10 + i, device) for i in range(depth)]
        ring = normals((depth * case.shape[0], *case.shape[1:]), case.layout, state, 20, device)
        made.history = ring.unflatten(0, (depth, case.shape[0]))
        for slot, values in zip(made.history, slots, strict=True):
            slot.copy_(values)
    return made


def made_noise(step: Step, on) -> Tensor | None:
    """The noise of each sample's row, bit for bit."""
    if step.rng is None:
        return step.noise
    shape = step.x.shape
    each_sample = [
        philox_normal(1, shape[1:], SEED, 1 + i, FIRST + n, on.device, on.name)
        for n, i in enumerate(step.step.tolist())
    ]
    return torch.cat(each_sample).to(step.x.dtype) if each_sample else torch.empty_like(step.x)


class Value:
    """A float64 value and the sum of the magnitudes of its terms."""

    def __init__(self, value: Tensor, magnitude: Tensor | None = None):
        self.value = value
        self.magnitude = value.abs() if magnitude is None else magnitude

    def __add__(self, other: Value) -> Value:
        return Value(self.value + other.value, self.magnitude + other.magnitude)

    def __rmul__(self, factor: Tensor) -> Value:
        return Value(factor * self.value, factor.abs() * self.magnitude)


def exact(step: Step, noise: Tensor | None) -> dict[str, Value]:
    """The equation of ddpm_fast.row, in float64: of every tensor that is written."""
    rows = step.rows.cpu().double()[step.step.cpu()]

    def of(name: str) -> Tensor:
        return per_sample(rows[:, column(name)], step.x)

    def read(tensor: Tensor) -> Value:
        return Value(tensor.cpu().double())

    x, o = read(step.x), read(step.model_output)
    if step.has(RowFlag.GUIDE):
        o = of("G0") * o + of("G1") * read(step.model_output2)
    x0 = of("P") * x + of("Q") * o
    if step.has(RowFlag.THRESHOLD):
        s = per_sample(step.threshold.cpu().double(), step.x)
        x0 = Value(torch.maximum(torch.minimum(x0.value, s), -s) / s, x0.magnitude / s)
    elif step.has(RowFlag.CLIP):
        c = of("clip")
        x0 = Value(torch.maximum(torch.minimum(x0.value, c), -c), x0.magnitude)
    next_x, next_y = of("Xx") * x + of("Xx0") * x0, None
    if step.has(RowFlag.RAW_OUT):
        next_x += of("Xo") * o
    if step.has(RowFlag.SECOND):
        y = read(step.second)
        next_x += of("Xy") * y
        next_y = of("Yx") * x + of("Yx0") * x0 + of("Yy") * y
    for k in (1, 2, 3):
        if not step.has(RowFlag[f"H{k}"]):
            continue
        depth = step.history.shape[0]
        slots = [(int(i) - k) % depth for i in rows[:, column("slot")]]
        h = torch.stack([step.history[i, n] for n, i in enumerate(slots)]) if slots else step.x
        next_x += of(f"Xh{k}") * read(h)
        if next_y is not None:
            next_y += of(f"Yh{k}") * read(h)
    if noise is not None:
        z = read(noise)
        if step.has(RowFlag.LEARNED):
            low, spread = of("Lmin"), of("Lmax") - of("Lmin")
            v = step.log_variance.cpu().double()
            e = torch.exp((low + v * spread) / 2)
            z = Value(e * z.value, e * z.magnitude * (1 + low.abs() + (v * spread).abs()))
        next_x += of("S") * z
    scale = of("Cin") if step.has(RowFlag.SCALE_IN) else torch.ones(())
    written = {"x": next_x, "pred_x0": x0, "model_input": scale * next_x}
    if next_y is not None:
        written["second"] = next_y
    if step.history is not None:
        pushed = of("Hx") * x + of("Hv") * x0
        if step.has(RowFlag.PUSH_OUT):
            pushed += of("Ho") * o
        ring = step.history.cpu().double().clone()
        magnitude = torch.zeros_like(ring)
        for n, row in enumerate(rows):
            if row[column("push")]:
                slot = int(row[column("slot")])
                ring[slot, n], magnitude[slot, n] = pushed.value[n], pushed.magnitude[n]
        written["history"] = Value(ring, magnitude)
    return written


def assert_exact(step: Step, on) -> None:
    """Runs a step. There are up to eight terms in a sum: twice the roundings of a plain step."""
    expected = exact(step, made_noise(step, on))
    step.run(on)
    for name, result in expected.items():
        assert_rounded_once(getattr(step, name), result.value, 2 * result.magnitude)


@ON
@pytest.mark.parametrize("source", ["given", "made", "none"])
@pytest.mark.parametrize("flags", TERMS.values(), ids=TERMS)
def test_each_term_is_the_equation(on, flags, source):
    assert_exact(step_of(flags, Case("odd-hw", "channels-last"), on.device, source), on)


@ON
@pytest.mark.parametrize("flags", list(RowFlag), ids=lambda flag: flag.name)
def test_all_terms_but_one(on, flags):
    chosen = EVERYTHING & ~flags
    if not chosen & RowFlag.PUSH:
        chosen &= ~(PAST | RowFlag.PUSH_OUT)
    assert_exact(step_of(chosen, Case("partial-block", "channels-last"), on.device, "made"), on)


@pytest.mark.parametrize("split", [False, True], ids=["apart", "split"])
@pytest.mark.parametrize(("on", "case"), each(cases(WRITABLE), BACKENDS))
def test_every_layout_and_dtype(on, case, split):
    """The outputs and model_input have the case's dtype, the state is float32 or float64."""
    step = step_of(EVERYTHING, case, on.device, split=split)
    strides = {name: getattr(step, name).stride() for name in STATE}
    assert_exact(step, on)
    assert strides == {name: getattr(step, name).stride() for name in STATE}


@ON
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 17])
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
    kept = [step.history[(-1 - k) % depth].cpu().double() for k in range(depth)]  # newest first
    of = {name: float(step.rows[0, column(name)]) for name in ("P", "Q", "Xx", "Xx0", "Hx", "Hv")}
    past = float(step.rows[0, column(f"Xh{reads}")])
    for i, push in enumerate(pushes.tolist()):
        x = step.x.cpu().double()
        x0 = (of["P"] * x + of["Q"] * step.model_output.cpu().double()).clamp(-0.4, 0.4)
        expected = of["Xx"] * x + of["Xx0"] * x0 + past * kept[reads - 1]
        if push:
            kept = [of["Hx"] * x + of["Hv"] * x0, *kept][:depth]
        step.step = torch.full_like(step.step, i)
        step.run(on)
        torch.testing.assert_close(step.x.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@ON
@pytest.mark.parametrize("source", ["given", "made"])
def test_a_sample_outside_the_table_is_left_alone(on, source):
    """In every tensor, also where its values are NaN."""
    case = Case("many-blocks", "channels-last")
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
    "case", [Case("partial-block", "channels-last"), Case("many-blocks")], ids=str
)
def test_kernels_agree_bit_for_bit(on, case):
    """Every backend with kernels, and on the CPU every instruction set."""
    use = torch.ops.ddpm_fast.use_cpu_kernels
    step = step_of(EVERYTHING, case, on.device, "made", split=True)
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
@pytest.mark.parametrize("flags", [TERMS["one-past"], EVERYTHING], ids=["one-past", "everything"])
def test_opcheck(on, flags):
    overload = implementation(on.name, torch.device(on.device), F32).reverse_step_.default
    for source in ("given", "made"):
        step = step_of(flags, Case("odd-hw", "channels-last"), on.device, source)
        torch.library.opcheck(overload, step.arguments())


BAD = [
    ("model_output2", lambda v: None, "model_output2 is needed"),
    ("log_variance", lambda v: None, "log_variance is needed"),
    ("threshold", lambda v: None, "threshold is needed"),
    ("second", lambda v: None, "second is needed"),
    ("history", lambda v: None, "history is needed"),
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
    with pytest.raises(RuntimeError, match=f"{name} is no term of the flags"):
        torch.ops.ddpm_fast.reverse_step_(*step.arguments())
