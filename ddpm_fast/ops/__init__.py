"""Operators with one schema and four backends."""

from ddpm_fast.ops.dispatch import BACKENDS, Backend, get_backend, unavailable_reason

__all__ = ["BACKENDS", "Backend", "get_backend", "unavailable_reason"]
