"""cuDNN graphs: plans for a described H100, and their arithmetic computed by torch.

cuDNN builds plans from a description of a GPU (its "deviceless" compilation). What is built here is
run only by the tests marked cuda.
"""

import importlib.util
import json
import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import conv_cases
from conv_cases import SPECS, spec
from ddpm_fast.engine.convolution import cudnn as conv_cudnn
from ddpm_fast.engine.convolution.candidates import scratch
from ddpm_fast.engine.convolution.cudnn import CudnnProvider, Graph, Kernel, nhwc
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.operations import Convolution
from ddpm_fast.models import UNet, UNetConfig
from unet_cases import CIFAR, LARGE

HALF, BFLOAT16 = torch.float16, torch.bfloat16
HAS_CUDNN = importlib.util.find_spec("cudnn") is not None
needs_cudnn = pytest.mark.skipif(not HAS_CUDNN, reason="needs nvidia-cudnn-frontend")

H100 = {
    "deviceName": "NVIDIA H100 80GB HBM3",
    "cudaDeviceId": 0,
    "deviceVer": 900,
    "driverVer": 13000,
    "multiProcessorCount": 132,
    "smCountOrigin": 0,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
    "totalGlobalMem": 85045878784,
    "l2CacheSize": 52428800,
    "warpSize": 32,
    "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
}


@pytest.fixture(scope="module")
def h100():
    cudnn = pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    if not hasattr(cudnn, "create_device_properties") or cudnn.backend_version() < 91100:
        pytest.skip("this cuDNN builds no plans for a GPU that is only described")
    return {"device_property": cudnn.create_device_properties(json.dumps(H100))}


def network_specs(options, batch, dtype=HALF):
    """Return the distinct convolutions of a network."""
    config = UNetConfig(**options)
    with torch.device("meta"):
        unet = UNet(config)
    size = options["sample_size"]
    program, _ = lower(unet, batch, size, size, dtype, norms_add=False)
    found = [op.spec for op in program.operations if isinstance(op, Convolution)]
    return list(dict.fromkeys(replace(spec, device=conv_cases.CPU) for spec in found))


def all_kernels(spec):
    found = conv_cudnn.kernels(spec)
    return found + (conv_cudnn.phase_kernels(spec) if spec.upsample else [])


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        pytest.param(CIFAR, 512, id="cifar32-512"),
        pytest.param(CIFAR, 1, id="cifar32-1", marks=pytest.mark.slow),
        pytest.param(LARGE, 1, id="ddpm256-1", marks=pytest.mark.slow),
        pytest.param(LARGE, 8, id="ddpm256-8", marks=pytest.mark.slow),
    ],
)
def test_every_convolution_of_the_networks_has_precompiled_plans(h100, options, batch):
    import cudnn

    kernels = {k for spec in network_specs(options, batch) for k in all_kernels(spec)}
    assert any(k.residual and k.bias for k in kernels)
    assert any(k.pre != k.post for k in kernels)
    assert any(k.out_strides != nhwc(k.out_size) for k in kernels)
    for kernel in kernels:
        graph = Graph(kernel, h100)
        best = graph.plans[0]
        assert graph.workspace_bytes(best) >= 0, kernel
        notes = graph._graph.get_behavior_notes_for_plan_at_index(graph._index[best])
        assert cudnn.behavior_note.RUNTIME_COMPILATION not in notes, kernel


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_plan_of_a_small_convolution_is_built(h100, spec, dtype):
    spec = replace(spec, dtype=dtype)
    found = conv_cudnn.variants(spec, *conv_cases.weights(spec), h100)
    assert len({variant.name for variant in found}) == len(found) >= 1
    assert all(variant.workspace_bytes >= 0 for variant in found)
    assert any("phases" in variant.name for variant in found) == spec.upsample


def test_variants_build_their_plans_lazily(h100):
    case = spec(128, 128, size=32, batch=64, dtype=HALF, residual=True)
    found = conv_cudnn.variants(case, *conv_cases.weights(case), h100)
    assert len(found) > 5
    graph = found[0].launches[0].graph
    assert graph._built == set()
    assert found[1].workspace_bytes >= 0
    assert graph._built == set(found[1].plans)


def test_a_described_gpu_cannot_run(h100):
    case = spec(8, 8, dtype=HALF)
    variant = conv_cudnn.variants(case, *conv_cases.weights(case), h100)[0]
    with pytest.raises(KeyError, match="handle"):
        variant(conv_cases.output(case), *conv_cases.inputs(case), None)


@needs_cudnn
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_tensors_of_a_call_reach_cudnn(h100, monkeypatch):
    """Except for the handle, which needs a GPU."""
    import cudnn

    monkeypatch.setattr(cudnn, "set_stream", lambda handle, stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.cpu.Stream())
    monkeypatch.setattr(torch.cpu.Stream, "cuda_stream", 0, raising=False)
    case = spec(8, 8, dtype=HALF, residual=True)
    variant = conv_cudnn.variants(case, *conv_cases.weights(case), h100)[0]
    variant.launches[0].graph._where = {"handle": None}
    with pytest.raises(RuntimeError, match=r"handle is NULL|handle == __null"):
        variant(conv_cases.output(case), *conv_cases.inputs(case), scratch(variant, case.device))


class TorchGraph:
    """Graph in torch, which like cuDNN reads only a tensor's address."""

    plans = ("best", "second")

    def __init__(self, kernel, where):
        self.kernel = kernel

    def workspace_bytes(self, plan):
        assert plan in self.plans
        return 300

    def run(self, plan, tensors, workspace):
        k: Kernel = self.kernel
        assert plan in self.plans
        assert workspace.numel() >= 300
        workspace.fill_(255)

        def seen(uid, size, strides):
            tensor = tensors[uid]
            assert tensor.dtype == k.dtype
            return torch.as_strided(tensor, size, strides, tensor.storage_offset())

        window = (k.out_channels, k.size[1], *k.window)
        x, weight = seen(Graph.X, k.size, nhwc(k.size)), seen(Graph.WEIGHT, window, nhwc(window))
        sides = (k.pre[1], k.post[1], k.pre[0], k.post[0])
        y = F.conv2d(F.pad(x.double(), sides), weight.double(), stride=k.stride)
        assert (tensors[Graph.RESIDUAL] is not None) == k.residual
        assert (tensors[Graph.BIAS] is not None) == k.bias
        if k.residual:
            y = y + seen(Graph.RESIDUAL, k.out_size, k.out_strides).double()
        if k.bias:
            channels = (1, k.out_channels, 1, 1)
            y = y + seen(Graph.BIAS, channels, nhwc(channels)).double()
        seen(Graph.OUT, k.out_size, k.out_strides).copy_(y)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_the_graphs_compute_the_convolution(monkeypatch, spec, dtype):
    monkeypatch.setattr(conv_cudnn, "Graph", _Named)
    spec = replace(spec, dtype=dtype)
    weight, bias = conv_cases.weights(spec)
    found = conv_cudnn.variants(spec, weight, bias, {})
    assert len(found) == (4 if spec.upsample else 2)
    check(spec, weight, bias, found)


class _Named(TorchGraph):
    X, WEIGHT, RESIDUAL, BIAS, OUT = Graph.X, Graph.WEIGHT, Graph.RESIDUAL, Graph.BIAS, Graph.OUT


def check(spec, weight, bias, variants):
    """Compare the errors against float64 with twice those of torch."""
    images = conv_cases.inputs(spec)
    want = conv_cases.expected(spec, weight, bias, *images)
    torch_error = conv_cases.error(
        conv_cases.expected(spec, weight, bias, *images, spec.dtype), want
    )
    for variant in variants:
        out = conv_cases.output(spec)
        variant(out, *images, scratch(variant, spec.device))
        limit = 2 * max(torch_error, torch.finfo(spec.dtype).eps)
        assert conv_cases.error(out, want) <= limit, variant.name


def test_the_provider_gives_the_reason_why_it_cannot_run(monkeypatch):
    provider = CudnnProvider()
    on_gpu = spec(8, 8, dtype=HALF, device=torch.device("cuda"))
    assert "cpu" in provider.unavailable_reason(spec(8, 8, dtype=HALF))
    assert "float32" in provider.unavailable_reason(replace(on_gpu, dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conv_cudnn, "_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))
    assert provider.unavailable_reason(on_gpu) is None
    assert "empty" in provider.unavailable_reason(replace(on_gpu, batch=0))
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert "does not load" in provider.unavailable_reason(on_gpu)
    monkeypatch.setattr(conv_cudnn, "_installed", lambda: False)
    assert "pip install nvidia-cudnn-frontend" in provider.unavailable_reason(on_gpu)


def test_a_form_without_plans_is_logged_and_left_out(monkeypatch, caplog):
    class OnlyWhole(_Named):
        def __init__(self, kernel, where):
            if kernel.window == (2, 2):
                raise ArithmeticError("no engine")
            super().__init__(kernel, where)

    monkeypatch.setattr(conv_cudnn, "Graph", OnlyWhole)
    case = spec(8, 8, dtype=HALF, upsample=True)
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        found = conv_cudnn.variants(case, *conv_cases.weights(case), {})
    assert [variant.name for variant in found] == ["cudnn.nearest.best", "cudnn.nearest.second"]
    assert "without cudnn's phases: no engine" in caplog.text


@pytest.mark.cuda
@needs_cudnn
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_on_a_gpu(spec, dtype):
    spec = replace(spec, dtype=dtype, device=torch.device("cuda", 0))
    weight, bias = (None if t is None else t.cuda() for t in conv_cases.weights(spec))
    built = []
    for variant in CudnnProvider().variants(spec, weight, bias):
        try:
            assert variant.workspace_bytes >= 0
            built.append(variant)
        except RuntimeError:  # a plan that this GPU cannot have
            continue
    assert built
    check(spec, weight, bias, built)


@pytest.mark.cuda
@needs_cudnn
def test_replay_equals_eager_on_another_stream():
    case = spec(64, 64, size=16, dtype=HALF, residual=True, device=torch.device("cuda", 0))
    weight, bias = (t.cuda() for t in conv_cases.weights(case))
    variant = CudnnProvider().variants(case, weight, bias)[0]
    images, workspace = conv_cases.inputs(case), scratch(variant, case.device)
    eager, replayed = conv_cases.output(case), conv_cases.output(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        variant(eager, *images, workspace)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant(replayed, *images, workspace)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, replayed)
