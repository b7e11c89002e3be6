"""Lowered plans: report, fused sums, identity."""

from __future__ import annotations

import json

import pytest
import torch

from cases import F16, F32
from ddpm_fast import UNet
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.operations import Combine, Normalization
from engine_cases import arguments, engine, small
from unet_cases import CIFAR, LARGE


def test_the_plan_prints_every_operation():
    with torch.device("meta"):
        program, _ = lower(UNet(**CIFAR), 1, 32, 32, F16, norms_add=False)
        large, _ = lower(UNet(**LARGE), 1, 256, 256, F16, norms_add=False)
    assert program.flops / 1e9 == pytest.approx(12.44, abs=0.005)
    assert large.flops / 1e9 == pytest.approx(497, abs=0.5)
    assert len(program.operations) == 134
    unet = small()
    x, _ = arguments(unet.config)
    run = engine(unet, x)
    plan = run.plan()
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.operations) + 2
    for op, line in zip(plan.operations, lines[1:], strict=False):
        assert op.name in line
        assert "x".join(map(str, op.output)) in line
        assert op.implementation in line
    assert plan.flops == sum(op.flops for op in plan.operations) > 0
    assert plan.arena_bytes < plan.values_bytes / 3
    assert f"{plan.arena_bytes / 1e6:.1f} MB a call" in repr(run)


def test_sums_are_fused_into_the_next_normalisation():
    unet = small()
    program, _ = lower(unet, 1, 8, 8, F32, norms_add=True)
    norms = [op for op in program.operations if isinstance(op, Normalization)]
    assert any(op.residual is not None and op.total is not None for op in norms)
    assert all(op.x2 is None for op in norms if op.residual is not None)
    assert any(isinstance(op, Combine) for op in program.operations)
    program, _ = lower(unet, 1, 8, 8, F32, norms_add=False)
    assert not any(isinstance(op, Combine) for op in program.operations)


def test_no_concatenation_is_stored():
    program, _ = lower(small(), 1, 8, 8, F32, norms_add=False)
    joined = [op for op in program.operations if getattr(op, "x2", None) is not None]
    # In every decoder block: the first norm and the shortcut read two tensors.
    assert len(joined) == 2 * 4
    written = {id(value) for op in program.operations for value in op.writes}
    assert all(id(op.x) in written and id(op.x2) in written for op in joined)


def test_identity_is_json_and_names_the_kernels():
    unet = small()
    x, _ = arguments(unet.config)
    identity = engine(unet, x).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity == engine(unet, x).identity()
    kinds = {kind.split()[0]: by for _, kind, by in identity["operations"]}
    assert kinds["attention"] == "cpu"
    assert identity["environment"]["torch"] == torch.__version__
