"""Code of the U-Net's Triton kernels for sm_90, compiled without a GPU.

Run as a script, this file prints what ptxas reports as JSON (triton_compiler).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton_compiler
from ddpm_fast.ops.triton import attention as triton_attention
from ddpm_fast.ops.triton import conv as triton_conv
from ddpm_fast.ops.triton import group_norm as triton_group_norm
from ddpm_fast.ops.triton import launch as triton_launch
from ddpm_fast.ops.triton.conv import Spec

pytestmark = pytest.mark.slow
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Launch = tuple[str, Callable[[], Any]]


def maps(batch: int, channels: int, size: int, dtype: torch.dtype = F16) -> Tensor:
    shape = (batch, channels, size, size)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(
    batch: int, channels: tuple[int, ...], size: int, dtype: torch.dtype = F16, **terms: Any
) -> Launch:
    """Return a call of group_norm_; terms: vector, residual, total, modulation."""
    every = sum(channels)
    x, *others = [maps(batch, c, size, dtype) for c in channels]
    optional = {
        key: maps(batch, every, size, dtype) for key in ("residual", "total") if key in terms
    }
    args = (
        *(maps(batch, every, size, dtype), x, others[0] if others else None),
        empty(4, every) if "vector" in terms else None,
        empty(batch, dtype=torch.int64) if "vector" in terms or "modulation" in terms else None,
        *(optional.get("residual"), optional.get("total"), *[empty(every, dtype=dtype)] * 2),
        *(empty(4, 2 * every) if "modulation" in terms else None, 32, 1e-5, True),
    )
    dt = str(dtype).removeprefix("torch.")
    name = f"norm {batch} {'+'.join(map(str, channels))} @{size} {dt} {' '.join(terms)}".rstrip()
    return name, partial(triton_group_norm.group_norm_, *args)


def attention(batch: int, tokens: int, heads: int, dims: int, dtype: torch.dtype = F16) -> Launch:
    qkv = empty(batch, tokens, 3 * heads * dims, dtype=dtype)
    out = empty(batch, tokens, heads * dims, dtype=dtype)
    dt = str(dtype).removeprefix("torch.")
    name = f"attention {batch} {tokens} {heads}x{dims} {dt}"
    return name, partial(triton_attention.attention_, out, qkv, heads, dims**-0.5)


def conv(
    batch: int,
    channels: tuple[int, ...],
    outputs: int,
    size: int,
    kernel: int = 3,
    dtype: torch.dtype = F16,
    config: Any = None,
    **terms: Any,
) -> Launch:
    """Return a call of conv_; terms: residual, doubling, stride."""
    x, *others = [maps(batch, c, size, dtype) for c in channels]
    doubling, stride = "doubling" in terms, terms.get("stride", 1)
    large = 2 * size if doubling else size // stride
    out = maps(batch, outputs, large, dtype)
    shape = (
        (4, outputs, 2, 2, sum(channels)) if doubling else (outputs, kernel, kernel, sum(channels))
    )
    weight = empty(*shape, dtype=dtype).movedim(-1, -3)
    pad = kernel // 2
    args = (
        *(out, x, others[0] if others else None, weight, empty(outputs, dtype=dtype)),
        *(maps(batch, outputs, large, dtype) if "residual" in terms else None, stride, [pad] * 4),
    )
    dt = str(dtype).removeprefix("torch.")
    chosen = "" if config is None else " " + "x".join(map(str, config))
    channel = "+".join(map(str, channels))
    name = (
        f"conv {batch} {channel}>{outputs} @{size} {kernel}x{kernel} {dt}{chosen} {' '.join(terms)}"
    )
    return name.rstrip(), partial(triton_conv.conv, *args, config)


SUM = {"vector": 1, "residual": 1, "total": 1}
QUICK = [
    norm(512, (128,), 32, **SUM),
    norm(8, (256, 128), 128),
    attention(512, 256, 1, 256),
    attention(8, 256, 1, 512),
    attention(4, 1024, 1, 512),
    conv(512, (256, 128), 256, 16, residual=1),
    conv(512, (256,), 256, 8, doubling=1),
    conv(1, (256,), 256, 8, residual=1),
]
EVERY_SHAPE = [
    norm(512, (128,), 32),
    norm(512, (256, 128), 32),
    norm(512, (256,), 16, **SUM),
    norm(512, (512, 256), 8),
    norm(512, (256,), 4, modulation=1),
    norm(1, (128,), 32),
    norm(8, (128,), 256),
    norm(512, (128,), 32, F32, **SUM),
    attention(1, 256, 1, 512, BF16),
    attention(64, 64, 4, 64),
    attention(4, 1024, 4, 64),
    attention(4, 4096, 8, 32),
    attention(4, 1024, 1, 256),
    attention(2, 256, 1, 256, F32),
    attention(2, 1024, 1, 512, F32),
    conv(512, (128,), 128, 32, residual=1),
    conv(512, (256,), 256, 8, dtype=BF16),
    conv(512, (256, 128), 256, 16, 1),
    conv(512, (128,), 128, 32, stride=2),
    conv(512, (3,), 128, 32),
    conv(512, (128,), 3, 32),
    conv(1, (128,), 128, 32, residual=1),
    conv(1, (512,), 256, 4),
    conv(2, (256,), 256, 8, dtype=F32, residual=1),
]
TUNED = [
    conv(batch, (256,), 256, size, config=config)
    for batch, size in ((512, 16), (1, 16))
    for config in triton_conv.configurations(Spec(batch * size * size, 256, 256, 0, 9, 1, 2))
]


def assert_fits(kernel: dict[str, Any]) -> None:
    assert kernel["STACK"] + kernel["LOCAL"] <= 128, kernel  # bytes of a thread, outside of loops
    assert kernel["SHARED"] + kernel["dynamic"] <= 227 << 10, kernel


def assert_uses_tensor_cores(kernel: dict[str, Any]) -> None:
    """Products are wgmma, and their operands come by asynchronous copies of 16 bytes."""
    assert {name.split()[0] for name in kernel["products"]} == {"wgmma"}, kernel
    assert set(kernel["copies"]) == {"0x10"}, kernel


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return triton_compiler.compiled(__file__, tmp_path_factory.mktemp("cache"))


def test_code_for_sm_90_of_the_main_shapes(found):
    kernels = [kernel for kernel in found if not kernel["overlap"]]
    assert {kernel["name"] for kernel in kernels} == {name for name, _ in QUICK}
    for kernel in kernels:
        assert_fits(kernel)
        if kernel["name"].startswith("norm"):
            # Memory moves by vectors of 16 bytes.
            assert set(kernel["vectors"]) <= {"ld.global.v4.b32", "st.global.v4.b32"}, kernel
            assert kernel["vectors"]["ld.global.v4.b32"] >= 4, kernel
        else:
            assert_uses_tensor_cores(kernel)
            assert kernel["vectors"]["st.global.v4.b32"] >= 4, kernel


def test_kernels_that_overlap_wait_before_they_read(found):
    """With programmatic dependent launch; every kernel waits once."""
    overlapping = [kernel for kernel in found if kernel["overlap"]]
    assert len({kernel["kernel"] for kernel in overlapping}) == len(overlapping) == 6
    for kernel in overlapping:
        assert kernel["overlap"] == {"wait": 1, "launch_dependents": 1}, kernel
        assert kernel["waits_first"], kernel


def test_code_for_sm_90_of_every_shape_and_configuration(tmp_path):
    found = triton_compiler.compiled(__file__, tmp_path, "--every")
    assert len({kernel["name"] for kernel in found}) == len(
        {name for name, _ in EVERY_SHAPE + TUNED}
    )
    for kernel in found:
        assert_fits(kernel)
        tensor_cores = "float32" not in kernel["name"] and not kernel["name"].startswith("norm")
        if tensor_cores and " 3>" not in kernel["name"] and " 16x" not in kernel["name"]:
            assert_uses_tensor_cores(kernel)


def quick() -> Iterator[Launch]:
    yield from QUICK
    triton_launch.overlaps = lambda tensor: True
    yield from (norm(2, (32,), 4), norm(2, (32,), 128))
    yield from (attention(2, 16, 1, 16), attention(2, 300, 1, 16), conv(2, (16,), 16, 4))


if __name__ == "__main__":
    triton_compiler.report(EVERY_SHAPE + TUNED if "--every" in sys.argv else quick())
