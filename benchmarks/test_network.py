"""A forward pass of the shipped model under pytest-benchmark.

pytest benchmarks --benchmark-only

The cases are those of `ddpm-fast bench network --network triangles --batch 4 --no-compile`, without
CUDA graphs.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.bench import networks
from ddpm_fast.bench.network import NetworkBench, Way

ON_GPU = torch.cuda.is_available()
DTYPE = torch.float16 if ON_GPU else torch.float32
UNET = networks.build("triangles").to("cuda" if ON_GPU else "cpu")
BENCH = NetworkBench("triangles", UNET, 4, DTYPE, with_compiled=False)


@pytest.mark.parametrize(
    "way", [pytest.param(way, id=way.name) for way in BENCH.ways() if not way.graph]
)
def test_forward_pass(benchmark, way: Way) -> None:
    benchmark.group = "forward pass"

    def call() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    with torch.no_grad():
        run, _ = way.prepare()
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
