"""Checks of every operator, backend, dtype and layout against the float64 reference."""

from ddpm_fast.verify.runner import Check, as_table, verify

__all__ = ["Check", "as_table", "verify"]
