"""Fused GroupNorm and SiLU inside any network: `optimize_module`."""
