"""Every operator, backend, dtype and layout against float64."""

from ddpm_fast.verify.runner import Check, as_table, verify

__all__ = ["Check", "as_table", "verify"]
