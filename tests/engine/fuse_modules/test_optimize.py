"""optimize_module: fused patterns, report, restoring, observation, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import module_cases
from cases import F16, F32, F64, assert_named, same_bits
from ddpm_fast.engine.fuse_modules import optimize
from ddpm_fast.engine.fuse_modules.modules import FusedGroupNorm, FusedSequential
from ddpm_fast.engine.fuse_modules.optimize import optimize_module
from module_cases import ON, Net, image, scrambled, sequential, spy
from unet_cases import SMALL, relative_error, scramble

FUSED = "fused with SiLU"
NO_EXAMPLE = "norm only: no SiLU behind it in an nn.Sequential, and no example_inputs"
# The network, the report without an example and with one, and the runs of the operator with one.
PATTERNS = [
    (sequential, FUSED, FUSED, [True]),
    (Net, NO_EXAMPLE, FUSED, [True]),
    (module_cases.InPlace, NO_EXAMPLE, FUSED, [True]),
    (module_cases.Functional, NO_EXAMPLE, FUSED, [True]),
    (module_cases.Other, NO_EXAMPLE, "norm only: its output goes to gelu", [False]),
    (module_cases.TwoUsers, NO_EXAMPLE, "norm only: its output goes to silu, add", [False]),
    (module_cases.TwiceActivated, NO_EXAMPLE, "goes to silu more than once", [False]),
    (module_cases.Returned, NO_EXAMPLE, "norm only: the model returns its output", [False]),
    (module_cases.Stored, NO_EXAMPLE, "norm only: its output is kept", [False]),
    (module_cases.Unused, NO_EXAMPLE, "norm only: the example does not call it", []),
    (module_cases.Flagged, NO_EXAMPLE, FUSED, [True]),
    (module_cases.Shared, NO_EXAMPLE, FUSED, [True, True]),
    (module_cases.SharedOnce, NO_EXAMPLE, "norm only: the model returns its output", [False] * 2),
    (module_cases.Indexed, FUSED, "norm only: its output goes to mul", [False]),
]


@pytest.fixture
def ran(monkeypatch):
    return spy(monkeypatch)


def assert_same_output(got, want, tolerance=1e-5):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert type(a) is torch.Tensor
        assert a.stride() == b.stride()
        assert relative_error(a, b) <= tolerance


MODES = pytest.mark.parametrize(
    ("memory", "mode"),
    [
        pytest.param(torch.contiguous_format, torch.no_grad, id="contiguous"),
        pytest.param(torch.channels_last, torch.inference_mode, id="channels-last-inference"),
    ],
)


@ON
@MODES
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p[0].__name__)
def test_patterns(on, pattern, memory, mode, ran):
    make, without, with_example, runs = pattern
    x = image(on.device).to(memory_format=memory)
    original = scrambled(make(), on.device).to(memory_format=memory)
    for example, done in ((None, without), (x, with_example)):
        model = copy.deepcopy(original)
        report = optimize_module(model, example, backend=on.name)
        assert done in str(report)
        assert len(report.norms) == 1
        ran.clear()
        with mode():
            assert_same_output(model(x), original(x))
        if example is not None:
            assert ran == runs
        report.restore()
        with mode():
            for a, b in zip(tree_leaves(model(x)), tree_leaves(original(x)), strict=True):
                assert same_bits(a, b)


@ON
def test_a_shared_silu_serves_several_norms(on, ran):
    x, t = image(on.device, 8), torch.randn(2, 4, device=on.device)
    original = scrambled(module_cases.Block(), on.device)
    for example in ((x, t), [x, t], {"x": x, "t": t}):
        model = copy.deepcopy(original)
        report = optimize_module(model, example, on.name)
        assert report.counts == {FUSED: 2, "norm only": 0, "left alone": 0}
        ran.clear()
        with torch.no_grad():
            assert_same_output(model(x, t), original(x, t))
        assert ran == [True, True]


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    return scramble(UNet2DModel(**SMALL, sample_size=16).eval())


@ON
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_network_of_diffusers(on, unet, memory, ran):
    original = copy.deepcopy(unet).to(on.device).to(memory_format=memory)
    x = torch.randn(2, 2, 16, 16, device=on.device).to(memory_format=memory)
    model = copy.deepcopy(original)
    report = optimize_module(model, (x, 7), on.name)
    attention = sum("attentions" in path for norm in report.norms for path in norm.paths)
    assert report.counts == {
        FUSED: len(report.norms) - attention,
        "norm only": attention,
        "left alone": 0,
    }
    ran.clear()
    with torch.inference_mode():
        got, want = model(x, 7).sample, original(x, 7).sample
    assert relative_error(got, want) <= 1e-5
    assert got.stride() == want.stride()
    assert sum(ran) == report.counts[FUSED]


@ON
def test_half_precision_error_is_at_most_twice_that_of_torch(on, unet):
    x = torch.randn(2, 2, 16, 16)
    with torch.no_grad():
        exact = copy.deepcopy(unet).to(F64)(x.to(F64), 7).sample
        model = copy.deepcopy(unet).to(on.device, F16)
        torch_output = model(x.to(on.device, F16), 7).sample
        optimize_module(model, (x.to(on.device, F16), 7), on.name)
        ours = model(x.to(on.device, F16), 7).sample
    assert relative_error(ours.cpu(), exact) <= 2 * relative_error(torch_output.cpu(), exact)


def test_the_report_lists_every_norm_with_all_of_its_paths():
    model = nn.ModuleDict(
        {
            "plain": Net(),
            "shared": module_cases.Shared(),
            "own": type("GroupNorm32", (nn.GroupNorm,), {})(4, 8),
            "replaced": nn.GroupNorm(4, 8),
            "hooked": nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()),
        }
    )
    model["replaced"].forward = torch.relu
    model["hooked"][0].register_forward_hook(lambda *args: None)
    report = optimize_module(model, backend="reference")
    assert str(report).splitlines() == [
        f"plain.norm                    {NO_EXAMPLE} to see what follows",
        f"shared.norm = shared.again.0  {NO_EXAMPLE} to see what follows",
        "own                           left alone: its class is GroupNorm32",
        "replaced                      left alone: its forward has been replaced",
        "hooked.0                      norm only: it has hooks",
        "5 GroupNorms: 0 fused with SiLU, 3 norm only, 2 left alone",
    ]
    assert report.norms[1].paths == ("shared.norm", "shared.again.0")
    assert type(model["replaced"]) is nn.GroupNorm
    assert type(model["hooked"]) is nn.Sequential
    assert str(optimize_module(nn.Conv2d(1, 1, 1))).startswith("0 GroupNorms")
    alone = optimize_module(nn.GroupNorm(1, 1), backend="reference")
    assert str(alone).startswith("(the model)  norm only")


def state_of(model):
    """Every object of a model with its class and attributes."""
    return [
        (path, module, type(module), {k: copy.copy(v) for k, v in module.__dict__.items()})
        for path, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("make", [sequential, Net, module_cases.Shared])
def test_restore_gives_back_the_same_objects(make):
    model = scrambled(make())
    before = state_of(model)
    parameters = list(model.parameters())
    report = optimize_module(model, image(), backend="reference")
    assert any(isinstance(m, FusedGroupNorm) for m in model.modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a[1] is b[1] for a, b in zip(before, state_of(model), strict=True))
    report.restore()
    assert state_of(model) == before
    report.restore()
    assert state_of(model) == before


def test_a_second_call_has_no_effect():
    model = scrambled(nn.Sequential(sequential(), nn.Conv2d(8, 3, 1), Net()))
    first = optimize_module(model, image(), backend="reference")
    state = state_of(model)
    second = optimize_module(model, image(), backend="reference")
    assert state_of(model) == state
    assert str(second) == str(first)
    second.restore()
    assert state_of(model) == state
    third = optimize_module(model, backend="reference")
    assert state_of(model) == state
    assert third.counts == first.counts
    first.restore()
    third.restore()  # there was nothing to undo


def test_a_later_example_adds_the_silu_and_is_restored_separately():
    model = scrambled(Net())
    before = state_of(model)
    first = optimize_module(model, backend="reference")
    between = state_of(model)
    second = optimize_module(model, image(), backend="reference")
    assert (first.counts[FUSED], second.counts[FUSED]) == (0, 1)
    second.restore()
    assert state_of(model) == between
    first.restore()
    assert state_of(model) == before


def test_a_module_whose_class_has_changed_is_not_restored():
    model = scrambled(nn.Sequential(Net(), nn.GroupNorm(4, 8)))
    report = optimize_module(model, backend="reference")
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="a GroupNorm that has become a ParametrizedFusedGroupN"):
        report.restore()
    assert type(model[0].norm) is FusedGroupNorm
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    report.restore()
    assert type(model[0].norm) is type(model[1]) is nn.GroupNorm


def test_state_dicts_are_those_of_the_original():
    model, original = (
        scrambled(nn.Sequential(sequential(), Net())),
        nn.Sequential(sequential(), Net()),
    )
    want = copy.deepcopy(model.state_dict())
    optimize_module(model, backend="reference")
    assert list(model.state_dict()) == list(want)
    original.load_state_dict(model.state_dict())
    model.load_state_dict(want)
    assert repr(model[1].norm) == "Fused" + repr(original[1].norm)
    assert isinstance(model[1].norm, nn.GroupNorm)
    assert isinstance(model[0], nn.Sequential)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_optimized_and_independent(again, ran):
    model = scrambled(nn.Sequential(sequential(), nn.Conv2d(8, 3, 1), Net()))
    report = optimize_module(model, image(), backend="reference")
    copied = again(model)
    report.restore()
    ran.clear()
    with torch.no_grad():
        assert_same_output(copied(image()), model(image()))
    assert ran == [True, True]
    assert type(copied[0]) is FusedSequential


class Stateful(nn.Module):
    """Draws random numbers, counts its calls in buffers and has a BatchNorm."""

    def __init__(self, fails=False):
        super().__init__()
        self.net, self.batch = Net(), nn.BatchNorm2d(8)
        self.dropout, self.fails = nn.Dropout(0.5), fails
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        y = self.dropout(self.batch(self.net(x))) + torch.randn(())
        if self.fails:
            raise KeyError("inside")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_observing_does_not_change_the_model(fails):
    model = scrambled(Stateful(fails)).train()
    model.net.eval()
    before = state_of(model)
    values = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    if fails:
        with pytest.raises(ValueError, match="it raised KeyError: 'inside'") as raised:
            optimize_module(model, image(), backend="reference")
        assert isinstance(raised.value.__cause__, KeyError)
    else:
        optimize_module(model, image(), backend="reference").restore()
    assert torch.equal(torch.rand(4), want)
    assert state_of(model) == before
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())


def test_an_error_restores_all_modules(monkeypatch):
    model = scrambled(nn.Sequential(sequential(), Net()))
    before = state_of(model)
    do, done = optimize._Change.do, []

    def fail_at_the_third(change):
        do(change)
        done.append(change)
        if len(done) == 3:
            raise MemoryError

    monkeypatch.setattr(optimize._Change, "do", fail_at_the_third)
    with pytest.raises(MemoryError):
        optimize_module(model, backend="reference")
    assert state_of(model) == before


def test_a_compiled_model_is_observed_without_compiling():
    compiled = []
    model = torch.compile(
        scrambled(Net()), backend=lambda graph, _: compiled.append(graph) or graph
    )
    assert optimize_module(model, image(), backend="reference").counts[FUSED] == 1
    assert compiled == []


NET = scrambled(Net())
BAD = [
    ("model", torch.relu, TypeError, "torch.nn.Module", "builtin"),
    ("example_inputs", 3, TypeError, "tuple", "int"),
    ("example_inputs", {3: image()}, TypeError, "dict of keyword", "dict"),
    ("example_inputs", image()[:, :1], ValueError, "model takes", "RuntimeError"),
    ("example_inputs", {"y": image()}, ValueError, "model takes", "TypeError"),
    ("backend", "gpu", ValueError, "auto, reference, cpu, triton, cuda", "'gpu'"),
    ("backend", "cuda", RuntimeError, "cannot run", "CUDA tensors", "cpu"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda c: f"{c[0]}-{c[-1]}")
def test_bad_arguments_are_named_with_what_is_accepted(bad):
    def call(model=NET, example_inputs=None, backend="reference"):
        optimize_module(model, example_inputs, backend).restore()

    assert_named(call, bad)
    assert type(NET.norm) is nn.GroupNorm
    assert NET.norm.weight.dtype == F32
