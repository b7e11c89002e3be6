"""Fixture of the benchmarks that run under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ddpm_fast.bench.cases import Case


@pytest.fixture
def time_case(benchmark) -> Callable[[Case, str], None]:
    """Prepare a case of `ddpm-fast bench` and time it, in rounds of one call."""

    def measure(case: Case, group: str) -> None:
        benchmark.group = group
        with torch.no_grad():
            run = case.prepare().run

            def call() -> None:
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()

            try:
                call()
            except RuntimeError as error:
                pytest.skip(f"{case.name} cannot run here: {str(error).splitlines()[0]}")
            benchmark.pedantic(call, rounds=20, warmup_rounds=2)

    return measure
