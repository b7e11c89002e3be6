"""Operators as Triton kernels."""
