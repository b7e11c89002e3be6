"""Inputs shared by the tests: backends, shapes, layouts, dtypes, and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, StepTable
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.dispatch import DTYPES
from ddpm_fast.ops.philox import philox_rng
from ddpm_fast.ops.registry import NOT_LOADED
from ddpm_fast.ops.row import ROW_WIDTH, column

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SCHEDULE = NoiseSchedule.linear()
TABLE = StepTable.ddim(SCHEDULE, 20, eta=0.7, rederive_epsilon=False)  # every term but Cin
SEED, STREAM, FIRST = 0x9E37_79B9_7F4A_7C15, 3, (1 << 32) - 1  # sample indices cross a word


class BackendOnDevice(NamedTuple):
    """A backend and the device that the tests give it."""

    name: str
    device: str

    @property
    def ops(self) -> Any:
        return get_backend(self.name, torch.device(self.device), F32)

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


def backends() -> list[BackendOnDevice]:
    """Those that run here: Triton and CUDA on a GPU; without one, Triton in its interpreter."""
    if not torch.cuda.is_available():
        return [BackendOnDevice(name, "cpu") for name in ("reference", "cpu", "triton")]
    found = [("reference", "cpu"), ("reference", "cuda"), ("cpu", "cpu"), ("triton", "cuda")]
    if not NOT_LOADED["cuda"].endswith("is not built"):
        found.append(("cuda", "cuda"))
    return [BackendOnDevice(*pair) for pair in found]


def kernel_backends() -> list[BackendOnDevice]:
    """The backends that must agree bit for bit."""
    return [b for b in backends() if b.name != "reference"]


SHAPES = {
    "odd-hw": (2, 3, 7, 5),
    "partial-block": (2, 5, 13, 17),
    "whole-blocks": (2, 4, 16, 16),
    "one-sample": (1, 3, 4, 4),
    "one-channel": (3, 1, 6, 5),
    "one-dim": (5,),
    "two-dim": (3, 11),
    "three-dim": (2, 3, 9),
    "five-dim": (2, 3, 2, 5, 3),
    "six-dim": (2, 2, 3, 2, 2, 3),
    "empty-batch": (0, 3, 4, 4),
    "no-elements": (2, 3, 0, 4),
}
OTHER_SHAPES = {  # in no product of cases
    "many-blocks": (32, 3, 64, 32),  # enough for two threads
    "many-samples": (16, 3, 9, 7),
    "tiny": (1, 3, 2, 2),
}


def _poisoned(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def _channels_last(values: Tensor) -> Tensor:
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.ndim > 2 else values.clone()


def _transposed(values: Tensor) -> Tensor:
    order = list(range(values.ndim))[::-1]
    return values.permute(order).contiguous().permute(order)


def _sliced(values: Tensor) -> Tensor:
    big = _poisoned(values, [*values.shape[:-1], 2 * values.shape[-1] + 1])
    return big[..., 1::2].copy_(values)


def _gapped(values: Tensor) -> Tensor:
    big = _poisoned(values, [values.shape[0] + 2, *[size + 1 for size in values.shape[1:]]])
    return big[tuple(slice(1, 1 + size) for size in values.shape)].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels-last": _channels_last,
    "transposed": _transposed,  # the batch varies fastest
    "sliced": _sliced,  # every second element of memory, NaN between
    "gapped": _gapped,  # a window of a larger tensor of NaN
    "expanded": lambda values: values[..., :1].expand(values.shape),
    "expanded-batch": lambda values: values[:1].expand(values.shape),
}
DENSE = ("contiguous", "channels-last", "transposed")
WRITABLE = (*DENSE, "sliced", "gapped")


class Case(NamedTuple):
    """A shape, the layout of the leading tensor and of the others, and the dtype."""

    name: str
    layout: str = "contiguous"
    other: str = "contiguous"
    dtype: torch.dtype = F32

    @property
    def shape(self) -> tuple[int, ...]:
        return (SHAPES | OTHER_SHAPES)[self.name]

    def tensor(self, device: str, seed: int, layout: str | None = None, dtype=None) -> Tensor:
        """Standard normals of this case; a seed gives the same values in any layout."""
        return normals(self.shape, layout or self.layout, dtype or self.dtype, seed, device)

    def others(self, device: str, seed: int) -> Tensor:
        return self.tensor(device, seed, self.other)

    def timesteps(self, device: str, end: int = SCHEDULE.T) -> Tensor:
        """One for each sample, the first and the last among them."""
        return torch.linspace(0, end - 1, self.shape[0]).long().to(device)

    def __str__(self) -> str:
        dtype = "" if self.dtype == F32 else "-" + str(self.dtype).removeprefix("torch.")
        mixed = "" if self.other == self.layout else f"+{self.other}"
        return f"{self.name}-{self.layout}{mixed}{dtype}"


def normals(shape, layout: str, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=F64)
    return LAYOUTS[layout](values.to(device, dtype))


def cases(layouts: Iterable[str] = tuple(LAYOUTS)) -> list[Case]:
    """Every shape, every layout beside contiguous and channels-last tensors, every dtype."""
    found = [Case(name) for name in SHAPES]
    for layout in layouts:
        found += [Case("odd-hw", layout, other) for other in ("channels-last", layout)]
    found += [Case("partial-block", layout) for layout in ("channels-last", "sliced")]
    for dtype in (F16, BF16, F64):
        found += [Case("partial-block", "channels-last", "contiguous", dtype)]
        found += [Case("odd-hw", "sliced", "sliced", dtype)]
    return list(dict.fromkeys(found))


def each(of: Iterable[Case], on: Iterable[BackendOnDevice] | None = None) -> list[Any]:
    """pytest.param(backend, case) for every backend that takes the case's dtype."""
    return [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in (backends() if on is None else on)
        for case in of
        if case.dtype in DTYPES[backend.name]
    ]


def sample_inputs(op: str, case: Case, device: str, generated: bool = True) -> tuple[Any, ...]:
    """Arguments of torch.ops.ddpm_fast.<op>, for its bits, gradients and opcheck alike.

    generated: reverse_step_ generates its noise. Tensors are new at each call; a state that is
    written is float32 or float64, and whatever else has a dtype has that of the case.
    """
    arithmetic = F64 if case.dtype == F64 else F32
    leading, other = case.tensor(device, 1), case.others(device, 2)
    t = case.timesteps(device)
    rng = philox_rng(SEED, STREAM, FIRST, device)
    if op == "q_sample":
        return leading, t, other, SCHEDULE.q_sample_coefs(device, arithmetic)
    if op == "q_sample_philox":
        return leading, t, SCHEDULE.q_sample_coefs(device, arithmetic), rng
    if op == "q_posterior":
        return other, leading, t, SCHEDULE.q_posterior_coefs(device, arithmetic)
    if op == "philox_normal_":
        return leading, rng
    noise = normals(case.shape, "contiguous", arithmetic, 4, device)
    rows, _ = TABLE.to(device, arithmetic)
    step = case.timesteps(device, TABLE.steps)
    if op == "reverse_step":
        return leading, other, rows, step, noise, int(TABLE.flags)
    state, model_input = case.tensor(device, 1, dtype=arithmetic), case.tensor(device, 3)
    source = (None, rng) if generated else (noise, None)
    pred_x0 = torch.zeros_like(state) if generated else None
    return state, other, rows, step, *source, model_input, pred_x0, int(TABLE.flags)


def rows_with(clip: tuple[float, float] = (0.0, 0.0), **second: float) -> Tensor:
    """Two rows that do nothing, but for the clips and the second row's columns."""
    rows = torch.zeros(2, ROW_WIDTH, dtype=torch.float64)
    rows[:, [column("G0"), column("Cin")]] = 1
    rows[:, column("clip")] = torch.tensor(clip, dtype=torch.float64)
    for name, value in second.items():
        rows[1, column(name)] = value
    return rows


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits, NaN and the sign of zero included; strides do not matter."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    pair = [x.detach().cpu().contiguous().view(words) for x in (a, b)]
    return a.dtype == b.dtype and torch.equal(*pair)


def assert_rounded_once(ours: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """``ours`` is ``exact`` in the arithmetic of its dtype (float32 for halves), rounded once.

    magnitude: the sum of the absolute values of the terms, so that what cancels is allowed for. Two
    epsilons are four roundings of a term: its coefficient, its products, its sums.
    """
    info = torch.finfo(ours.dtype)
    arithmetic = torch.finfo(F64 if ours.dtype == F64 else F32).eps
    rounding = info.eps / 2 if ours.dtype in (F16, BF16) else 0.0
    exact, magnitude = exact.cpu(), magnitude.cpu()
    bound = 2 * arithmetic * magnitude + rounding * exact.abs() + info.tiny * info.eps
    error = (ours.detach().cpu().double() - exact).abs()
    assert ours.shape == exact.shape
    assert bool((error <= bound).all()), f"{float((error / bound).max()):.3g} times the bound"


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. 2011, Section 3.3, on Python's integers.

    Each round swaps the high halves of two products into the other half of the counter and adds
    the key; the key steps by the golden ratio and sqrt(3) - 1.
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        high_a, low_a = divmod(a * 0xD2511F53, 1 << 32)
        high_c, low_c = divmod(c * 0xCD9E8D57, 1 << 32)
        a, b, c, d = high_c ^ b ^ left, low_c, high_a ^ d ^ right, low_a
        left, right = (left + 0x9E3779B9) % (1 << 32), (right + 0xBB67AE85) % (1 << 32)
    return [a, b, c, d]


def exact_normals(block: int, stream: int, sample: int, seed: int) -> list[float]:
    """The four normals of a Philox block, by Box and Muller in float64 from float32 uniforms."""
    split_output = [divmod(value, 1 << 32)[::-1] for value in (sample, seed)]
    words = philox((block, stream, *split_output[0]), split_output[1])
    u = [float(np.float32(word * 2.0**-32 + 2.0**-33)) for word in words]
    polar = [(math.sqrt(-2 * math.log(u[i])), 2 * math.pi * u[i + 1]) for i in (0, 2)]
    return [r * f(angle) for r, angle in polar for f in (math.cos, math.sin)]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value."""
    exact = exact.cpu().double()
    scale = float(exact.abs().max()) if exact.numel() else 1.0
    error = (ours.detach().cpu().double() - exact).abs()
    return float(error.max()) / scale if exact.numel() else 0.0


def assert_named(call: Callable[..., Any], bad: tuple[Any, ...]) -> None:
    """``call(name=value)`` raises an error with the name, what came and what is accepted.

    bad: (name, value, error, *words of the message). The call without them is a good one.
    """
    name, value, error, *words = bad
    call()
    with pytest.raises(error) as raised:
        call(**{name: value})
    missing = [word for word in (name, *words) if word not in str(raised.value)]
    assert not missing, str(raised.value)
