"""The Triton kernel of `conv_` on a GPU or, without one, in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import BF16, F16, F32, F64
from ddpm_fast.ops import reference
from ddpm_fast.ops.reference.network import doubling_weight

pytest.importorskip("triton")

from ddpm_fast.ops.triton.conv import Config, Spec, configurations, conv, spec_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.ddpm_fast.triton_conv_
OUT, X, RESIDUAL = 0, 1, 5  # among the arguments of the schema


@dataclass(frozen=True)
class Case:
    """Arguments of a call. Two numbers of channels are two sources."""

    name: str
    channels: tuple[int, ...] = (16,)
    outputs: int = 16
    size: tuple[int, int] = (4, 4)
    batch: int = 2
    kernel: int = 3
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    bias: bool = True
    residual: bool = False
    doubling: bool = False
    contiguous: bool = False  # in memory, instead of channels_last
    cropped: bool = False  # sources lie within larger maps of NaN

    def __str__(self) -> str:
        return self.name


def arguments(case: Case, dtype: torch.dtype, device: str = DEVICE) -> tuple[Any, ...]:
    """The arguments in the schema's order; out holds NaN."""
    generator = torch.Generator().manual_seed(len(case.name))

    def normals(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        if case.contiguous or len(shape) != 4:
            return values
        return values.contiguous(memory_format=torch.channels_last)

    height, width = case.size
    sources = [normals(case.batch, c, height, width) for c in case.channels]
    every = sum(case.channels)
    if case.cropped:
        sources = [
            F.pad(source, (2, 1, 1, 2), value=torch.nan)[:, :, 1:-2, 2:-1] for source in sources
        ]
    fan = every * case.kernel**2
    weight = normals(case.outputs, every, case.kernel, case.kernel) / fan**0.5
    left, right, top, bottom = case.padding
    if case.doubling:
        weight = doubling_weight(weight.cpu()).to(device)
        weight = weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        height, width = 2 * height, 2 * width
    else:
        height = (height + top + bottom - case.kernel) // case.stride + 1
        width = (width + left + right - case.kernel) // case.stride + 1
    shape = (case.batch, case.outputs, height, width)
    return (
        torch.full_like(normals(*shape), torch.nan),
        sources[0],
        sources[1] if len(sources) > 1 else None,
        weight,
        normals(case.outputs) if case.bias else None,
        normals(*shape) if case.residual else None,
        case.stride,
        list(case.padding),
    )


def by_reference(args: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """out by the reference on the CPU in a dtype."""
    wide = [a.detach().cpu().to(dtype) if isinstance(a, Tensor) else a for a in args]
    reference.conv_(*wide)
    return wide[OUT]


def assert_as_good_as_reference(args: tuple[Any, ...], got: Tensor) -> None:
    """Rounded once: half a unit of the largest value, and what float32 sums lose before."""
    want = by_reference(args, F64)
    got = got.cpu().double()
    assert torch.equal(got.isnan(), want.isnan())
    if not want.numel():
        return
    single = (by_reference(args, F32).double() - want).abs().max()
    rounding = torch.finfo(args[OUT].dtype).eps / 2 if args[OUT].dtype != F32 else 0.0
    top = want.abs().max()
    error = (got - want).abs().max()
    bound = 2 * single + (rounding + 2 * torch.finfo(F32).eps) * top
    assert error <= bound, f"{error:.3g} is over {bound:.3g}"


CASES = [
    Case("3x3"),
    Case("1x1", kernel=1, padding=(0, 0, 0, 0)),
    Case("1x1-residual", (32,), 24, kernel=1, padding=(0, 0, 0, 0), residual=True),
    Case("no-bias", bias=False),
    Case("residual", residual=True),
    Case("one-pixel", size=(1, 1)),
    Case("odd-hw", size=(5, 7), batch=1),
    Case("rgb-in", (3,), 20, (5, 5)),
    Case("rgb-out", (32,), 3, (5, 5)),
    Case("odd-channels", (21,), 37, (3, 5)),
    Case("several-tiles", (24,), 40, (9, 9)),
    Case("two-sources", (32, 16), residual=True),
    Case("two-sources-odd", (20, 7), 5, (3, 4)),
    Case("two-sources-1x1", (16, 48), kernel=1, padding=(0, 0, 0, 0)),
    Case("stride-2", size=(6, 8), stride=2),
    Case("stride-2-right-bottom", size=(6, 8), stride=2, padding=(0, 1, 0, 1)),
    Case("stride-2-odd", size=(7, 5), stride=2, padding=(0, 1, 0, 1)),
    Case("uneven-padding", size=(4, 5), padding=(2, 0, 0, 3)),
    Case("doubling", doubling=True),
    Case("doubling-odd", (20,), 21, (3, 5), doubling=True, residual=True),
    Case("doubling-one-pixel", size=(1, 1), doubling=True),
    Case("contiguous", (20,), 24, contiguous=True, residual=True),
    Case("cropped", (24,), 20, (5, 3), cropped=True),
    Case("cropped-doubling", (24,), 20, (5, 3), cropped=True, doubling=True),
    Case("no-samples", batch=0),
]


IN_EVERY_DTYPE = {"3x3", "odd-channels", "two-sources-odd", "doubling-odd", "1x1-residual"}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in ((F16, F32, BF16) if case.name in IN_EVERY_DTYPE else (F16,))
    ],
)
def test_conv_is_the_reference_rounded_once(case, dtype):
    args = arguments(case, dtype)
    OP(*args)
    assert_as_good_as_reference(args, args[OUT])


SMALL = [
    Case("two-sources", (16, 16), 20, (3, 4), residual=True),
    Case("two-sources-odd", (20, 7), 5, (2, 4), batch=1),
    Case("doubling", (16,), 21, (3, 2), doubling=True, residual=True),
    Case("stride-2-right-bottom", (32,), 16, (6, 8), stride=2, padding=(0, 1, 0, 1)),
    Case("1x1", (48,), 16, (1, 5), kernel=1, padding=(0, 0, 0, 0)),
]


@pytest.mark.parametrize(
    ("case", "split"),
    [pytest.param(case, 5, id=f"{case}-5") for case in SMALL]
    + [pytest.param(SMALL[0], split, id=f"{SMALL[0]}-{split}") for split in (1, 2)],
)
def test_the_sum_in_parts_is_the_reference(case, split):
    """Several small tiles; five parts of three steps, where some have none."""
    args = arguments(case, F16)
    conv(*args, config=Config(16, 16, 16, 1, 2, split))
    assert_as_good_as_reference(args, args[OUT])


def test_more_tiles_than_a_group():
    args = arguments(Case("1x1", (16,), 24, (11, 13), kernel=1, padding=(0, 0, 0, 0)), F16)
    conv(*args, config=Config(16, 16, 16, 1, 2))
    assert_as_good_as_reference(args, args[OUT])


def test_split_k_leaves_its_locks_zero():
    args = arguments(SMALL[-1], F32)
    split_k_locks = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        args[OUT].fill_(torch.nan)
        conv(*args, config=Config(16, 16, 16, 1, 2, 3), split_k_locks=split_k_locks)
        assert_as_good_as_reference(args, args[OUT])
        assert not split_k_locks.any()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_doubling_weight_is_interpolation_and_3x3(residual):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((2, 9, 3, 4), (7, 9, 3, 3), (7,))
    )
    out = torch.empty(2, 7, 6, 8)
    more = torch.randn(out.shape, generator=generator) if residual else None
    want = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    want = want if more is None else want + more
    args = [None if t is None else t.to(DEVICE) for t in (out, x, None, doubling_weight(weight))]
    args += [bias.to(DEVICE), None if more is None else more.to(DEVICE)]
    OP(*args, 1, [1, 1, 1, 1])
    torch.testing.assert_close(args[OUT].cpu(), want, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_sample_and_window():
    args = arguments(Case("nan", batch=3), F16)
    args[X][1, 5, 0, 3] = torch.nan
    OP(*args)
    nan = args[OUT].cpu().isnan()
    assert nan[1, :, :2, 2:].all()
    assert nan.sum() == 16 * 4


SPECS = [
    *(
        Spec(batch * size * size, outputs, channels, channels2, taps, 1, 2)
        for batch in (1, 64, 512)
        for size, outputs, channels, channels2, taps in (
            (32, 128, 128, 0, 9),
            (32, 128, 256, 128, 9),
            (32, 128, 3, 0, 9),
            (32, 3, 128, 0, 9),
            (16, 256, 256, 256, 9),
            (8, 256, 384, 128, 1),
            (4, 512, 512, 0, 9),
        )
    ),
    Spec(64, 256, 256, 0, 4, 4, 2),
    Spec(8 * 65536, 128, 128, 0, 9, 1, 4),
    Spec(7, 21, 37, 5, 9, 1, 2),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec)))
def test_configurations_fit_an_h100(spec):
    found = configurations(spec)
    assert len(found) == len(set(found)) <= 16
    for config in found:
        assert {n.bit_count() for n in config[:4]} == {1}
        assert min(config[:3]) >= 16
        tiles = (config.rows + config.columns) * config.depth * spec.itemsize
        assert tiles * config.num_stages <= 227 << 10
        assert config.split == 1 or config.split * 4 <= spec.taps * (
            -(-spec.channels // config.depth) + -(-spec.channels2 // config.depth)
        )
    assert found[0].depth % 16 == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_configuration_is_the_reference(case):
    args = arguments(case, BF16)
    for config in configurations(spec_of(*args[:4])):
        args[OUT].fill_(torch.nan)
        conv(*args, config=config)
        assert_as_good_as_reference(args, args[OUT])


@pytest.mark.parametrize(
    "case",
    [
        Case("two-sources", (4, 3), 5, (1, 2), 1, residual=True),
        Case("doubling", (4,), 4, (1, 1), 1, doubling=True),
    ],
    ids=str,
)
def test_opcheck(case):
    torch.library.opcheck(OP.default, arguments(case, F16))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a sparse file in CPU memory")
@pytest.mark.parametrize("doubling", [False, True], ids=["3x3", "doubling"])
def test_elements_beyond_2_to_the_31(sparse, doubling):
    near = arguments(Case("wide", size=(2, 2), batch=3, residual=True, doubling=doubling), F16)
    far = list(near)
    for i in (OUT, X, RESIDUAL):
        n, c, h, w = near[i].shape
        tensor = sparse(F16, (1 << 31) + c * h * w)  # the strides alone fit into 32 bits
        far[i] = tensor.as_strided((n, c, h, w), (1 << 30, 1, w * c, c)).copy_(near[i])
    OP(*near)
    OP(*far)
    assert torch.equal(far[OUT], near[OUT])


def cifar(channels: tuple[int, ...], outputs: int, size: int, **more: Any) -> Case:
    name = f"{'+'.join(map(str, channels))}>{outputs}@{size}" + "".join(f"-{key}" for key in more)
    return Case(name, channels, outputs, (size, size), **more)


NO_PADDING = {"kernel": 1, "padding": (0, 0, 0, 0)}
CIFAR = [
    cifar((3,), 128, 32),
    cifar((128,), 128, 32, residual=True),
    cifar((256, 128), 128, 32),
    cifar((128,), 128, 32, stride=2, padding=(0, 1, 0, 1)),
    cifar((256,), 256, 16, residual=True),
    cifar((256, 256), 256, 16, **NO_PADDING),
    cifar((256,), 256, 8, doubling=True),
    cifar((256,), 256, 4, residual=True),
    cifar((512,), 512, 4),
    cifar((128,), 3, 32),
]


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("case", CIFAR, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_real_sizes_on_a_gpu(case, dtype, batch):
    """Every configuration, twice: the second run reuses the locks and gives the same bits."""
    args = arguments(Case(**{**vars(case), "batch": batch}), dtype)
    for config in configurations(spec_of(*args[:4])):
        got = []
        for _ in range(2):
            args[OUT].fill_(torch.nan)
            conv(*args, config=config)
            got.append(args[OUT].clone())
        assert torch.equal(*got)
        assert_as_good_as_reference(args, args[OUT])


@pytest.mark.cuda
def test_a_graph_replays_what_ran():
    args = arguments(cifar((512,), 512, 4), F16)
    assert configurations(spec_of(*args[:4]))[0].split > 1
    OP(*args)
    expected = args[OUT].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OP(*args)
    for _ in range(3):
        args[OUT].fill_(torch.nan)
        graph.replay()
        assert torch.equal(args[OUT], expected)
