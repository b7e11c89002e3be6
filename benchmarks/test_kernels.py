"""The operations of the shipped model under pytest-benchmark.

pytest benchmarks --benchmark-only

The cases are those with the most work of `ddpm-fast bench kernels --network triangles --batch 4`.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.bench import networks
from ddpm_fast.bench.kernels import operations
from ddpm_fast.bench.operators import Measured, operator_cases

MOST = 12  # operations, those with the most work
ON_GPU = torch.cuda.is_available()
DTYPE = torch.float16 if ON_GPU else torch.float32
UNET = networks.build("triangles").to("cuda" if ON_GPU else "cpu")
OPERATIONS = [operation for operation, _ in operations(UNET, 4, DTYPE)[:MOST]]


def _cases() -> list[object]:
    return [
        pytest.param(operation, candidate.name, id=f"{operation.spec}-{candidate.name}")
        for operation in OPERATIONS
        for candidate in operator_cases(operation).candidates
    ]


@pytest.mark.parametrize(("operation", "name"), _cases())
def test_operation(benchmark, operation: Measured, name: str) -> None:
    benchmark.group = str(operation.spec)
    run = next(c.run for c in operator_cases(operation).candidates if c.name == name)

    def call() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    with torch.no_grad():
        try:
            call()
        except RuntimeError as error:
            pytest.skip(f"{name} cannot run it: {str(error).splitlines()[0]}")
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
