"""The Triton kernels of `attention_` on a GPU or, without one, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import BF16, F16, F32, F64
from ddpm_fast.ops import reference

pytest.importorskip("triton")

from ddpm_fast.ops.triton import attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.ddpm_fast.triton_attention_
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
SHAPE = ("batch", "tokens", "heads", "dims")


def buffers(
    batch: int, tokens: int, heads: int, dims: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, qkv): out holds NaN."""
    generator = torch.Generator().manual_seed(tokens * dims + heads)
    qkv = torch.randn(batch, tokens, 3 * heads * dims, generator=generator).to(DEVICE, dtype)
    return torch.full((batch, tokens, heads * dims), torch.nan, device=DEVICE, dtype=dtype), qkv


def exact(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """The reference in float64."""
    wide = qkv.detach().cpu().to(F64)
    out = wide.new_empty(*wide.shape[:2], wide.shape[2] // 3)
    reference.attention_(out, wide, heads, scale)
    return out


def by_torch(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """PyTorch's own, operation by operation in the tensors' dtype with a float32 softmax."""
    q, k, v = (p.unflatten(2, (heads, -1)).transpose(1, 2) for p in qkv.detach().cpu().chunk(3, 2))
    scores = torch.softmax(scale * (q @ k.transpose(2, 3)), dim=3, dtype=F32).to(v.dtype)
    return (scores @ v).transpose(1, 2).flatten(2)


def assert_as_good_as_torch(out: Tensor, qkv: Tensor, heads: int, scale: float) -> None:
    """The largest error against float64 is at most twice PyTorch's, or the rounding of out."""
    want = exact(qkv, heads, scale)
    theirs = (by_torch(qkv, heads, scale).double() - want).abs().max()
    OP(out, qkv, heads, scale)
    got = out.cpu().double()
    assert not got.isnan().any()
    error = (got - want).abs().max()
    rounding = torch.finfo(out.dtype).eps * want.abs().max()
    assert error <= 2 * theirs + rounding, f"{error:.3g}; PyTorch's is {theirs:.3g}"


CASES = [
    pytest.param(2, 16, 1, 32, id="one-block"),
    pytest.param(1, 1, 1, 16, id="one-token"),
    pytest.param(2, 1, 2, 1, id="one-token-one-dim"),
    pytest.param(2, 9, 3, 8, id="small-heads"),
    pytest.param(1, 49, 2, 20, id="odd-tokens-odd-dims"),
    pytest.param(1, 33, 1, 129, id="several-chunks-of-odd-dims"),
    pytest.param(1, 100, 2, 64, id="several-blocks"),
]


def in_dtypes(*cases):
    """Add a dtype to each case: float16, and float32 and bfloat16 for odd sizes."""
    return [
        pytest.param(*case.values, dtype, id=f"{case.id}-{name}")
        for case in cases
        for dtype, name in ((F16, "f16"), (F32, "f32"), (BF16, "bf16"))
        if dtype == F16 or case.id == "odd-tokens-odd-dims"
    ]


@pytest.fixture
def online(monkeypatch):
    """More than 16 keys are taken block by block."""
    monkeypatch.setattr(kernels, "SHORT", 16)
    kernels._plan.cache_clear()
    yield
    kernels._plan.cache_clear()


@pytest.mark.parametrize(
    (*SHAPE, "dtype"), in_dtypes(*CASES, pytest.param(1, 256, 1, 64, id="the-longest-short"))
)
def test_attention_is_as_good_as_torch(batch, tokens, heads, dims, dtype):
    out, qkv = buffers(batch, tokens, heads, dims, dtype)
    assert_as_good_as_torch(out, qkv, heads, dims**-0.5)


@pytest.mark.parametrize(
    (*SHAPE, "dtype"),
    in_dtypes(*CASES, pytest.param(1, 40, 1, 300, id="several-chunks-of-the-output")),
)
@pytest.mark.usefixtures("online")
def test_keys_in_blocks_are_as_good_as_torch(batch, tokens, heads, dims, dtype):
    out, qkv = buffers(batch, tokens, heads, dims, dtype)
    assert_as_good_as_torch(out, qkv, heads, dims**-0.5)


@pytest.mark.parametrize(
    ("tokens", "heads", "dims"),
    [(257, 1, 16), (300, 2, 24), pytest.param(1024, 1, 64, marks=pytest.mark.slow)],
)
def test_more_tokens_than_are_held(tokens, heads, dims):
    assert kernels._plan(tokens, dims, 2, False).online
    out, qkv = buffers(1, tokens, heads, dims, F16)
    assert_as_good_as_torch(out, qkv, heads, dims**-0.5)


def strided(values: Tensor) -> Tensor:
    """The same values between others, which are NaN."""
    n, t, c = values.shape
    wide = values.new_full((n + 1, t + 2, c + 5), torch.nan)
    return wide[1:, 1:-1, 3:-2].copy_(values)


def test_strides_are_honoured():
    out, qkv = buffers(2, 21, 2, 24, F16)
    far, far_qkv = strided(out), strided(qkv)
    whole = far._base.clone()
    OP(out, qkv, 2, 0.2)
    OP(far, far_qkv, 2, 0.2)
    assert torch.equal(far, out)
    far.fill_(torch.nan)
    assert torch.equal(far._base.isnan(), whole.isnan())


@pytest.mark.parametrize("blocks", [False, True], ids=["held", "blocks"])
def test_scores_beyond_float16_and_sharp_maxima(blocks, request):
    if blocks:
        request.getfixturevalue("online")
    out, qkv = buffers(1, 40, 1, 32, F16)
    qkv[..., :64] *= 200  # products beyond 65504
    for scale in (1e-4, 1.0):  # with the second, one key takes all
        OP(out, qkv, 1, scale)
        want = exact(qkv, 1, scale)
        torch.testing.assert_close(out.cpu().double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("online")
def test_a_block_of_keys_that_nobody_looks_at():
    out, qkv = buffers(1, 192, 1, 16, F16)
    qkv[..., :16] = 1.0
    qkv[:, :128, 16:32] = -torch.inf  # both kernels' first block
    OP(out, qkv, 1, 0.25)
    want = exact(qkv, 1, 0.25)
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("blocks", [False, True], ids=["held", "blocks"])
def test_a_nan_stays_in_its_sample_and_head(blocks, request):
    if blocks:
        request.getfixturevalue("online")
    out, qkv = buffers(3, 40, 2, 16, F32)
    qkv[1, 7, 32 + 16 + 3] = torch.nan  # a key of head 1
    OP(out, qkv, 2, 0.25)
    nan = out.cpu().isnan()
    assert nan[1, :, 16:].all()
    assert nan.sum() == 40 * 16


@pytest.mark.parametrize(("batch", "tokens"), [(0, 16), (2, 0)])
def test_nothing_to_do(batch, tokens):
    OP(*buffers(batch, tokens, 1, 16, F16), 1, 0.25)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_opcheck(dtype):
    torch.library.opcheck(OP.default, (*buffers(2, 9, 2, 8, dtype), 2, 0.3))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a sparse file in CPU memory")
@pytest.mark.parametrize("blocks", [False, True], ids=["held", "blocks"])
def test_elements_beyond_2_to_the_31(sparse, blocks, request, monkeypatch):
    if blocks:
        request.getfixturevalue("online")
        monkeypatch.setattr(kernels, "SHORT", 2)
    out, qkv = buffers(1, 4, 1, 16, F16)
    near, strides = out.clone(), (1, 1 << 30, 1)
    far_qkv = sparse(F16, (3 << 30) + 48).as_strided(qkv.shape, strides).copy_(qkv)
    far = sparse(F16, (3 << 30) + 16).as_strided(out.shape, strides)
    OP(near, qkv, 1, 0.25)
    OP(far, far_qkv, 1, 0.25)
    assert torch.equal(far, near)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dims"),
    [
        *((b, 256, 1, d) for b in (1, 3, 64) for d in (256, 512)),
        *((2, t, 4, d) for t in (16, 64, 1000, 4096) for d in (8, 32, 64)),
        (2, 1024, 1, 256),
        (2, 1024, 1, 512),
        (1, 700, 1, 640),
    ],
    ids=str,
)
@DTYPES
def test_real_sizes_on_a_gpu(batch, tokens, heads, dims, dtype):
    out, qkv = buffers(batch, tokens, heads, dims, dtype)
    assert_as_good_as_torch(out, qkv, heads, dims**-0.5)


@pytest.mark.cuda
def test_a_graph_replays_what_ran():
    out, qkv = buffers(2, 256, 1, 256, F16)
    OP(out, qkv, 1, 0.0625)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OP(out, qkv, 1, 0.0625)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
