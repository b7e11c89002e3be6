"""Every operator x backend x dtype x layout against the float64 reference.

The bound on an error is not a fixed tolerance but what the arithmetic may cost: a few roundings
in float32 of the terms of the sum, and one rounding to the output's dtype. The operators of the
U-Net have bounds of their own (`ddpm_fast.verify.network`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.ops import BACKENDS, Backend, get_backend, reference, unavailable_reason
from ddpm_fast.ops.dispatch import DTYPES
from ddpm_fast.ops.philox import STREAM_STEPS, STREAM_TRAINING, philox_rng
from ddpm_fast.utils import checks
from ddpm_fast.verify.cases import LAYOUTS, Case, Results
from ddpm_fast.verify.network import NETWORK_LAYOUTS, network_checks
from ddpm_fast.verify.reverse_step import Operate, step_operators

# Roundings of the terms of a sum and of their coefficients, of the sum of their absolute values.
ROUNDINGS = 4
# |z| <= 6.8 times the error of the polynomials and of sqrt, in core/normal.h.
NORMAL_ERROR = 2e-6


@dataclass(frozen=True)
class Check:
    """One line of the table: the largest error over its bound; at most 1 where all is well."""

    op: str
    backend: str
    device: str
    dtype: str
    layout: str
    error: float  # largest absolute error
    ratio: float  # largest error / bound
    same_bits_as_cpu: bool | None  # None where there is nothing to compare
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def _q_sample(case: Case, schedule: NoiseSchedule) -> Results:
    x0, noise = case.tensor(0), case.tensor(1)
    t = case.indices(2, schedule.T)
    x_t = case.run.q_sample(x0, t, noise, schedule.q_sample_coefs(case.device, case.arithmetic))
    return _judged_q_sample([x_t], x0, t, noise, schedule)


def _judged_q_sample(
    outputs: list[Tensor], x0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule
) -> Results:
    coefs = schedule.q_sample_coefs("cpu", torch.float64)
    x0, t, noise = x0.double().cpu(), t.cpu(), noise.double().cpu()
    oracle = reference.q_sample(x0, t, noise, coefs)
    return outputs, [oracle], [reference.q_sample(x0.abs(), t, noise.abs(), coefs)]


def _q_sample_philox(case: Case, schedule: NoiseSchedule) -> Results:
    x0, t = case.tensor(0), case.indices(2, schedule.T)
    coefs = schedule.q_sample_coefs(case.device, case.arithmetic)
    rng = philox_rng(1 << 63, STREAM_TRAINING, 1 << 40, case.device)
    x_t, noise = case.run.q_sample_philox(x0, t, coefs, rng)
    outputs, oracles, sums = _judged_q_sample([x_t], x0, t, noise, schedule)
    return (
        [*outputs, noise],
        [*oracles, _normals(noise, rng)],
        [*sums, _normal_sum(noise, case.arithmetic)],
    )


def _philox_normal(case: Case, schedule: NoiseSchedule) -> Results:
    out = torch.full_like(case.tensor(0, written=True), float("nan"))
    rng = philox_rng(7, STREAM_STEPS, 3, case.device)
    case.run.philox_normal_(out, rng)
    return [out], [_normals(out, rng)], [_normal_sum(out, case.arithmetic)]


def _normals(like: Tensor, rng: Tensor) -> Tensor:
    seed, stream, first = rng.cpu().unbind()
    return reference.normals(like.cpu(), seed, stream.expand(like.shape[0]), first).double()


def _normal_sum(like: Tensor, arithmetic: torch.dtype) -> Tensor:
    """What makes the bound NORMAL_ERROR: normals are float32 numbers in every dtype."""
    epsilon = torch.finfo(arithmetic).eps
    return torch.full(like.shape, NORMAL_ERROR / (ROUNDINGS * epsilon), dtype=torch.float64)


def _q_posterior(case: Case, schedule: NoiseSchedule) -> Results:
    x0, x_t, t = case.tensor(0), case.tensor(1), case.indices(2, schedule.T)
    outputs = case.run.q_posterior(
        x0, x_t, t, schedule.q_posterior_coefs(case.device, case.arithmetic)
    )
    coefs = schedule.q_posterior_coefs("cpu", torch.float64)
    x0, x_t, t = x0.double().cpu(), x_t.double().cpu(), t.cpu()
    oracles = reference.q_posterior(x0, x_t, t, coefs)
    terms = reference.q_posterior(x0.abs(), x_t.abs(), t, coefs)
    return list(outputs), list(oracles), [term.abs() for term in terms]


def _operators() -> Iterator[tuple[str, Operate]]:
    yield "q_sample", _q_sample
    yield "q_sample_philox", _q_sample_philox
    yield "q_posterior", _q_posterior
    yield "philox_normal", _philox_normal
    yield from step_operators(NoiseSchedule.linear())


def verify(backends: tuple[str, ...] | None = None) -> tuple[list[Check], dict[str, str]]:
    """Run every operator on every backend, dtype and layout.

    backends: those to run, all of them by default. Returns the checks, and for each backend that
    cannot run here the reason with what to do.
    Raises ValueError for an unknown backend.
    """
    checks: list[Check] = []
    skipped: dict[str, str] = {}
    for backend in BACKENDS if backends is None else backends:
        if backend not in BACKENDS:
            raise ValueError(f"backends must be of {', '.join(BACKENDS)}; got {backend!r}")
        devices = [
            d for d in map(torch.device, ("cuda", "cpu")) if unavailable_reason(backend, d) is None
        ]
        if backend == "reference" and not torch.cuda.is_available():
            devices = [torch.device("cpu")]
        if not devices:
            wanted = torch.device("cpu" if backend == "cpu" else "cuda")
            skipped[backend] = str(unavailable_reason(backend, wanted))
        for device in devices[:1]:
            for dtype in DTYPES[backend]:
                run = get_backend(backend, device, dtype)
                checks += _verify_backend(run, device, dtype)
    return checks, skipped


def _verify_backend(run: Backend, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    schedule = NoiseSchedule.linear()
    compares = (
        run.name in ("triton", "cuda") and unavailable_reason("cpu", torch.device("cpu")) is None
    )
    for op, operate in _operators():
        for layout in LAYOUTS:
            outputs, oracles, sums = operate(Case(run, dtype, layout, device), schedule)
            twins = None
            if compares:
                cpu = torch.device("cpu")
                twin = Case(get_backend("cpu", cpu, dtype), dtype, layout, cpu)
                twins, _, _ = operate(twin, schedule)
            yield _check(op, run.name, device, dtype, layout, outputs, oracles, sums, twins)
    for check in network_checks(run, device, dtype):
        where = run.name, device.type, str(dtype).removeprefix("torch.")
        yield Check(
            check.op, *where, check.layout, check.error, check.ratio, None, check.ratio <= 1
        )


def _check(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    outputs: list[Tensor],
    oracles: list[Tensor],
    sums: list[Tensor],
    twins: list[Tensor] | None,
) -> Check:
    error = ratio = 0.0
    arithmetic = checks.compute_dtype(dtype)
    for output, oracle, total in zip(outputs, oracles, sums, strict=True):
        if output.numel() == 0:
            continue
        rounding = ROUNDINGS * torch.finfo(arithmetic).eps * total
        to_output = torch.finfo(output.dtype).eps * oracle.abs() + torch.finfo(output.dtype).tiny
        miss = (output.double().cpu() - oracle).abs()
        relative = miss / (rounding + to_output)
        error = max(error, _largest(miss))
        ratio = max(ratio, _largest(relative))
    same = None
    if twins is not None:
        same = all(torch.equal(a.cpu(), b) for a, b in zip(outputs, twins, strict=True))
    name = str(dtype).removeprefix("torch.")
    ok = ratio <= 1 and same is not False
    return Check(op, backend, device.type, name, layout, error, ratio, same, ok)


def _largest(values: Tensor) -> float:
    """The largest value, infinite where one is NaN: a NaN is a miss."""
    return float(values.nan_to_num(nan=float("inf")).max())


def as_table(checks: list[Check], skipped: dict[str, str]) -> str:
    """The checks as text: one line for each operator, backend and dtype, layouts together."""
    lines = [f"{'operator':<40}{'backend':<11}{'dtype':<10}{'error':>9}{'of bound':>10}  bits  "]
    groups: dict[tuple[str, str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.backend, check.device, check.op, check.dtype), []).append(check)
    for (backend, _, op, dtype), group in groups.items():
        bits = {c.same_bits_as_cpu for c in group}
        missed = [c.layout for c in group if not c.ok]
        same = "" if bits == {None} else "same" if bits <= {True, None} else "DIFFER"
        verdict = f"MISS: {', '.join(missed)}" if missed else "ok"
        error, ratio = max(c.error for c in group), max(c.ratio for c in group)
        lines.append(
            f"{op:<40}{backend:<11}{dtype:<10}{error:>9.1e} {ratio:>9.2f}  {same:<6}{verdict}"
        )
    lines += [f"{backend}: not run: {reason}" for backend, reason in skipped.items()]
    bad = sum(not c.ok for c in checks)
    layouts = dict.fromkeys((*LAYOUTS, *NETWORK_LAYOUTS))
    lines.append(f"{len(checks)} checks over layouts {', '.join(layouts)}; {bad} missed")
    return "\n".join(lines)
