"""FusedGroupNorm and FusedSequential: unforeseen paths, hooks, gradients, transforms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import BF16, F32, relative_error, same_bits
from ddpm_fast.engine.fuse_modules.modules import FUSED_NORMS, Activated, FusedGroupNormSiLU
from ddpm_fast.engine.fuse_modules.optimize import optimize_module
from module_cases import Flagged, Net, image, scrambled, sequential, spy

NORMS = (nn.GroupNorm, *FUSED_NORMS)


@pytest.fixture
def ran(monkeypatch):
    return spy(monkeypatch)


def both(make=Net, backend="reference", example=True, device="cpu"):
    """A network and its optimized copy."""
    original = scrambled(make(), device)
    model = copy.deepcopy(original)
    optimize_module(model, image(device) if example else None, backend)
    return original, model


def in_place(function):
    def run(h):
        function(h)
        return h * 1

    return run


# Uses of a norm's output on a path that the example did not take.
USES = {
    "add": lambda h: h + 1,
    "add_": in_place(lambda h: h.add_(1)),
    "iadd": in_place(lambda h: h.__iadd__(1)),
    "setitem": in_place(lambda h: h.__setitem__(0, 5)),
    "unsqueeze_": in_place(lambda h: h.unsqueeze_(0)),
    "relu_": in_place(F.relu_),
    "out": in_place(lambda h: torch.add(h, 1, out=h)),
    "view": lambda h: h.view(-1),
    "view-in-place": in_place(lambda h: h[0].mul_(2)),
    "transpose": lambda h: h.transpose(1, 2).contiguous(),
    "data": lambda h: h.data,
    "detach": lambda h: h.detach(),
    "cat": lambda h: torch.cat([h, h]),
    "silu-of-silu": lambda h: F.silu(F.silu(h)),
    "two-silus": lambda h: F.silu(h) + F.silu(h),
    "silus-apart": lambda h: [F.silu(h), F.silu(h).zero_()][0],
    "silu-overwritten": lambda h: F.silu(h).zero_() + h,
    "silu-and-h": lambda h: F.silu(h) * h,
    "silu_-and-h": lambda h: F.silu(h, inplace=True) * h,
    "silu-by-name": lambda h: F.silu(input=h, inplace=False),
    "aten-silu": lambda h: torch.ops.aten.silu(h),
    "group_norm": lambda h: F.group_norm(h, 2),
    "deepcopy": copy.deepcopy,
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
    "numpy": lambda h: torch.from_numpy(h.numpy().copy()),
    "repr": lambda h: torch.tensor(float(str(h).split("[[[[")[1].split(",")[0])),
    "half": lambda h: h.half().float(),
    "shape": lambda h: torch.tensor([*h.shape, h.stride(0), h.size(1), len(h), h.dim()]) / 1.0,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_other_uses_of_an_output_see_the_norm(use, ran):
    original, model = both()
    x = image()
    with torch.no_grad():
        h = model.norm(model.conv(x))
        assert type(h) is Activated
        got, want = use(h), use(original.norm(original.conv(x)))
        assert type(got) is torch.Tensor
        assert got.stride() == want.stride()
        assert relative_error(got, want) <= 1e-5
        assert relative_error(model(x), original(x)) <= 1e-5
    assert ran[-1] is True


def test_metadata_is_read_without_computing_the_norm():
    _, model = both()
    with torch.inference_mode():  # where the norm cannot be computed later
        h = model.norm(model.conv(image()))
        assert (len(h), h.dim(), h.size(1), h.numel(), h.stride(3)) == (2, 4, 8, 480, 1)
        assert (h.ndim, h.dtype, h.device.type, h.requires_grad) == (4, F32, "cpu", False)
        assert h.is_floating_point()
        assert h.is_contiguous()
        assert h.shape == (2, 8, 6, 5)
        with pytest.raises(RuntimeError, match="used other than by SiLU"):
            h.sum()


def test_a_path_that_the_example_did_not_take_gives_the_same_or_an_error():
    original, model = both(Flagged)
    assert type(model.norm) is FusedGroupNormSiLU
    original.flag = model.flag = True
    with torch.no_grad():
        assert relative_error(model(image()), original(image())) <= 1e-5
    with torch.inference_mode(), pytest.raises(RuntimeError, match="may have been changed"):
        model(image())
    with torch.no_grad():
        x = model.conv(image())
        h = model.norm(x)
        x.zero_()
        with pytest.raises(RuntimeError, match=r"FusedGroupNormSiLU\(4, 8.*has been changed since"):
            h.add(1)
        h = model.norm(x)
        x.zero_()
        assert type(model.act(h)) is torch.Tensor  # SiLU does not need x


def test_beside_another_tensor_subclass():
    class Marked(torch.Tensor):
        pass

    original, model = both()
    other = torch.ones(2, 8, 6, 5).as_subclass(Marked)
    with torch.no_grad():
        got = model.norm(model.conv(image())) + other
        assert type(got) is Marked
        want = original.norm(original.conv(image())) + 1
        assert relative_error(got.as_subclass(torch.Tensor), want) <= 1e-5


@pytest.mark.parametrize("make", [Net, sequential])
def test_training_is_bit_for_bit_that_of_torch(make, ran):
    models = both(make)
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(image()).square().mean().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same_bits(a.grad, b.grad)
        assert same_bits(a, b)
    assert ran == []


def test_a_gradient_of_the_input_alone_is_recorded(ran):
    original, model = both()
    grads = []
    for net in (original, model):
        x = image().requires_grad_()
        net.requires_grad_(False)(x).square().sum().backward()
        grads.append(x.grad)
    assert same_bits(*grads)
    assert ran == []
    assert relative_error(model(image()), original(image())) <= 1e-5
    assert ran == [True]  # no gradient is required


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gradient_of_one_parameter_alone_is_recorded(name, ran):
    original, model = both()
    for net in (original, model):
        net.requires_grad_(False)
        getattr(net.norm, name).requires_grad_()
        net(image()).square().sum().backward()
    assert same_bits(getattr(original.norm, name).grad, getattr(model.norm, name).grad)
    assert ran == []


@pytest.mark.parametrize("make", [Net, sequential])
def test_autocast_runs_torchs_operator(make, ran):
    original, model = both(make)
    for dtype in (F32, BF16):
        for net in (original, model):
            net.to(dtype)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            got, want = model(image()), original(image())
            assert same_bits(got, want)
            hidden = torch.randn(2, 8, 3, 3, dtype=dtype)
            norms = [m for n in (original, model) for m in n.modules() if type(m) in NORMS]
            assert same_bits(*(norm(hidden) for norm in norms))
    assert ran == []


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def traced(model):
    return torch.jit.trace(model, image(), check_trace=False)


def exported(model):
    return torch.export.export(model, (image(),)).module()


def mapped(model):
    return lambda x: torch.func.vmap(model)(x[:, None]).squeeze(1)


def differentiated(model):
    return lambda x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


def dual(model):
    def run(x):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    return run


@pytest.mark.parametrize("make", [Net, sequential])
@pytest.mark.parametrize(
    "transform",
    [compiled, traced, exported, mapped, differentiated, dual],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor to a Python boolean")
def test_transformed_by_torch(transform, make, ran):
    torch.compiler.reset()
    original, model = both(make)
    with torch.no_grad():
        want = original(image()) if transform in (compiled, traced, exported) else None
        want = transform(original)(image()) if want is None else want
        assert relative_error(transform(model)(image()), want) <= 1e-6
    assert ran == []


def test_hooks_registered_later_get_the_same_values():
    for make in (Net, sequential):
        seen = []
        for net in both(make):
            norm, act = (m for m in net.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU)))
            calls = []
            for module in (norm, act):
                module.register_forward_hook(lambda m, a, y, calls=calls: calls.append((a[0], y)))
            act.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
            with torch.no_grad():
                calls.append(net(image()))
            seen.append([calls[0][0], calls[0][1], *calls[1], calls[2]])
        assert len(seen[0]) == 5
        assert all(type(value) is torch.Tensor for value in seen[1])
        for a, b in zip(*seen, strict=True):
            assert relative_error(b, a) <= 1e-5


def test_weights_from_weight_norm_and_parametrizations(ran):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    original, model = both()
    before = copy.deepcopy(original)
    for net in (original, model, before):
        nn.utils.parametrize.register_parametrization(net.norm, "weight", Doubled())
    assert "its class is ParametrizedGroupNorm" in str(optimize_module(before, backend="reference"))
    with torch.no_grad():
        assert relative_error(model(image()), original(image())) <= 1e-5
        assert relative_error(before(image()), original(image())) <= 1e-6
    ran.clear()
    normed = scrambled(Net())
    nn.utils.parametrizations.weight_norm(normed.conv)
    with torch.no_grad():
        want = normed(image())
        optimize_module(normed, image(), "reference")
        assert relative_error(normed(image()), want) <= 1e-5
    assert ran == [True]


def test_a_sequential_stays_a_sequential(ran):
    original, model = both(lambda: nn.Sequential(sequential(), nn.Conv2d(8, 3, 1)))
    inner = model[0]
    x = image()
    with torch.no_grad():
        want = original(x)
        assert relative_error(model(x), want) <= 1e-5
        assert ran == [True]
        assert relative_error(model[1](inner[2:](inner[:2](x))), want) <= 1e-5
        inner[2] = nn.Identity()
        original[0][2] = nn.Identity()
        assert relative_error(model(x), original(x)) <= 1e-5
        del inner[2]
        assert relative_error(model(x), original(x)) <= 1e-5
        inner.append(nn.GroupNorm(4, 8))
        original[0].append(nn.GroupNorm(4, 8))
        assert relative_error(model(x), original(x)) <= 1e-5
    assert len(inner) == 4
