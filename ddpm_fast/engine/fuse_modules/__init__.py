"""`optimize_module`: fused GroupNorm and SiLU in any PyTorch model."""
