"""Convolution variants against float64, and the choice among them."""

import logging
import math
from dataclasses import replace

import pytest
import torch

import conv_cases
from conv_cases import SPECS, spec
from ddpm_fast.engine.autotune.cache import PlanCache
from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.convolution import candidates as convolution
from ddpm_fast.engine.convolution.aten import AtenProvider
from ddpm_fast.engine.convolution.candidates import candidates, fastest
from ddpm_fast.engine.convolution.onednn import OnednnProvider
from ddpm_fast.engine.convolution.triton import TritonProvider
from ddpm_fast.ops.aten import even_padding

PROVIDERS = {
    "aten": AtenProvider(),
    "onednn": OnednnProvider(),
    "triton": TritonProvider(interpreted=True),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def variants_of(provider, spec):
    if reason := PROVIDERS[provider].unavailable_reason(spec):
        pytest.skip(reason)
    return PROVIDERS[provider].variants(spec, *conv_cases.weights(spec))


def run(variant, spec, fill=float("nan")):
    out = conv_cases.output(spec, fill)
    variant(out, *conv_cases.inputs(spec), convolution.scratch(variant, spec.device))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["aten", "onednn"])
@pytest.mark.parametrize("spec", SPECS)
def test_error_is_at_most_twice_that_of_torch(spec, provider, dtype):
    spec = replace(spec, dtype=dtype)
    weight, bias = conv_cases.weights(spec)
    rounded = (weight.to(dtype), None if bias is None else bias.to(dtype))
    images = conv_cases.inputs(spec)
    exact = conv_cases.expected(spec, *rounded, *images)
    torch_error = conv_cases.error(conv_cases.expected(spec, *rounded, *images, dtype=dtype), exact)
    for variant in variants_of(provider, spec):
        # The summed weights of the phases are rounded from the exact ones.
        used = (weight, bias) if "phases" in variant.name else rounded
        want = conv_cases.expected(spec, *used, *images)
        got = conv_cases.error(run(variant, spec), want)
        floor = torch.finfo(dtype).eps
        assert got <= 2 * max(torch_error, floor), (variant.name, got, torch_error)


@pytest.mark.parametrize("spec", [p for p in SPECS if p.id in {"doubled", "two-sources"}])
def test_triton_error_is_at_most_twice_that_of_torch(spec):
    spec = replace(spec, dtype=torch.float16)
    weight, bias = conv_cases.weights(spec)
    images = conv_cases.inputs(spec)
    want = conv_cases.expected(spec, weight, bias, *images)
    torch_error = conv_cases.error(
        conv_cases.expected(spec, weight, bias, *images, spec.dtype), want
    )
    for variant in variants_of("triton", spec)[:2]:
        for _ in range(2):  # the second reuses the locks of the first
            assert conv_cases.error(run(variant, spec), want) <= 2 * torch_error, variant.name


def test_triton_has_a_variant_for_each_configuration_and_splits_small_maps():
    found = variants_of("triton", spec(64, 64, size=8, batch=1, dtype=torch.float16))
    assert len({variant.name for variant in found}) == len(found) > 1
    split = [variant for variant in found if variant.config.split > 1]
    assert split
    assert all(variant.split_k_locks > 0 for variant in split)
    assert all(variant.split_k_locks == 0 for variant in found if variant not in split)


def test_each_triton_variant_runs_its_own_configuration(monkeypatch):
    case = spec(64, 64, size=8, batch=1, dtype=torch.float16)
    found = variants_of("triton", case)
    kernels = pytest.importorskip("ddpm_fast.ops.triton.conv")
    seen = []
    monkeypatch.setattr(kernels, "conv", lambda *args, **kwargs: seen.append(kwargs))
    tensors = conv_cases.inputs(case)
    for variant in found:
        split_k_locks = torch.zeros(variant.split_k_locks, dtype=torch.int32)
        variant(torch.empty_like(tensors[0]), *tensors, None, split_k_locks=split_k_locks)
        assert seen[-1]["config"] == variant.config
        assert seen[-1]["split_k_locks"] is split_k_locks


@pytest.mark.parametrize("provider", ["aten", "onednn"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_output_is_overwritten(spec, provider):
    for variant in variants_of(provider, spec):
        first, second = run(variant, spec, 3.0), run(variant, spec, float("inf"))
        assert torch.equal(first, second), variant.name


@pytest.mark.parametrize("provider", ["aten", "onednn"])
@pytest.mark.parametrize("spec", [p for p in SPECS if p.id in {"doubled", "two-sources", "qkv"}])
def test_keeps_a_copy_of_the_weights(spec, provider):
    weight, bias = conv_cases.weights(spec)
    if reason := PROVIDERS[provider].unavailable_reason(spec):
        pytest.skip(reason)
    found = PROVIDERS[provider].variants(spec, weight, bias)
    before = [run(variant, spec) for variant in found]
    weight.fill_(float("nan"))
    if bias is not None:
        bias.fill_(float("nan"))
    del weight, bias
    for variant, want in zip(found, before, strict=True):
        assert torch.equal(run(variant, spec), want), variant.name


def test_summed_weights_are_rounded_once():
    # 1 + 2^-11 + 2^-11 = 1 + 2^-10 in float32; rounded to float16 first, the small taps vanish.
    case = spec(1, 1, batch=1, size=4, upsample=True, bias=False, dtype=torch.float16)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 0], weight[0, 0, 0, 1], weight[0, 0, 1, 0] = 1 + 2**-11, 2**-12, 2**-12
    for provider in ("aten", "onednn"):
        if PROVIDERS[provider].unavailable_reason(case):
            continue
        named = {v.name: v for v in PROVIDERS[provider].variants(case, weight, None)}
        out = conv_cases.output(case)
        x = torch.ones(1, 1, 4, 4, dtype=torch.float16)
        named[f"{provider}.phases"](out, x, None, None, None)
        assert float(out[0, 0, 3, 3]) == 1 + 2**-10


def test_the_workspace_may_have_any_shape_and_content():
    case = spec(8, 8, upsample=True)
    variant = variants_of("aten", case)[0]
    assert variant.name == "aten.nearest"
    assert variant.workspace_bytes == 4 * 3 * 8 * 6 * 6 * 4
    want = run(variant, case)
    out = conv_cases.output(case)
    workspace = torch.full((1, variant.workspace_bytes + 256, 1, 1), 255, dtype=torch.uint8)
    variant(out, *conv_cases.inputs(case), workspace)
    assert torch.equal(out, want)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 1, 1, 1), (3, 0, 1, 2), (0, 0, 0, 0)])
def test_even_padding(padding, stride):
    (vertical, horizontal), (row, column) = even_padding(padding, stride)
    left, right, top, bottom = padding
    assert vertical >= max(top, bottom)
    assert vertical - top == row * stride
    assert horizontal >= max(left, right)
    assert horizontal - left == column * stride


def test_plain_aten_comes_first_and_the_order_is_fixed():
    for param in SPECS:
        (case,) = param.values
        names = [variant.name for variant in candidates(case, *conv_cases.weights(case))]
        assert names[0].startswith("aten")
        assert len(set(names)) == len(names)
        assert names == [v.name for v in candidates(case, *conv_cases.weights(case))]


def test_float64_and_empty_batches_run_by_aten():
    for case in (spec(8, 8, dtype=torch.float64), spec(8, 8, batch=0)):
        found = candidates(case, *conv_cases.weights(case))
        assert [variant.name for variant in found] == ["aten"]
        assert run(found[0], case).shape == conv_cases.output(case).shape


def test_providers_give_the_reason_why_they_cannot_run(monkeypatch):
    gpu = spec(8, 8, device=torch.device("cuda"), dtype=torch.float16)
    assert "cuda" in PROVIDERS["onednn"].unavailable_reason(gpu)
    assert "float64" in PROVIDERS["onednn"].unavailable_reason(spec(8, 8, dtype=torch.float64))
    assert "GPU" in TritonProvider().unavailable_reason(spec(8, 8))
    monkeypatch.setattr("ddpm_fast.engine.convolution.onednn._OPERATORS", ("_no_such_operator",))
    assert "_no_such_operator" in PROVIDERS["onednn"].unavailable_reason(spec(8, 8))
    assert len(candidates(spec(8, 8), *conv_cases.weights(spec(8, 8)))) == 1


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(8, 8, 1, 1), torch.zeros(8), r"weight must be \[8, 8, 3, 3\].*\[8, 8, 1, 1\]"),
        (torch.zeros(8, 8, 3, 3), None, r"bias must be \[8\].*got None"),
        (torch.zeros(8, 8, 3, 3), torch.zeros(9), r"bias must be \[8\].*got \[9\]"),
    ],
    ids=["weight", "no-bias", "bias"],
)
def test_weights_of_other_shapes_raise(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        candidates(spec(8, 8), weight, bias)


def test_upsampling_with_a_stride_raises():
    case = spec(8, 8, upsample=True, stride=2)
    with pytest.raises(ValueError, match="upsample must be used with"):
        candidates(case, *conv_cases.weights(case))


class Wrong:
    """Variant that is fast and wrong, or cannot be built."""

    workspace_bytes = 0

    def __init__(self, name, value=0.0, fail=False):
        self.name, self.value, self.fail = name, value, fail

    def __call__(self, out, x, x2, residual, workspace):
        if self.fail:
            raise RuntimeError("cannot be built")
        out.fill_(self.value)


class WrongProvider:
    name = "wrong"

    def unavailable_reason(self, spec):
        return None

    def variants(self, spec, weight, bias):
        return [Wrong("wrong"), Wrong("undefined", math.nan), Wrong("broken", fail=True)]


def test_fastest_leaves_out_wrong_and_failing_variants(monkeypatch, caplog):
    monkeypatch.setattr(convolution, "PROVIDERS", (AtenProvider(), WrongProvider()))
    case = spec(32, 32, size=16, upsample=True, residual=True)
    tuner = Tuner(case.device, PlanCache({}, None), rounds=1)
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        chosen = fastest(case, *conv_cases.weights(case), tuner)
    assert chosen.name.startswith("aten")
    assert set(tuner.choices[str(case)].seconds) == {"aten.nearest", "aten.phases"}
    assert "wrong is wrong" in caplog.text
    assert "undefined is wrong" in caplog.text
    assert "cannot be built" in caplog.text


@pytest.mark.parametrize("value", [0.0, 1e-7, 3e4, float("nan")], ids=str)
def test_degenerate_weights_leave_no_variant_out(value):
    case = spec(8, 8, upsample=True, dtype=torch.float16)
    weight, bias = torch.full((8, 8, 3, 3), value), torch.zeros(8)
    tuner = Tuner(case.device, PlanCache({}, None), rounds=1)
    fastest(case, weight, bias, tuner)
    assert len(tuner.choices[str(case)].seconds) == len(candidates(case, weight, bias)) > 1


def test_fastest_runs_nothing_for_a_recorded_choice(monkeypatch):
    case = spec(8, 8, upsample=True)
    tuner = Tuner(case.device, PlanCache({}, None), rounds=1)
    first = fastest(case, *conv_cases.weights(case), tuner)
    again = Tuner(case.device, tuner.cache, rounds=1)
    monkeypatch.setattr(convolution, "CandidateCheck", Untried)
    assert fastest(case, *conv_cases.weights(case), again).name == first.name
    off = Tuner(case.device, mode="off")
    assert fastest(case, *conv_cases.weights(case), off).name == "aten.nearest"


class Untried:
    """Check that must not run."""

    def __init__(self, spec, reference):
        pass

    def of(self, variant):
        def call():
            raise AssertionError(f"{variant.name} was run")

        return call


@pytest.mark.parametrize("kernel", [1, 3])
def test_aten_writes_outputs_of_any_layout(kernel):
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(7, 6, kernel, kernel)
    out = torch.full((2, 7, 4, 5), float("nan"))
    padding = [kernel // 2] * 4
    torch.ops.ddpm_fast.conv_(out, x, None, weight, None, None, 1, padding)
    want = torch.nn.functional.conv2d(x, weight, padding=kernel // 2)
    assert torch.allclose(out, want, atol=1e-5)


def test_aten_ignores_autocast():
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(7, 6, 3, 3)
    plain, inside = torch.empty(2, 2, 7, 4, 5)
    torch.ops.ddpm_fast.conv_(plain, x, None, weight, None, None, 1, [1] * 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.ops.ddpm_fast.conv_(inside, x, None, weight, None, None, 1, [1] * 4)
    assert torch.equal(plain, inside)


def test_variants_that_split_sums_are_timed_with_locks_allocated_once(monkeypatch):
    case = spec(8, 8, size=4, batch=1)
    weight, bias = conv_cases.weights(case)
    aten = variants_of("aten", case)[0]
    seen = []

    class Splits:
        name, workspace_bytes, split_k_locks = "splits", 0, 3

        def __call__(self, *args, split_k_locks):
            seen.append((split_k_locks.data_ptr(), split_k_locks.tolist()))
            aten(*args)

    monkeypatch.setattr(convolution, "candidates", lambda *_: [aten, Splits()])
    convolution.fastest(case, weight, bias, Tuner(case.device, PlanCache({}, None), rounds=2))
    assert len(seen) > 2
    assert set(map(str, seen)) == {str((seen[0][0], [0, 0, 0]))}
