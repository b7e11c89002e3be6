"""Parts of the benchmarks: limits, rounds, selection of variants, networks, points."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ddpm_fast import UNetConfig
from ddpm_fast.bench import kernels, networks, plots, published, results, roofline
from ddpm_fast.bench.timing import interleaved, quantiles
from ddpm_fast.utils import figures
from engine_cases import CPU, small
from unet_cases import CIFAR, LARGE


def test_only_the_best_variants_of_a_provider_are_timed_further(monkeypatch) -> None:
    seconds = {"aten": 9.0, "cudnn.1": 3.0, "cudnn.2": 1.0, "cudnn.3": 2.0, "torch, a": 5.0}
    cases = {name: (lambda: None) for name in seconds}
    monkeypatch.setattr(
        kernels, "once", lambda case, device: seconds[next(n for n in cases if cases[n] is case)]
    )
    assert list(kernels._promising(cases, CPU)) == ["aten", "cudnn.2", "cudnn.3", "torch, a"]


def test_a_point_is_the_fastest_implementation_of_this_package() -> None:
    def row(name: str, role: str, us: float) -> dict[str, object]:
        work = {"operation": "a", "kind": "attention", "arithmetic": 4e6, "nbytes": 2e6}
        return work | {"implementation": name, "role": role, "p50_us": us, "count": 3}

    rows = [row("slow", "ours", 8.0), row("fast", "ours", 2.0), row("peer", "peer", 1.0)]
    (point,) = plots._points(rows)
    assert point == (2.0, 2e12, "attention", 1.0)


def test_large_figures_lose_colours_rather_than_size(tmp_path) -> None:
    path = tmp_path / "noise.png"
    noise = torch.randint(0, 256, (400, 400, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(path)
    small = figures._smaller(path.read_bytes())
    assert len(small) < path.stat().st_size
    (tmp_path / "small.png").write_bytes(small)
    with Image.open(tmp_path / "small.png") as image:
        assert image.size == (400, 400)


@pytest.mark.parametrize(
    ("gpu", "batch", "dtype", "ms", "verdict"),
    [
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.float16, 3.63, "yes", id="same"),
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.float16, 4.17, "yes", id="slower-by-14.9"),
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.float16, 4.18, "no", id="slower-by-15.2"),
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.float16, 3.08, "no", id="faster-by-15.2"),
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.bfloat16, 3.63, "unknown", id="dtype"),
        pytest.param("NVIDIA H100 80GB HBM3", 2, torch.float16, 3.63, "unknown", id="batch"),
        pytest.param("NVIDIA H100 80GB HBM3", 64, torch.float16, None, "unknown", id="no-baseline"),
        pytest.param("NVIDIA H200", 64, torch.float16, 3.63, "yes", id="h200-not-faster"),
        pytest.param("NVIDIA H200", 64, torch.float16, 2.54, "yes", id="h200-as-its-memory"),
        pytest.param("NVIDIA H200", 64, torch.float16, 2.1, "no", id="h200-too-fast"),
        pytest.param("NVIDIA A100", 64, torch.float16, 3.63, "unknown", id="other-card"),
    ],
)
def test_a_run_counts_near_the_published_baseline(gpu, batch, dtype, ms, verdict) -> None:
    assert published.counts(gpu, "cifar32", batch, dtype, ms) == verdict


@pytest.mark.parametrize(("name", "options"), [("cifar32", CIFAR), ("ddpm256", LARGE)])
def test_architectures_have_the_published_options(name, options) -> None:
    ours = UNetConfig(**networks.ARCHITECTURES[name])
    assert ours == UNetConfig(**options)


def test_scaled_weights_keep_the_size_of_activations() -> None:
    unet, sizes = networks.even(small()), []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: sizes.append(float(y.std())))
    with torch.no_grad():
        unet(torch.randn(2, 2, 8, 8), 500)
    assert all(0.3 < size < 3 for size in sizes)


def test_roofline_limits_are_those_of_the_given_sizes(monkeypatch) -> None:
    monkeypatch.setattr(
        roofline, "interleaved", lambda cases, device, rounds: {n: [1.0, 2.0, 9.0] for n in cases}
    )
    found = roofline.measure(CPU, torch.float32, 1 << 10, (8, 16))
    assert found == roofline.RooflineLimits(2 * (1 << 10) / 2.0, 2 * 16**3 / 2.0, torch.float32)


def test_rounds_are_interleaved_and_stop_at_the_limit() -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = interleaved(cases, CPU, rounds=50, least=0, limit=0)
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert calls[-6:] == ["a", "b", "b", "a", "a", "b"]
    assert quantiles([2e-6]) == {"p20_us": 2.0, "p50_us": 2.0, "p80_us": 2.0}


def test_metadata_has_the_versions_of_given_packages(tmp_path, monkeypatch) -> None:
    facts = results.metadata("typer", "no-such-package")
    assert facts["typer"]
    assert facts["no-such-package"] == ""
    # Installed without its checkout: the revision of a surrounding repository does not count.
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    assert results.metadata()["revision"] == ""
