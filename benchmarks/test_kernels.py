"""Operations of the shipped model under pytest-benchmark.

    pytest benchmarks --benchmark-only

The cases are those of `ddpm-fast bench kernels --network triangles --batch 4`, for the operations
with the most work.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ddpm_fast.bench import networks
from ddpm_fast.bench.cases import Case
from ddpm_fast.bench.kernels import operations
from ddpm_fast.bench.operators import operator_cases

OPERATIONS = 12
ON_GPU = torch.cuda.is_available()
UNET = networks.build("triangles").to("cuda" if ON_GPU else "cpu")
CASES = [
    pytest.param(case, str(operation.spec), id=f"{operation.spec}-{case.name}")
    for operation, _ in operations(UNET, 4, torch.float16 if ON_GPU else torch.float32)[:OPERATIONS]
    for case in operator_cases(operation).cases
]


@pytest.mark.parametrize(("case", "group"), CASES)
def test_operation(time_case: Callable[[Case, str], None], case: Case, group: str) -> None:
    time_case(case, group)
