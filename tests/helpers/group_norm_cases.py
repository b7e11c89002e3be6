"""Arguments of `group_norm_` named by intent, and the bound of its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import BF16, F16, F32, F64
from ddpm_fast.ops import reference

OUT, TOTAL = 0, 6  # among the arguments of the schema
ROWS = 5  # of the tables of vectors and modulations
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """Arguments of a call. Two numbers of channels are two sources."""

    name: str
    channels: tuple[int, ...] = (32,)
    size: tuple[int, int] = (4, 4)
    batch: int = 2
    groups: int = 4
    dtype: torch.dtype = F32
    params: torch.dtype | None = None  # of weight and bias; None: dtype
    vector: bool = False
    modulation: bool = False
    row: str = "each"  # each: another one for each sample; none; outside: two samples have no row
    residual: bool = False
    total: str = ""  # "": none; new; x or residual: written over that one
    silu: bool = True
    layout: str = "channels-last"
    mean: float = 0.0  # of the values, whose deviation is 1
    aligned: bool = True  # whether vector and modulation start at 16 bytes of their table

    def __str__(self) -> str:
        dtype = "" if self.dtype == F32 else "-" + str(self.dtype).removeprefix("torch.")
        return self.name + dtype


def _cl(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.channels_last)


def _sliced(offset: int, extra: int) -> Callable[[Tensor], Tensor]:
    """The channels from `offset` on of a wider channels_last tensor of NaN."""

    def view(values: Tensor) -> Tensor:
        n, c, h, w = values.shape
        wide = _cl(values.new_full((n, c + extra, h, w), torch.nan))
        return wide[:, offset : offset + c].copy_(values)

    return view


def _cropped(values: Tensor) -> Tensor:
    n, c, h, w = values.shape
    large = _cl(values.new_full((n + 1, c, h + 2, w + 3), torch.nan))
    return large[1:, :, 1 : h + 1, 2 : w + 2].copy_(values)


def _unaligned(values: Tensor) -> Tensor:
    """channels_last and dense, one element behind an aligned address."""
    n, c, h, w = values.shape
    memory = values.new_full((values.numel() + 1,), torch.nan)
    return memory[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(values)


def _expanded(values: Tensor) -> Tensor:
    """One pixel for all of a map, which is no place to write to."""
    return values[:, :, :1, :1].expand(values.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": _cl,
    "contiguous": lambda values: values.contiguous().clone(),
    "transposed": lambda values: values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": _sliced(8, 24),  # every vector of 16 bytes still is one
    "sliced-odd": _sliced(3, 8),
    "cropped": _cropped,
    "unaligned": _unaligned,
    "expanded": _expanded,
}


def arguments(case: NormCase, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """The arguments in the schema's order; `out` and a new `total` hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normals(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def laid(values: Tensor, layout: str = case.layout) -> Tensor:
        return LAYOUTS[layout](values.to(device, case.dtype))

    def table(width: int) -> Tensor:
        first = 4 if case.aligned else 3
        whole = torch.full((ROWS, width + 8), torch.nan, dtype=wide, device=device)
        return whole[:, first : first + width].copy_(normals(ROWS, width) / 2)

    wide = F64 if case.dtype == F64 else F32
    channels, (height, width) = sum(case.channels), case.size
    sources = [laid(case.mean + normals(case.batch, c, height, width)) for c in case.channels]
    writable = "channels-last" if case.layout == "expanded" else case.layout
    poison = torch.full((case.batch, channels, height, width), torch.nan)
    residual = laid(normals(*poison.shape)) if case.residual else None
    totals = {"": None, "x": sources[0], "residual": residual}
    total = laid(poison, writable) if case.total == "new" else totals[case.total]
    row = None
    if case.row != "none" and (case.vector or case.modulation):
        row = (torch.arange(case.batch, device=device) * 2 + 1) % ROWS
        if case.row == "outside":
            row[0], row[-1] = -1, ROWS
    params = [
        p.to(device, case.params or case.dtype) for p in (normals(channels), normals(channels))
    ]
    return (
        laid(poison, writable),
        sources[0],
        sources[1] if len(sources) > 1 else None,
        table(channels) if case.vector else None,
        row,
        residual,
        total,
        1 + params[0] / 4,
        params[1] / 4,
        table(2 * channels) if case.modulation else None,
        case.groups,
        EPS,
        case.silu,
    )


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same in float64 on the CPU, with memory of its own, for the reference."""
    return tuple(
        a.detach().cpu().to(F64 if a.is_floating_point() else a.dtype, copy=True)
        if isinstance(a, Tensor)
        else a
        for a in args
    )


def exact(args: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """out and total by the reference in float64."""
    wide = list(widened(args))
    if wide[TOTAL] is not None:
        wide[TOTAL] = torch.empty_like(wide[TOTAL])
    reference.group_norm_(*wide)
    return wide[OUT], wide[TOTAL]


def by_torch(args: tuple[Any, ...]) -> Tensor:
    """out as PyTorch computes it in the tensors' own dtype, operation by operation."""
    _, x, x2, vector, row, residual, _, weight, bias, modulation, groups, eps, silu = (
        a.detach().cpu() if isinstance(a, Tensor) else a for a in args
    )
    h = (x if x2 is None else torch.cat([x, x2], 1)).contiguous()
    if h.numel() == 0:
        return h
    chosen = torch.zeros(h.shape[0], dtype=torch.long) if row is None else row.clamp(0, ROWS - 1)
    if vector is not None:
        h = h + vector[chosen].to(h.dtype)[:, :, None, None]
    if residual is not None:
        h = h + residual
    y = F.group_norm(h, groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    if modulation is not None:
        scale, shift = modulation[chosen].to(h.dtype)[:, :, None, None].chunk(2, 1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0


def assert_as_good_as_torch(args: tuple[Any, ...], run: Callable[..., None]) -> None:
    """Runs ``run(*args)``; its largest error, against float64, is at most twice PyTorch's own.

    Two epsilons of the arithmetic beside that, of the largest value: PyTorch can be lucky. NaN is
    where the reference has it, and total is the sum rounded once.
    """
    out, total = args[OUT], args[TOTAL]
    want, want_total = exact(args)
    theirs = by_torch(args).double()
    run(*args)
    got = out.detach().cpu().double()
    known = ~want.isnan()
    assert torch.equal(got.isnan(), ~known)
    arithmetic = torch.finfo(F64 if out.dtype == F64 else F32).eps
    rounding = torch.finfo(out.dtype).eps / 2 if out.dtype in (F16, BF16) else 0.0
    top = largest(want[known])
    bound = max(2 * largest((theirs - want)[known]), (rounding + 2 * arithmetic) * top)
    bound += 2 * arithmetic * top
    error = largest((got - want)[known])
    assert error <= bound, f"{error:.3g} is over {bound:.3g}"
    if total is not None:
        sums = total.detach().cpu().double()
        known = ~want_total.isnan()
        assert torch.equal(sums.isnan(), ~known)
        bound = (rounding + 2 * arithmetic) * largest(want_total[known])
        assert largest((sums - want_total)[known]) <= bound


CASES = [
    NormCase("plain"),
    NormCase("no-silu", silu=False),
    NormCase("cifar", (128,), (8, 8), groups=32),
    NormCase("one-sample", (64,), (8, 8), batch=1, groups=32),
    NormCase("odd-hw", size=(5, 7)),
    NormCase("one-pixel", (64,), (1, 1)),
    NormCase("one-pixel-one-channel-groups", (8,), (1, 1), groups=8),
    NormCase("one-group", groups=1),
    NormCase("many-pixels", (8,), (33, 31), batch=1, groups=2),
    NormCase("group-of-12", (48,), (3, 3)),
    NormCase("odd-channels", (21,), (5, 3), groups=7),
    NormCase("prime-channels", (7,), (4, 5), groups=1),
    NormCase("two-sources", (32, 16), groups=8),
    NormCase("two-sources-straddled", (32, 16), (5, 4), groups=4),  # groups of 12: 32 = 2 * 12 + 8
    NormCase("two-sources-odd", (10, 5), (3, 5), groups=3),
    NormCase("two-sources-far-apart", (8, 248), (2, 3), groups=2),
    NormCase("vector", vector=True, batch=4),
    NormCase("vector-groups-of-one-value", (8,), (1, 1), groups=8, vector=True),
    NormCase("vector-without-row", vector=True, row="none"),
    NormCase("vector-unaligned", vector=True, aligned=False),
    NormCase("vector-two-sources", (32, 16), vector=True),
    NormCase("row-outside", vector=True, row="outside", batch=4),
    NormCase("row-outside-modulation", modulation=True, row="outside", batch=4, total="new"),
    NormCase("residual", residual=True),
    NormCase("total", total="new"),
    NormCase("residual-total", residual=True, total="new", vector=True),
    NormCase("total-over-x", residual=True, total="x"),
    NormCase("total-over-residual", residual=True, total="residual", vector=True),
    NormCase("modulation", modulation=True, batch=3),
    NormCase("modulation-unaligned", modulation=True, aligned=False, row="none"),
    NormCase("everything", vector=True, modulation=True, residual=True, total="new", batch=3),
    NormCase("huge-mean", (16,), (8, 8), mean=3000.0),
    NormCase("no-samples", batch=0, vector=True),
    NormCase("no-pixels", size=(0, 4)),
    *[NormCase(f"layout-{name}", size=(3, 5), layout=name) for name in LAYOUTS],
    NormCase("layout-cropped-sum", layout="cropped", residual=True, total="new", vector=True),
    NormCase("layout-sliced-two-sources", (16, 32), groups=2, layout="sliced"),
    NormCase("plain", dtype=F16),
    NormCase("plain", dtype=BF16),
    NormCase("plain", dtype=F64),
    NormCase("two-sources-straddled", (32, 16), (5, 4), dtype=F16, vector=True),
    NormCase("two-sources-odd", (10, 5), (3, 5), groups=3, dtype=BF16),
    NormCase("everything", vector=True, modulation=True, residual=True, total="new", dtype=F16),
    NormCase("everything", vector=True, modulation=True, residual=True, total="x", dtype=BF16),
    NormCase("everything", vector=True, modulation=True, residual=True, total="new", dtype=F64),
    NormCase("huge-mean", (16,), (8, 8), mean=1000.0, dtype=F16),
    NormCase("wide-params", dtype=F16, params=F32),
    NormCase("wide-params", dtype=BF16, params=F32, modulation=True),
    NormCase("layout-contiguous", layout="contiguous", dtype=F16, residual=True, total="new"),
    NormCase("layout-sliced-odd", layout="sliced-odd", dtype=BF16),
]
HALVES_AND_SINGLE = [case for case in CASES if case.dtype != F64]
