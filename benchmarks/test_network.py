"""Forward pass of the shipped model under pytest-benchmark.

    pytest benchmarks --benchmark-only

The cases are those of `ddpm-fast bench network --network triangles --batch 4 --no-compile`, without
CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ddpm_fast.bench import networks
from ddpm_fast.bench.cases import Case
from ddpm_fast.bench.network import NetworkBench

ON_GPU = torch.cuda.is_available()
UNET = networks.build("triangles").to("cuda" if ON_GPU else "cpu")
DTYPE = torch.float16 if ON_GPU else torch.float32
BENCH = NetworkBench("triangles", UNET, 4, DTYPE, with_compiled=False)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in BENCH.cases() if not case.graph]
)
def test_forward_pass(time_case: Callable[[Case, str], None], case: Case) -> None:
    time_case(case, "forward pass")
