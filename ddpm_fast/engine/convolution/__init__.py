"""The implementations of a convolution, and which is fastest."""
