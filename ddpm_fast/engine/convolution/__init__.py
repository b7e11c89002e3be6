"""Implementations of a convolution, and the choice of the fastest."""
