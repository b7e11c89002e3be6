"""`ddpm-fast bench`: results, tables, figures, baselines, errors."""

from __future__ import annotations

import csv
import importlib
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli_runs import error_of, run
from ddpm_fast import Tuner, UNet, UNetConfig
from ddpm_fast.bench import (
    baselines,
    kernels,
    networks,
    operators,
    plots,
    roofline,
    timing,
)
from ddpm_fast.bench import network as network_bench
from ddpm_fast.bench.cases import relative_rms
from ddpm_fast.bench.sampling import SamplingBench
from ddpm_fast.utils import figures
from unet_cases import SMALL

FACTS = {"date", "cpu", "cores", "gpu", "python", "torch", "triton", "numpy", "revision"}
FACTS |= {"diffusers", "denoising-diffusion-pytorch", "nvidia-cudnn-frontend", "threads"}
TIMES = {"rounds", "p20_us", "p50_us", "p80_us"}
MEASURE_ROOFLINE = roofline.measure
TINY = {"sample_size": 8}
LIMITS = roofline.RooflineLimits(1.0, 1.0, torch.float32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A tiny network named triangles, a small roofline, no tuning, short timings."""
    unet = networks.even(UNet(UNetConfig(**SMALL | TINY)))
    monkeypatch.setattr(networks, "build", lambda name: unet)
    monkeypatch.setattr(
        roofline, "measure", lambda *placement: MEASURE_ROOFLINE(*placement, 1 << 16, (32,), 2)
    )
    for module in ("unet_engine", "accelerated_unet"):
        benchmark = importlib.import_module(f"ddpm_fast.engine.{module}")
        monkeypatch.setattr(benchmark, "Tuner", partial(Tuner, mode="off"))
    for name, value in {"LEAST_S": 0.0, "_WARM_CALLS": 1, "_GAUGING_CALLS": 1}.items():
        monkeypatch.setattr(timing, name, value)
    return unet


@pytest.fixture
def no_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bench(what: str, out: Path, *options: object) -> tuple[list[dict[str, str]], str]:
    """Run a command on tiny settings; return its rows and output."""
    command = ["bench", what, "--network", "triangles", "--device", "cpu", "--out", out]
    result = run(*command, "--rounds", 1, *options)
    rows = read(out)
    assert set(rows[0]) >= FACTS | TIMES | {"network", "batch", "device", "dtype", "role"}
    for row in rows:
        assert row["network"] == "triangles"
        assert row["torch"] == torch.__version__
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
    assert result.stdout.splitlines()[-1].startswith("wrote ")
    return rows, result.stdout


def test_kernels_time_every_operation_of_the_plan(tmp_path, tiny) -> None:
    rows, text = bench("kernels", tmp_path / "a" / "k.csv", "--batch", 2)
    wanted = kernels.operations(tiny, 2, torch.float32)
    assert list(dict.fromkeys(row["operation"] for row in rows)) == [
        str(operation.spec) for operation, _ in wanted
    ]
    assert {row["kind"] for row in rows} == set(plots.KINDS)
    for operation, count in wanted:
        mine = [row for row in rows if row["operation"] == str(operation.spec)]
        names = [row["implementation"] for row in mine]
        assert len(set(names)) == len(names)
        assert {row["role"] for row in mine} == {"ours", "peer", "copy"}
        for row in mine:
            assert int(row["count"]) == count
            share = float(row["GB_per_s"]) / float(row["copy_GB_per_s"])
            assert float(row["of_copy"]) == pytest.approx(share, rel=0.02, abs=0.01)
            if row["role"] != "copy":
                assert float(row["error"]) < 1e-5
            rated = row["kind"] != "group_norm" and row["role"] != "copy"
            assert (row["TFLOP_per_s"] != "") == rated
        assert f"{count} x {operation.spec}" in text


def test_operations_are_counted_and_sorted_by_work(tiny) -> None:
    pairs = kernels.operations(tiny, 1, torch.float32)
    counts = Counter({operation.spec: count for operation, count in pairs})
    assert len(counts) == len(pairs)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in tiny.modules())
    kinds = [spec for spec in counts.elements() if type(spec).__name__ == "NormSpec"]
    assert len(kinds) == norms
    weights = [kernels._weight(*pair) for pair in pairs]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"resnet_time_scale_shift": "scale_shift"}, id="modulated"),
        pytest.param({"downsample_padding": 0}, id="uneven-padding"),
    ],
)
def test_every_candidate_computes_the_same(options) -> None:
    unet = networks.even(UNet(UNetConfig(**SMALL | TINY | options)))
    for operation, _ in kernels.operations(unet, 2, torch.float32):
        with torch.no_grad():
            benchmark = operators.operator_cases(operation)
            for case in benchmark.cases:
                if case.name.startswith("sdpa"):
                    continue  # which of torch's kernels run depends on the machine
                error = relative_rms(case.prepare().run(), benchmark.expected)
                assert error < 1e-5, (operation.spec, case.name)


def test_network_times_this_package_and_the_baselines(tmp_path) -> None:
    out, png = tmp_path / "n.csv", tmp_path / "n.png"
    rows, text = bench("network", out, "--batch", 1, "--batch", 2, "--no-compile", "--plot", png)
    names = ["engine", "accelerate", "UNet, eager, channels_last", "diffusers, eager, NCHW"]
    assert [(row["batch"], row["case"]) for row in rows] == [
        (batch, name) for batch in "12" for name in names
    ]
    assert [row["role"] for row in rows[:4]] == ["ours", "ours", "peer", "peer"]
    for row in rows:
        assert float(row["error"]) < 1e-5
        assert row["counts"] == "unknown"
        assert row["peak_MB"] == ""
    best = min(float(row["p50_us"]) for row in rows[2:4])
    assert float(rows[0]["speedup"]) == pytest.approx(best / float(rows[0]["p50_us"]), abs=1e-3)
    assert "took " in rows[1]["note"]
    assert text.count("counts: unknown") == 2
    assert text.splitlines()[-2:] == [f"wrote {out}", f"wrote {png}"]
    check_figure(png)


def test_baselines_are_float32_on_a_cpu(tmp_path) -> None:
    rows, _ = bench("network", tmp_path / "n.csv", "--no-compile", "--dtype", "bfloat16")
    assert [row["dtype"] for row in rows] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert 1e-4 < float(rows[0]["error"]) < 0.1


def test_without_baselines_only_this_package_is_timed(tmp_path) -> None:
    rows, text = bench("network", tmp_path / "n.csv", "--no-peers")
    assert [row["case"] for row in rows] == ["engine", "accelerate"]
    assert rows[0]["speedup"] == ""
    assert "left out" not in text
    rows, _ = bench("kernels", tmp_path / "k.csv", "--no-peers", "--limit", 0)
    assert {row["role"] for row in rows} == {"ours", "copy"}
    assert len({row["operation"] for row in rows}) == 1


@pytest.mark.usefixtures("no_diffusers")
def test_missing_baselines_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    rows, text = bench("network", tmp_path / "n.csv", "--no-compile")
    assert [row["case"] for row in rows][2:] == ["UNet, eager, channels_last"]
    assert "left out: diffusers: the package diffusers cannot be imported" in text
    rows, text = bench("sampling", tmp_path / "s.csv", "--steps", 2)
    assert [row["case"] for row in rows] == ["Sampler, accelerate", "Sampler, UNet"]
    assert "the package diffusers cannot be imported" in text
    assert "the package denoising-diffusion-pytorch cannot be imported" in text


def test_a_failing_baseline_is_left_out(tmp_path, monkeypatch) -> None:
    def broken(name: str) -> None:
        raise OSError("no such symbol")

    monkeypatch.setattr(baselines.importlib, "import_module", broken)
    with pytest.raises(
        baselines.MissingError, match="diffusers fails when it is imported: no such"
    ):
        baselines.module("diffusers")
    monkeypatch.undo()
    benchmark = network_bench.NetworkBench(
        "x", networks.even(UNet(**SMALL)), 1, torch.float32, with_compiled=False, size=(8, 8)
    )
    monkeypatch.setattr(benchmark, "_baseline", lambda *args: 1 / 0)
    (rows,) = benchmark.measure(1, math.inf, LIMITS)
    assert [row["role"] for row in rows] == ["ours", "ours"]
    assert set(benchmark.left_out.values()) == {"ZeroDivisionError: division by zero"}


def test_a_failing_engine_raises(tiny, monkeypatch) -> None:
    benchmark = network_bench.NetworkBench("x", tiny, 1, torch.float32, with_baselines=False)
    monkeypatch.setattr(benchmark, "_engine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(benchmark.measure(1, math.inf, LIMITS))


def test_after_the_limit_no_baseline_is_built(tmp_path) -> None:
    rows, text = bench("network", tmp_path / "n.csv", "--limit", 0)
    assert [row["case"] for row in rows] == ["engine", "accelerate"]
    assert "left out: diffusers, compile, channels_last: no time left" in text


def test_compiled_baselines_are_timed_with_all_other_cases(tiny, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    benchmark = network_bench.NetworkBench("x", tiny, 1, torch.float32)
    waves = list(benchmark.measure(1, math.inf, LIMITS))
    assert [len(rows) for rows in waves] == [4, 5]
    assert waves[1][-1]["case"] == "diffusers, compile, channels_last"


@pytest.mark.slow
def test_the_compiled_baseline(tmp_path) -> None:
    rows, _ = bench("network", tmp_path / "n.csv")
    assert rows[-1]["case"] == "diffusers, compile, channels_last"
    assert float(rows[-1]["error"]) < 1e-5


def test_sampling_times_whole_jobs(tmp_path) -> None:
    out = tmp_path / "s.csv"
    rows, _ = bench("sampling", out, "--steps", 3, "--batch", 2, "--plot", tmp_path / "s.png")
    assert [row["case"] for row in rows[:4]] == [
        "Sampler, accelerate",
        "Sampler, UNet",
        "accelerate(DDPMPipeline)",
        "diffusers' DDPMPipeline",
    ]
    assert [row["role"] for row in rows[:4]] == ["ours", "ours", "ours", "peer"]
    assert [bool(row["images_differ"]) for row in rows[:4]] == [False, False, True, False]
    assert float(rows[2]["images_differ"]) < 1e-4
    for row in rows:
        ms = float(row["p50_us"]) / 3e3
        assert float(row["ms_per_step"]) == pytest.approx(ms, rel=1e-3)
        assert float(row["images_per_s"]) == pytest.approx(2e3 / (3 * ms), rel=1e-3)
    assert all(float(row["of_network"]) > 0 for row in (*rows[:2], rows[3]))
    check_figure(tmp_path / "s.png")


def test_the_pipeline_is_left_out_at_another_size(tiny) -> None:
    benchmark = SamplingBench("x", tiny, 1, torch.float32, steps=1, size=(4, 4))
    (rows,) = benchmark.measure(1, math.inf)
    assert [row["case"] for row in rows if row["role"] == "ours"] == [
        "Sampler, accelerate",
        "Sampler, UNet",
    ]
    assert "own size" in benchmark.left_out["diffusers' DDPMPipeline"]


def check_figure(path: Path) -> None:
    assert path.stat().st_size < figures.MOST_BYTES
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_figures_are_drawn_from_a_csv(tmp_path) -> None:
    out, png = tmp_path / "k.csv", tmp_path / "deep" / "k.png"
    bench("kernels", out, "--batch", 1, "--batch", 2)
    assert run("bench", "plot", out, png).stdout == f"wrote {png}\n"
    check_figure(png)
    figure = plots.roofline(read(out))
    (axes,) = figure.axes
    assert figure.get_suptitle() == "Operations of triangles, batch 2, float32"
    assert read(out)[0]["date"][:10] in figure.get_supxlabel()
    shares = [point.share for point in plots._points([r for r in read(out) if r["batch"] == "2"])]
    assert sum(shares) == pytest.approx(1)
    assert sum(len(c.get_offsets()) for c in axes.collections) == len(shares)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        pytest.param("kernels", ["--network", "x"], "--network must be one of cifar32, .*; got 'x'",
                     id="network"),
        pytest.param("network", ["--dtype", "int8"], "--dtype must be .*got 'int8'", id="dtype"),
        pytest.param("sampling", ["--device", "tpu"], "--device must be cpu, cuda", id="device"),
        pytest.param("kernels", ["--out", "a.txt"], "--out must be a .csv .*'a.txt'", id="ending"),
        pytest.param("kernels", ["--plot", "a.jpg"], "--plot must be a .png .*'a.jpg'", id="plot"),
        pytest.param("kernels", ["--out", "/proc/x/a.csv"], "/proc/x", id="unwritable"),
    ],
)  # fmt: skip
def test_bad_options_raise_before_any_work(what, options, message, monkeypatch) -> None:
    def work(*args: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(networks, "build", work)
    monkeypatch.setattr(roofline, "measure", work)
    result = run("bench", what, "--device", "cpu", *options, status=2)
    assert re.search(message, error_of(result))


def test_a_batch_below_one_and_a_missing_gpu_raise(monkeypatch) -> None:
    assert "--batch" in run("bench", "kernels", "--batch", 0, status=2).stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "network", "--device", "cuda", status=2)
    assert "torch finds no NVIDIA GPU" in error_of(result)


def test_missing_matplotlib_is_reported_before_any_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, png = tmp_path / "n.csv", tmp_path / "n.png"
    for command in (["network", "--out", out, "--plot", png], ["plot", out, png]):
        message = error_of(run("bench", *command, status=2))
        assert "needs the package matplotlib: `pip install 'matplotlib'`" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a,b\n1,2\n", "one of the benchmarks", id="other-columns"),
        pytest.param("", "has no rows", id="empty"),
        pytest.param(
            "build_s,batch,p50_us,steps\n1,1,fast,1\n", "p50_us must hold", id="no-number"
        ),
    ],
)
def test_a_csv_that_cannot_be_drawn_raises(tmp_path, text, message) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert message in error_of(run("bench", "plot", path, tmp_path / "a.png", status=2))
    assert not (tmp_path / "a.png").exists()


def test_a_run_counts_by_its_fastest_compiled_baseline(tiny, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    calls = []
    monkeypatch.setattr(network_bench, "counts", lambda *args: calls.append(args) or "yes")
    benchmark = network_bench.NetworkBench("cifar32", tiny, 1, torch.float32)
    benchmark.gpu = "some card"
    *_, rows = benchmark.measure(1, math.inf, LIMITS)
    assert {row["counts"] for row in rows} == {"yes"}
    assert calls[0] == ("some card", "cifar32", 1, torch.float32, None)
    assert calls[1][4] == pytest.approx(float(rows[-1]["p50_us"]) / 1e3, rel=1e-3)
