"""group_norm_ in every backend that runs here, against the reference in float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch

from cases import BF16, F16, F32, F64, backends, same_bits
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.dispatch import DTYPES
from group_norm_cases import CASES, EPS, OUT, NormCase, arguments, assert_as_good_as_torch

# The Triton kernel's own tests are in test_triton_group_norm.py.
ON = [b for b in backends() if b.name != "triton"]
ON_EACH = pytest.mark.parametrize("on", ON, ids=str)
OP = torch.ops.ddpm_fast.group_norm_
LARGE = NormCase("large", (64,), (16, 16), batch=4, groups=16, dtype=F16, vector=True)


def run(backend, args):
    get_backend(backend, args[OUT].device, args[OUT].dtype).group_norm_(*args)


def with_backends(on, of):
    return [pytest.param(b, c, id=f"{b}-{c}") for b in on for c in of if c.dtype in DTYPES[b.name]]


@pytest.mark.parametrize(("on", "case"), with_backends(ON, CASES))
def test_as_good_as_torch(on, case):
    args = arguments(case, on.device)
    assert_as_good_as_torch(args, lambda *a: run(on.name, a))


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(cpu_kernels, kernels):
    usual = {case: arguments(case) for case in CASES}
    for args in usual.values():
        OP(*args)
    cpu_kernels(kernels)
    for case, want in usual.items():
        args = arguments(case)
        OP(*args)
        finite = ~want[OUT].isnan()
        assert torch.equal(args[OUT].isnan(), ~finite), str(case)
        assert same_bits(args[OUT][finite], want[OUT][finite]), str(case)


def test_thread_counts_give_the_same_bits(two_threads):
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        args = arguments(LARGE)
        OP(*args)
        results.append(args[OUT])
    assert same_bits(*results)


def only(args, sample):
    """The arguments of one sample of a batch, with an out of its own."""
    values = list(args)
    for i in (0, 1, 2, 4, 5, 6):
        if values[i] is not None:
            values[i] = values[i][sample : sample + 1].clone(memory_format=torch.preserve_format)
    return tuple(values)


@ON_EACH
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_sample_does_not_depend_on_its_batch(on, dtype):
    if on.name == "reference":
        pytest.skip("ATen's sums may depend on the batch")
    if on.device == "cuda":
        pytest.skip("plans on CUDA depend on the batch: sums are taken in another order")
    case = NormCase("batch", (48,), (6, 5), batch=3, groups=4, dtype=dtype, vector=True)
    together = arguments(case, on.device)
    alone = [only(together, n) for n in range(3)]
    run(on.name, together)
    for n, args in enumerate(alone):
        run(on.name, args)
        assert same_bits(args[OUT][0], together[OUT][n])


@ON_EACH
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_its_group(on, layout, dtype, value):
    case = NormCase("nan", (32,), (4, 5), groups=4, dtype=dtype, layout=layout)
    args = arguments(case, on.device)
    args[1][1, 9, 2, 3] = value  # of the group of channels 8 to 15
    run(on.name, args)
    nan = args[OUT].isnan()
    assert bool(nan[1, 8:16].all())
    assert int(nan.sum()) == 8 * 4 * 5


@ON_EACH
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_silu_of_large_values_is_that_of_torch(on, dtype):
    """All of x is its mean, so that the bias is what SiLU gets."""
    large = [float("inf"), -float("inf"), float("nan"), 1e4, -1e4, -200.0, -60.0, 90.0]
    bias = torch.tensor(large, dtype=dtype, device=on.device)
    x, out = (torch.zeros(1, 8, 2, 2, dtype=dtype, device=on.device) for _ in range(2))
    nothing = (None,) * 5
    run(on.name, (out, x, *nothing, torch.ones_like(bias), bias, None, 8, EPS, True))
    want = torch.nn.functional.silu(bias.cpu()).float()
    got = out[0, :, 1, 1].cpu().float()
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-30, equal_nan=True)


@ON_EACH
def test_opcheck(on):
    if on.name == "reference":
        pytest.skip("not an operator of torch.ops")
    for case in (CASES[0], *[c for c in CASES if c.name in ("everything", "no-samples")]):
        if case.dtype in DTYPES[on.name]:
            torch.library.opcheck(OP, arguments(case, on.device))


FAR = (1 << 31) + 7


@pytest.mark.parametrize("strides", [(2 * FAR, 1, 8, 4), (4, 1, FAR, 8), (1, FAR, 8, 2)], ids=str)
def test_offsets_beyond_2_31_elements(strides, sparse):
    """Samples, rows and channels that lie more than 2^31 elements apart, in files of holes."""
    case = NormCase("far", (4,), (2, 2), groups=2, dtype=F16)
    args = list(arguments(case))
    want = arguments(case)
    OP(*want)
    far = [sparse(F16, 4 * FAR).as_strided((2, 4, 2, 2), strides) for _ in range(2)]
    args[1] = far[0].copy_(args[1])
    args[OUT] = far[1]
    OP(*args)
    assert same_bits(args[OUT], want[OUT])


@pytest.mark.slow
@pytest.mark.parametrize("on", [b for b in ON if b.name != "reference"], ids=str)
def test_more_than_2_31_elements(on, needs_memory):
    """One group of a map of 2^31 and more, all zeros but for the first and the last element."""
    height, width = (1 << 16) + 1, 1 << 15
    needs_memory(on.device, 8 * height * width)
    x = torch.zeros(1, 1, height, width, dtype=F16, device=on.device)
    out = torch.empty_like(x)
    x[0, 0, 0, 0] = x[0, 0, -1, -1] = 8.0
    one = torch.ones(1, device=on.device)
    run(on.name, (out, x, *[None] * 5, one, 0 * one, None, 1, 1e-5, False))
    count = height * width
    mean = 16.0 / count
    scale = (2 * (8 - mean) ** 2 / count + mean**2 + 1e-5) ** -0.5
    for at, value in ((0, 8), (-1, 8), (count // 2, 0)):
        got = float(out.view(-1)[at])
        assert got == pytest.approx((value - mean) * scale, rel=2**-10, abs=1e-4)


BAD = [
    ({1: torch.zeros(2, 32, 4)}, "x and x2 must be"),
    ({1: torch.zeros(2, 32, 4, 5)}, "x must be .N, C, H, W. with"),
    ({1: torch.zeros(2, 32, 4, 4, dtype=F64)}, "x must have the dtype"),
    ({10: 5}, "groups must divide the 32 channels"),
    ({10: 0}, "groups must divide"),
    ({3: torch.zeros(3, 31)}, "vector must be"),
    ({3: torch.zeros(0, 32)}, "vector must be .* at least one row"),
    ({3: torch.zeros(3, 32, dtype=F64)}, "vector must be float32"),
    ({9: torch.zeros(3, 32)}, "modulation must be"),
    ({4: torch.zeros(3, dtype=torch.int64)}, "row must be int64"),
    ({4: torch.zeros(2, dtype=torch.int32)}, "row must be int64"),
    ({7: torch.ones(31)}, "weight must be"),
    ({8: torch.ones(32, dtype=F16)}, "bias must have the dtype"),
    ({2: torch.zeros(2, 8, 4, 4), 5: torch.zeros(2, 32, 4, 4)}, "two sources"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_a_direct_call_does_not_read_outside(bad, message):
    args = list(arguments(NormCase("good")))
    OP(*args)
    for i, value in bad.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        OP(*args)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != F64], ids=str)
def test_a_captured_graph_gives_the_same_bits(case):
    """And reads what its inputs hold when it is replayed."""
    args, again = (arguments(case, "cuda") for _ in range(2))
    OP(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2 if case.total in ("", "new") else 1):  # two that could overlap
            OP(*again)
    graph.replay()
    torch.cuda.synchronize()
    finite = ~args[OUT].isnan()
    assert torch.equal(again[OUT].isnan(), ~finite)
    assert same_bits(again[OUT][finite], args[OUT][finite])


@pytest.mark.cuda
@pytest.mark.parametrize("size", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_every_size_of_the_networks_on_cuda(size, batch, dtype):
    """The plans with clusters and those that stream, with the sum and without."""
    for total in ("", "new"):
        case = NormCase(
            "size", (128,), (size, size), batch, 32, dtype, residual=total != "", total=total
        )
        assert_as_good_as_torch(arguments(case, "cuda"), lambda *a: run("cuda", a))
