"""`verify` passes on every backend, and reports a coefficient that is wrong by a thousandth."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from typer.testing import CliRunner

from ddpm_fast.cli import app
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.registry import DIFFUSION_OPS, OPS
from ddpm_fast.ops.row import column
from ddpm_fast.verify import as_table, runner, verify
from ddpm_fast.verify.cases import LAYOUTS
from ddpm_fast.verify.network import NETWORK_LAYOUTS

CPU = get_backend("cpu", torch.device("cpu"), torch.float32)
COEFFICIENTS = {"q_sample": (3, 2), "q_sample_philox": (2, 2), "q_posterior": (3, 4)}
ROWS = ("P", "Q", "ratio", "Xx", "Xx0", "Xo", "S", "clip")


def _scaled_column(table, index):
    table = table.clone()
    table[:, index] *= 1.001
    return table


def scaled(op, position, index):
    """Return the operator with one column of its coefficients scaled by 1.001."""
    original = getattr(CPU, op)

    def run(*args, **named):
        if "rows" in named:
            named = named | {"rows": _scaled_column(named["rows"], index)}
        else:
            changed = _scaled_column(args[position], index)
            args = (*args[:position], changed, *args[position + 1 :])
        return original(*args, **named)

    return run


def mutants():
    for op, (position, columns) in COEFFICIENTS.items():
        for index in range(columns):
            yield pytest.param(op, position, index, id=f"{op}-{index}")
    for name in ROWS:
        for op in ("reverse_step_", "reverse_step"):
            yield pytest.param(op, 2, column(name), id=f"{op}-{name}")


def operator_of(check):
    """Return the name of the operator; names of checks omit the underscore of in-place ones."""
    name, *kind = check.op.replace(",", "").split()
    if name == "reverse_step":
        return name if kind[0] == "functional" else "reverse_step_"
    return name if name in OPS else f"{name}_"


def operators(checks):
    return {operator_of(check) for check in checks}


def missed(checks):
    return operators(check for check in checks if not check.ok)


def test_every_operator_dtype_and_layout_is_checked_and_right():
    checks, not_run = verify(("cpu", "reference"))
    assert missed(checks) == set()
    assert not_run == {}
    assert operators(checks) == set(OPS)
    assert {check.layout for check in checks} == {*LAYOUTS, *NETWORK_LAYOUTS}
    dtypes = {"float32", "float16", "bfloat16", "float64"}
    assert {(check.backend, check.dtype) for check in checks} == {
        (backend, dtype) for backend in ("cpu", "reference") for dtype in dtypes
    }


def test_triton_has_the_bits_of_cpu_and_other_bits_are_a_miss(monkeypatch):
    original = CPU.q_posterior
    monkeypatch.setattr(CPU, "q_posterior", lambda *args: [-out for out in original(*args)])
    steps = runner.step_operators
    monkeypatch.setattr(runner, "step_operators", lambda schedule: islice(steps(schedule), 2))
    monkeypatch.setattr(runner, "LAYOUTS", ("odd",))
    monkeypatch.setattr(runner, "network_checks", lambda *_: iter(()))
    checks, _ = verify(("triton",), (torch.float32,))
    assert operators(checks) == {*DIFFUSION_OPS, "checksum"} - {"reverse_step"}
    assert missed(checks) == {"q_posterior"}
    assert {check.op for check in checks if not check.same_bits_as_cpu} == {"q_posterior"}


@pytest.mark.slow
def test_triton_has_the_bits_of_cpu_in_every_dtype_and_layout():
    checks, _ = verify(("triton",))
    assert operators(checks) == set(OPS)
    assert all(check.ok and check.same_bits_as_cpu is not False for check in checks)


@pytest.mark.parametrize(("op", "position", "index"), list(mutants()))
def test_one_coefficient_off_is_a_miss(monkeypatch, op, position, index):
    monkeypatch.setattr(runner, "LAYOUTS", ("channels_last", "odd"))
    monkeypatch.setattr(runner, "network_checks", lambda *_: iter(()))
    monkeypatch.setattr(CPU, op, scaled(op, position, index))
    checks, _ = verify(("cpu",), (torch.float32,))
    assert missed(checks) == {op}


def changed(op, position, change):
    """Return the operator with one argument changed, if it is passed."""
    original = getattr(CPU, op)

    def run(*args):
        args = list(args)
        if args[position] is not None:
            args[position] = change(args[position])
        original(*args)

    return run


@pytest.mark.parametrize(
    ("op", "position", "change"),
    [
        pytest.param("group_norm_", 3, lambda v: v.roll(1, 0), id="norm-row"),
        pytest.param("group_norm_", 5, lambda r: r * 0.9, id="norm-residual"),
        pytest.param("group_norm_", 7, lambda w: w * 1.01, id="norm-weight"),
        pytest.param("group_norm_", 9, lambda m: m.roll(1, 1), id="norm-modulation"),
        pytest.param("group_norm_", 11, lambda eps: 1e-3, id="norm-eps"),
        pytest.param("group_norm_", 12, lambda silu: False, id="norm-silu"),
        pytest.param("attention_", 3, lambda scale: scale * 1.01, id="attention-scale"),
        pytest.param("conv_", 2, lambda x2: x2.roll(1, 1), id="conv-second-source"),
        pytest.param("conv_", 4, lambda b: b * 1.01, id="conv-bias"),
        pytest.param("conv_", 5, lambda r: r.roll(1, 3), id="conv-residual"),
    ],
)
def test_one_argument_off_is_a_miss(monkeypatch, op, position, change):
    monkeypatch.setattr(runner, "LAYOUTS", ())
    monkeypatch.setattr(CPU, op, changed(op, position, change))
    checks, _ = verify(("cpu",), (torch.float32, torch.float64))
    assert missed(checks) == {op}
    assert {c.dtype for c in checks if not c.ok} == {"float32", "float64"}


def test_other_noise_is_a_miss(monkeypatch):
    original = CPU.philox_normal_
    monkeypatch.setattr(CPU, "philox_normal_", lambda out, rng: original(out, rng + 1))
    assert "philox_normal_" in missed(verify(("cpu",), (torch.float32,))[0])


def test_a_nan_is_a_miss(monkeypatch):
    original = CPU.q_sample

    def run(*args):
        x_t = original(*args)
        x_t[:1] = float("nan")
        return x_t

    monkeypatch.setattr(CPU, "q_sample", run)
    checks, _ = verify(("cpu",), (torch.float32,))
    assert missed(checks) == {"q_sample"}
    assert "MISS: contiguous" in as_table(checks, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_backend_that_cannot_run_says_why():
    checks, not_run = verify(("cuda",))
    assert checks == []
    assert set(not_run) == {"cuda"}
    assert "cuda: not run: " in as_table(checks, not_run)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backends must be one of .* got 'mps'"):
        verify(("mps",))


def test_the_command_prints_a_table_and_succeeds():
    result = CliRunner().invoke(app, ["verify", "--backend", "cpu"])
    assert result.exit_code == 0
    assert "reverse_step ddpm, noise made" in result.stdout
    assert result.stdout.rstrip().endswith("0 missed")


def test_the_command_fails_on_a_miss_and_writes_json(monkeypatch):
    monkeypatch.setattr(CPU, "q_sample", scaled("q_sample", 3, 0))
    result = CliRunner().invoke(app, ["verify", "--backend", "cpu", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    misses = [check for check in document["checks"] if not check["ok"]]
    assert {check["op"] for check in misses} == {"q_sample"}
    assert document["not_run"] == {}
