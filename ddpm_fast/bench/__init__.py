"""Benchmarks: operators, one forward pass, whole sampling; peers take turns in the same run.

`ceilings` measures what the device can do, `kernels`, `network` and `sampling` measure, `results`
writes CSV and `plots` draws it. The command is ``ddpm-fast bench``.
"""
