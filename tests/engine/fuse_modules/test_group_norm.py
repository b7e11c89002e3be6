"""FusedGroupNorm: layouts, dtypes and dimensions that run the operator, and fallbacks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import BF16, F16, F32, F64, relative_error, same_bits
from ddpm_fast.engine.fuse_modules import modules as fused_modules
from ddpm_fast.engine.fuse_modules.optimize import optimize_module
from ddpm_fast.ops import get_backend
from module_cases import ON, scrambled, spy


@pytest.fixture
def ran(monkeypatch):
    return spy(monkeypatch)


@ON
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory"),
    [
        ((2, 8, 7), torch.contiguous_format),
        ((2, 8, 5, 6), torch.contiguous_format),
        ((2, 8, 5, 6), torch.channels_last),
        ((2, 8, 3, 5, 6), torch.contiguous_format),
        ((2, 8, 3, 5, 6), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_layouts_dtypes_and_dimensions(on, shape, memory, dtype, affine, ran):
    norm = scrambled(nn.GroupNorm(2, 8, **affine), on.device, dtype)
    x = torch.randn(shape, device=on.device, dtype=dtype).contiguous(memory_format=memory)
    with torch.no_grad():
        want = norm(x)
        exact = F.group_norm(x.double(), 2, *(p.double() for p in norm.parameters()))
        optimize_module(norm, backend=on.name)
        got = norm(x)
    assert ran == [False]
    assert got.stride() == x.stride()
    assert got.dtype == dtype
    bound = max(2 * relative_error(want, exact), 4 * torch.finfo(dtype).eps)
    assert relative_error(got, exact) <= bound


FALLBACKS = {
    "two-dim": torch.randn(3, 8),
    "six-dim": torch.randn(3, 8, 1, 2, 3, 2),
    "sliced": torch.randn(3, 8, 4, 8)[..., ::2],
    "transposed": torch.randn(4, 3, 8, 4).permute(1, 2, 0, 3),
    "empty-batch": torch.randn(0, 8, 4, 4),
    "parameter": nn.Parameter(torch.randn(3, 8, 4, 4), requires_grad=False),
    "half-with-float-weights": torch.randn(3, 8, 4, 4).bfloat16(),
    "one-value-a-group": torch.randn(1, 4, 1, 1),
    "wrong-channels": torch.randn(2, 4, 4, 4),
    "integers": torch.ones(2, 8, 4, 4, dtype=torch.int64),
    "not-a-tensor": [1.0],
}


def outcome(module, x):
    """Return the result, or the error that is raised."""
    try:
        return module(x)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("x", FALLBACKS.values(), ids=FALLBACKS)
def test_unsupported_inputs_run_torchs_operator(x, ran):
    channels = 4 if isinstance(x, torch.Tensor) and x.shape[0] == 1 else 8
    norm = nn.GroupNorm(4, channels)
    fused = copy.deepcopy(norm)
    optimize_module(fused, backend="reference")
    with torch.no_grad():
        got, want = (outcome(module, x) for module in (fused, norm))
        if isinstance(want, torch.Tensor):
            assert same_bits(got, want)
            assert got.stride() == want.stride()
        else:
            assert got == want
    assert ran == []


WORTH = ((4, 48, 16, 16), 8, torch.channels_last, F32)


@pytest.mark.parametrize(
    ("case", "runs"),
    [
        pytest.param(WORTH, [True], id="worth-it"),
        pytest.param((*WORTH[:3], BF16), [True], id="bfloat16"),
        pytest.param((*WORTH[:3], F64), [], id="float64"),
        pytest.param((*WORTH[:2], torch.contiguous_format, F32), [], id="contiguous"),
        pytest.param((WORTH[0], 3, *WORTH[2:]), [], id="wide-groups"),
        pytest.param(((4, 48, 32, 32), *WORTH[1:]), [], id="many-pixels"),
        pytest.param(((1, 48, 16, 16), *WORTH[1:]), [], id="few-elements"),
        pytest.param(((4, 48, 4, 8, 8), 8, torch.channels_last_3d, F32), [True], id="five-dim"),
    ],
)
def test_auto_on_a_cpu_runs_where_it_is_faster(case, runs, ran):
    shape, groups, memory, dtype = case
    model = nn.Sequential(nn.GroupNorm(groups, shape[1]), nn.SiLU()).to(dtype)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory)
    with torch.no_grad():
        want = model(x)
        optimize_module(model)
        assert relative_error(model(x), want) <= 4 * torch.finfo(dtype).eps
    assert ran == runs


def test_auto_without_a_kernel_runs_torchs_operator(monkeypatch):
    def only_the_reference(backend, device, dtype):
        return get_backend("reference", device, dtype)

    monkeypatch.setattr(fused_modules, "get_backend", only_the_reference)
    monkeypatch.setattr(fused_modules, "_kernel", fused_modules._kernel.__wrapped__)
    norm = nn.GroupNorm(8, 48)
    x = torch.randn(4, 48, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = norm(x)
        optimize_module(norm)
        assert same_bits(norm(x), want)
