"""The operators of the U-Net: schemas, fakes, and which module implements what.

Each writes into tensors that it is given, because the engine plans its memory once. As with the
updates, ``name`` runs the compiled kernels (or ATen's) on the keys CPU and CUDA, and
``triton_name`` the Triton kernels; ``ddpm_fast.ops.reference`` says what they compute.
"""

from __future__ import annotations

from typing import Any

NETWORK_SCHEMAS = {
    "group_norm_": (
        "(Tensor(a!) out, Tensor x, Tensor? x2, Tensor? vector, Tensor? row, Tensor? residual,"
        " Tensor(b!)? total, Tensor weight, Tensor bias, Tensor? modulation, int groups, float eps,"
        " bool silu) -> ()"
    ),
    "attention_": "(Tensor(a!) out, Tensor qkv, int heads, float scale) -> ()",
    "conv_": (
        "(Tensor(a!) out, Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual,"
        " int stride, int[4] padding) -> ()"
    ),
}
NETWORK_OPS = tuple(NETWORK_SCHEMAS)

# The module of each operator's Triton kernel, and of those that ATen runs on the keys CPU and CUDA.
TRITON_MODULES = {
    "group_norm_": "ddpm_fast.ops.triton.group_norm",
    "attention_": "ddpm_fast.ops.triton.attention",
    "conv_": "ddpm_fast.ops.triton.conv",
}
ATEN_MODULES = {
    "attention_": "ddpm_fast.ops.aten",
    "conv_": "ddpm_fast.ops.aten",
}


def fake(*args: Any) -> None:
    """What tracing needs of an operator that only writes into its arguments."""
    return None
