"""Benchmarks of operators, of one forward pass and of whole sampling, interleaved with baselines.

`roofline` measures the limits of the device; `kernels`, `network` and `sampling` measure;
`results` writes CSV files and `plots` draws them. The command is `ddpm-fast bench`.
"""
