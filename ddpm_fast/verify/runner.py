"""Checks of every operator, backend, dtype and layout against the float64 reference.

The bound on an error is no fixed tolerance but follows from the arithmetic: a few float32 roundings
of the terms of the sum, and one rounding to the dtype of the output. `ddpm_fast.verify.network` has
the bounds of the U-Net's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

# Roundings of the terms of a sum and of their coefficients.
ROUNDINGS = 4
# |z| <= 6.8 times the error of the polynomials and of sqrt, in core/normal.h.
NORMAL_ERROR = 2e-6


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        op: Name of the operator and its options.
        backend: Name of the backend.
        device: Type of the device, such as `cpu`.
        dtype: Dtype of the samples, such as `float32`.
        layout: Memory layout of the samples.
        error: Largest absolute error.
        ratio: Largest error over its bound; at most 1 if the check passes.
        same_bits_as_cpu: True if the output has the bits of the backend cpu. None: not compared.
        ok: True if the check passes.
    """

    op: str
    backend: str
    device: str
    dtype: str
    layout: str
    error: float
    ratio: float
    same_bits_as_cpu: bool | None
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return asdict(self)


def _q_sample(case: Case, schedule: NoiseSchedule) -> Results:
    x0, noise = case.tensor(0), case.tensor(1)
    t = case.indices(2, schedule.T)
    x_t = case.run.q_sample(x0, t, noise, schedule.q_sample_coefs(case.device, case.arithmetic))
    return _compared_q_sample([x_t], x0, t, noise, schedule)


def _compared_q_sample(
    outputs: list[Tensor], x0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule
) -> Results:
    coefs = schedule.q_sample_coefs("cpu", torch.float64)
    x0, t, noise = x0.double().cpu(), t.cpu(), noise.double().cpu()
    wanted = reference.q_sample(x0, t, noise, coefs)
    return outputs, [wanted], [reference.q_sample(x0.abs(), t, noise.abs(), coefs)]


def _q_sample_philox(case: Case, schedule: NoiseSchedule) -> Results:
    x0, t = case.tensor(0), case.indices(2, schedule.T)
    coefs = schedule.q_sample_coefs(case.device, case.arithmetic)
    rng = philox_rng(1 << 63, STREAM_TRAINING, 1 << 40, case.device)
    x_t, noise = case.run.q_sample_philox(x0, t, coefs, rng)
    outputs, exact, sums = _compared_q_sample([x_t], x0, t, noise, schedule)
    return (
        [*outputs, noise],
        [*exact, _normals(noise, rng)],
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
    """Return the sum whose bound is NORMAL_ERROR: normals are float32 numbers in every dtype."""
    epsilon = torch.finfo(arithmetic).eps
    return torch.full(like.shape, NORMAL_ERROR / (ROUNDINGS * epsilon), dtype=torch.float64)


def _q_posterior(case: Case, schedule: NoiseSchedule) -> Results:
    x0, x_t, t = case.tensor(0), case.tensor(1), case.indices(2, schedule.T)
    outputs = case.run.q_posterior(
        x0, x_t, t, schedule.q_posterior_coefs(case.device, case.arithmetic)
    )
    coefs = schedule.q_posterior_coefs("cpu", torch.float64)
    x0, x_t, t = x0.double().cpu(), x_t.double().cpu(), t.cpu()
    exact = reference.q_posterior(x0, x_t, t, coefs)
    terms = reference.q_posterior(x0.abs(), x_t.abs(), t, coefs)
    return list(outputs), list(exact), [term.abs() for term in terms]


def _checksum(case: Case, schedule: NoiseSchedule) -> Results:
    tensors = [case.tensor(0), case.tensor(1)]
    found, exact = (_sixteen_bits(run.checksum(tensors)) for run in (case.run, reference))
    return [found], [exact.cpu()], [torch.zeros_like(exact, device="cpu")]


def _sixteen_bits(values: Tensor) -> Tensor:
    """Split int64 values into parts of 16 bits, which float64 represents exactly."""
    return torch.stack([(values >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]).double()


def _operators() -> Iterator[tuple[str, Operate]]:
    yield "q_sample", _q_sample
    yield "q_sample_philox", _q_sample_philox
    yield "q_posterior", _q_posterior
    yield "philox_normal", _philox_normal
    yield "checksum", _checksum
    yield from step_operators(NoiseSchedule.linear())


def verify(
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    on_check: Callable[[Check], object] = lambda check: None,
) -> tuple[list[Check], dict[str, str]]:
    """Check every operator on every backend, dtype and layout.

    Args:
        backends: Names of the backends. None: all.
        dtypes: Dtypes of the samples. None: all that a backend accepts.
        on_check: Called with each check as soon as it has run.

    Returns:
        The checks, and the reason why it cannot run here for each backend that cannot.

    Raises:
        ValueError: a backend is unknown.
    """
    found: list[Check] = []
    skipped: dict[str, str] = {}
    for backend in BACKENDS if backends is None else backends:
        checks.choice("backends", backend, BACKENDS)
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
                if dtypes is not None and dtype not in dtypes:
                    continue
                run = get_backend(backend, device, dtype)
                for check in _verify_backend(run, device, dtype):
                    on_check(check)
                    found.append(check)
    return found, skipped


def _verify_backend(run: Backend, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    schedule = NoiseSchedule.linear()
    compares = (
        run.name in ("triton", "cuda") and unavailable_reason("cpu", torch.device("cpu")) is None
    )
    for op, operate in _operators():
        for layout in LAYOUTS:
            outputs, exact, sums = operate(Case(run, dtype, layout, device), schedule)
            cpu_outputs = None
            if compares:
                cpu = torch.device("cpu")
                cpu_case = Case(get_backend("cpu", cpu, dtype), dtype, layout, cpu)
                cpu_outputs, _, _ = operate(cpu_case, schedule)
            yield _check(op, run.name, device, dtype, layout, outputs, exact, sums, cpu_outputs)
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
    exact: list[Tensor],
    sums: list[Tensor],
    cpu_outputs: list[Tensor] | None,
) -> Check:
    error = ratio = 0.0
    arithmetic = checks.compute_dtype(dtype)
    for output, wanted, total in zip(outputs, exact, sums, strict=True):
        if output.numel() == 0:
            continue
        rounding = ROUNDINGS * torch.finfo(arithmetic).eps * total
        to_output = torch.finfo(output.dtype).eps * wanted.abs() + torch.finfo(output.dtype).tiny
        miss = (output.double().cpu() - wanted).abs()
        relative = miss / (rounding + to_output)
        error = max(error, _largest(miss))
        ratio = max(ratio, _largest(relative))
    same = None
    if cpu_outputs is not None:
        same = all(torch.equal(a.cpu(), b) for a, b in zip(outputs, cpu_outputs, strict=True))
    name = str(dtype).removeprefix("torch.")
    ok = ratio <= 1 and same is not False
    return Check(op, backend, device.type, name, layout, error, ratio, same, ok)


def _largest(values: Tensor) -> float:
    """Return the largest value, or infinity if one is NaN: a NaN is a miss."""
    return float(values.nan_to_num(nan=float("inf")).max())


def as_table(results: list[Check], skipped: dict[str, str]) -> str:
    """Format checks as a table with a line for each operator, backend and dtype.

    Args:
        results: The checks of `verify`.
        skipped: The reason for each backend that did not run.
    """
    lines = [f"{'operator':<40}{'backend':<11}{'dtype':<10}{'error':>9}{'of bound':>10}  bits  "]
    groups: dict[tuple[str, str, str, str], list[Check]] = {}
    for check in results:
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
    bad = sum(not c.ok for c in results)
    layouts = dict.fromkeys((*LAYOUTS, *NETWORK_LAYOUTS))
    lines.append(f"{len(results)} checks over layouts {', '.join(layouts)}; {bad} missed")
    return "\n".join(lines)
