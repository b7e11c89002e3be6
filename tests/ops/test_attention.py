"""attention: values, layouts, output over its own input, gradients refused."""

from __future__ import annotations

import pytest
import torch

from cases import BF16, F16, F32, backends, normals, relative_error
from ddpm_fast.ops.functional import attention

ON = pytest.mark.parametrize("on", backends(), ids=str)


def exact_attention(qkv, heads, scale=None):
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.double().chunk(3, 2))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return (torch.softmax(scale * (q @ k.mT), 3) @ v).transpose(1, 2).flatten(2)


@ON
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "gapped", "sliced"])
def test_attention_is_what_torch_composes(on, dtype, layout):
    if dtype == BF16 and str(on) == "triton":
        pytest.skip("Triton's interpreter multiplies matrices of bfloat16 as integers")
    qkv = normals((2, 20, 3 * 2 * 16), layout, dtype, 1, on.device)
    for scale in (None, 0.5):
        ours = attention(qkv, 2, scale, backend=on.name)
        assert relative_error(ours, exact_attention(qkv, 2, scale)) <= 4 * torch.finfo(dtype).eps
    assert ours.dtype == dtype


@ON
def test_attention_writes_out_and_does_nothing_where_there_is_nothing(on):
    qkv = normals((2, 20, 96), "contiguous", F32, 1, on.device)
    out = torch.full((2, 20, 40), 7.0, device=on.device)
    got = attention(qkv, 2, out=out[..., 4:36], backend=on.name)
    assert got.data_ptr() == out[..., 4:36].data_ptr()
    assert relative_error(got, exact_attention(qkv, 2)) <= 1e-6
    assert bool((out[..., :4] == 7).all() & (out[..., 36:] == 7).all())
    exact = exact_attention(qkv, 2)
    attention(qkv, 2, out=qkv[..., :32], backend=on.name)  # over its own queries
    assert relative_error(qkv[..., :32], exact) <= 1e-6
    for empty in (qkv[:0], qkv[:, :0]):
        assert attention(empty, 2, backend=on.name).shape == (*empty.shape[:2], 32)


@ON
def test_attention_refuses_a_gradient(on):
    qkv = torch.zeros(2, 16, 96, device=on.device, requires_grad=True)
    with pytest.raises(ValueError, match="qkv requires grad, and attention has no gradient"):
        attention(qkv, 2, backend=on.name)
    with torch.no_grad():
        attention(qkv, 2, backend=on.name)
