"""The fused updates as operators: one schema, four backends."""

from ddpm_fast.ops.dispatch import BACKENDS, Implementation, implementation, why_not

__all__ = ["BACKENDS", "Implementation", "implementation", "why_not"]
