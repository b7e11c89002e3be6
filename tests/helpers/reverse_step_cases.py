"""Arguments of reverse_step_ with every term of the row, and its equation in float64.

`Step` has coefficients in [-1, 1), and NaN in the columns that the flags do not use. `step_inputs`
has a table of random rows, for the comparison of bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases import (
    F32,
    F64,
    FIRST,
    SEED,
    STREAM,
    WRITABLE,
    Case,
    assert_rounded_once,
    normals,
    per_sample,
)
from ddpm_fast import philox_normal, philox_rng
from ddpm_fast.ops import get_backend, reference
from ddpm_fast.ops.row import ROW_FIELDS, ROW_WIDTH, RowFlag, column, history_depth

INF, NAN = math.inf, math.nan
STEPS, RANDOM_STEPS = 4, 12
Inputs = dict[str, Any]
PLAIN = RowFlag.CLIP | RowFlag.SCALE_IN
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
        get_backend(on.name, device, self.x.dtype).reverse_step_(*self.arguments())
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


def output_and_variance(case: Case, device: str, split: bool) -> tuple[Tensor, Tensor]:
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
    source: str = "input",
    depth: int | None = None,
    split: bool = False,
) -> Step:
    """A step with all the tensors that the flags need; source: input, generated or none."""
    state = F64 if case.dtype == F64 else F32
    depth = history_depth(flags) if depth is None else depth
    layout = case.other if case.other in WRITABLE else "contiguous"

    def like_state(seed: int) -> Tensor:
        return normals(case.shape, layout, state, seed, device)

    out, variance = output_and_variance(case, device, split)
    result = Step(
        case.tensor(device, 1, dtype=state),
        out,
        rows_for(flags, depth, state, device),
        case.timesteps(device, STEPS),
        noise=like_state(4) if source == "input" else None,
        rng=philox_rng(SEED, 1, FIRST, device) if source == "generated" else None,
        model_input=case.tensor(device, 5).fill_(NAN),
        pred_x0=like_state(6).fill_(NAN),
        flags=int(flags),
    )
    if flags & RowFlag.GUIDE:
        result.model_output2 = case.others(device, 8)
    if flags & RowFlag.LEARNED:
        result.log_variance = variance
    if flags & RowFlag.THRESHOLD:
        bounds = torch.linspace(0.3, 1.2, 2 * case.shape[0], dtype=state, device=device)
        result.threshold = bounds[::2]
    if flags & RowFlag.SECOND:
        result.second = like_state(9)
    if depth:
        slots = [normals(case.shape, case.layout, state, 10 + i, device) for i in range(depth)]
        ring = normals((depth * case.shape[0], *case.shape[1:]), case.layout, state, 20, device)
        result.history = ring.unflatten(0, (depth, case.shape[0]))
        for slot, values in zip(result.history, slots, strict=True):
            slot.copy_(values)
    return result


def generated_noise(step: Step, on) -> Tensor | None:
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
    """The equation of ddpm_fast.ops.row, in float64: of every tensor that is written."""
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
    expected = exact(step, generated_noise(step, on))
    step.run(on)
    for name, result in expected.items():
        assert_rounded_once(getattr(step, name), result.value, 2 * result.magnitude)


# Random rows, for the comparison of bits

# The multistep terms one by one, then those of known solvers, then all.
SOLVER_TERMS = {
    "guided": PLAIN | RowFlag.GUIDE,
    "learned": PLAIN | RowFlag.LEARNED,
    "thresholded": RowFlag.THRESHOLD,
    "thresholded-not-clipped": RowFlag.THRESHOLD | RowFlag.CLIP,
    "one-past": PLAIN | RowFlag.H1 | RowFlag.PUSH,
    "third-past": RowFlag.H3 | RowFlag.PUSH,
    "outputs-past": RowFlag.RAW_OUT | PAST | RowFlag.PUSH | RowFlag.PUSH_OUT,
    "second": PLAIN | RowFlag.SECOND,
    "second-and-past": PLAIN | RowFlag.SECOND | RowFlag.H1 | RowFlag.H2 | RowFlag.PUSH,
    "guided-and-learned": PLAIN | RowFlag.GUIDE | RowFlag.LEARNED,
    "every": EVERYTHING,
}


def random_rows(depth: int, seed: int = 6) -> Tensor:
    """float32 [RANDOM_STEPS, ROW_WIDTH]: a table that uses every term; two rows of three push."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(RANDOM_STEPS, ROW_WIDTH)
    rows[:, : len(ROW_FIELDS)] = torch.randn(RANDOM_STEPS, len(ROW_FIELDS), generator=generator)
    slots = torch.randint(max(depth, 1), (RANDOM_STEPS,), generator=generator)
    pushes = torch.arange(RANDOM_STEPS) % 3 != 0
    fixed = {"clip": 0.8, "Yo": 0, "M": 0, "push": pushes, "slot": slots}
    for name, values in fixed.items():
        rows[:, column(name)] = torch.as_tensor(values).float()
    rows[6, column("P")] = 0  # x0 is the output itself, scaled
    return rows


def step_inputs(
    flags: RowFlag,
    shape: Sequence[int] = (5, 3, 11, 13),
    layout: str = "channels-last",
    other: str = "contiguous",
    dtype: torch.dtype = F32,
    device: str = "cpu",
    generated: bool = False,
) -> Inputs:
    """Arguments of reverse_step_ with the tensors that the flags ask for, new at each call.

    layout: of the state and what is shaped as it; other: of the network's. The rows of the samples
    differ. generated: pass the state of the generator instead of noise.
    """
    state = partial(normals, shape, layout, F32, device=device)
    network = partial(normals, shape, other, dtype, device=device)
    depth = history_depth(flags)
    slots = normals((depth * shape[0], *shape[1:]), layout, F32, 9, device) if depth else None
    bounds = torch.rand(2 * shape[0], generator=torch.Generator().manual_seed(8)) + 0.5
    return {
        "x": state(seed=1),
        "model_output": network(seed=2),
        "rows": random_rows(depth).to(device),
        "step": (5 * torch.arange(shape[0], device=device) + 1) % RANDOM_STEPS,
        "noise": None if generated else state(seed=3),
        "rng": philox_rng(SEED, STREAM, FIRST, device) if generated else None,
        "model_input": network(seed=4),
        "pred_x0": state(seed=5),
        "flags": int(flags),
        "model_output2": network(seed=6) if flags & RowFlag.GUIDE else None,
        "log_variance": network(seed=7) if flags & RowFlag.LEARNED else None,
        "threshold": bounds.to(device)[::2] if flags & RowFlag.THRESHOLD else None,
        "second": state(seed=10) if flags & RowFlag.SECOND else None,
        "history": None if slots is None else slots.unflatten(0, (depth, shape[0])),
    }


def copied(inputs: Inputs, **others: Any) -> Inputs:
    """Return copies with the same strides; others replace some."""
    copies = {
        k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).copy_(v)
        for k, v in inputs.items()
        if isinstance(v, Tensor)
    }
    return inputs | copies | others


def written(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in STATE if inputs[name] is not None}


def _in_float64(inputs: Inputs, magnitudes: bool = False) -> Inputs:
    """The inputs on the CPU in float64; magnitudes: the absolute values of what is multiplied."""
    found = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name, tensor in found.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            wide = tensor.double()
            signed = name in {"rows", "log_variance", "threshold"}
            found[name] = wide.abs() if magnitudes and not signed else wide.clone()
    return found


def magnitudes(before: Inputs) -> Inputs:
    """Return the results of a step with absolute values and no clipping: no term cancels."""
    inputs = _in_float64(before, magnitudes=True)
    signed = inputs["rows"][inputs["step"].clamp(0, RANDOM_STEPS - 1)]
    rows = signed.abs()
    for name in ("Lmin", "Lmax"):
        rows[:, column(name)] = signed[:, column(name)]
    if (bound := inputs["threshold"]) is not None:
        rows[:, [column("P"), column("Q")]] /= bound[:, None]
    if (v := inputs["log_variance"]) is not None:
        # The error of its argument is one of the exponential's.
        largest = rows[:, column("Lmin")].abs() + rows[:, column("Lmax")].abs()
        rows[:, column("S")] *= 2 + largest * (1 + v.abs().reshape(len(v), -1).amax(1))
    inputs |= {"rows": rows, "step": torch.arange(len(rows)), "threshold": None}
    inputs["flags"] &= ~int(RowFlag.CLIP | RowFlag.THRESHOLD)
    reference.reverse_step_(**inputs)
    return inputs


def assert_is_the_equation(after: Inputs, before: Inputs) -> None:
    """Check that the results are those of the float64 reference, rounded."""
    exact, magnitude = _in_float64(before), magnitudes(before)
    reference.reverse_step_(**exact)
    for name, tensor in written(after).items():
        # Up to sixteen roundings of a term: guidance, x0, its threshold and a sum of seven.
        assert_rounded_once(tensor, exact[name], 4 * magnitude[name])
