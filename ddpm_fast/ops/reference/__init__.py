"""Operators in plain PyTorch; the other backends are checked against them."""

from ddpm_fast.ops.reference.checksum import checksum
from ddpm_fast.ops.reference.diffusion import (
    normals,
    philox4x32_10,
    philox_normal_,
    predicted_x0,
    q_posterior,
    q_sample,
    q_sample_philox,
    reverse_step,
    reverse_step_,
)
from ddpm_fast.ops.reference.network import attention_, conv_, doubling_weight, group_norm_

__all__ = [
    "attention_",
    "checksum",
    "conv_",
    "doubling_weight",
    "group_norm_",
    "normals",
    "philox4x32_10",
    "philox_normal_",
    "predicted_x0",
    "q_posterior",
    "q_sample",
    "q_sample_philox",
    "reverse_step",
    "reverse_step_",
]
