"""Selection of the backend that runs an operator.

========== =================================== ================================================
name       implementation                      runs on
========== =================================== ================================================
reference  PyTorch, also in float64            any device
cpu        C++, vectorized, multi-threaded     CPU
triton     Triton kernels                      NVIDIA GPU; CPU with TRITON_INTERPRET=1, for tests
cuda       CUDA C++                            NVIDIA GPU
========== =================================== ================================================
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from typing import Any

import torch

from ddpm_fast.ops import reference
from ddpm_fast.ops.registry import NOT_LOADED, OPS
from ddpm_fast.utils.checks import dtype_name

BACKENDS = ("reference", "cpu", "triton", "cuda")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (*HALF_AND_SINGLE, torch.float64),
    "cpu": (*HALF_AND_SINGLE, torch.float64),
    "triton": HALF_AND_SINGLE,
    "cuda": HALF_AND_SINGLE,
}
# Fastest first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_log = logging.getLogger("ddpm_fast")


class Backend:
    """The operators of one backend, with the signatures of `torch.ops.ddpm_fast.*`.

    Attributes:
        name: Name of the backend.
    """

    name: str

    q_sample: Any
    q_sample_philox: Any
    q_posterior: Any
    reverse_step_: Any
    reverse_step: Any
    philox_normal_: Any
    group_norm_: Any
    attention_: Any
    conv_: Any
    checksum: Any

    def __init__(self, name: str) -> None:
        self.name = name
        prefix = "triton_" if name == "triton" else ""
        source = reference if name == "reference" else torch.ops.ddpm_fast
        for op in OPS:
            setattr(self, op, getattr(source, prefix + op))


_BACKENDS = {name: Backend(name) for name in BACKENDS}
_CACHE: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


def interpreting() -> bool:
    """Return True if Triton kernels are interpreted, so that they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def compiled_architectures() -> list[str]:
    """Return the CUDA architectures of the build, such as ["80", "90a+PTX"]; empty without CUDA."""
    try:
        from ddpm_fast import _C
    except ImportError:
        return []
    return str(_C.build_info()["cuda_architectures"]).split()


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Return True if code for some architectures runs on a GPU.

    Args:
        architectures: As `compiled_architectures` returns them.
        capability: Compute capability of the GPU, major and minor.
    """
    device = capability[0] * 10 + capability[1]
    for name in architectures:
        match = re.fullmatch(r"(\d+)(a?)(\+PTX)?", name)
        if match is None:
            continue
        built = int(match[1])
        same_major = built // 10 == capability[0]
        runs = device == built if match[2] else same_major and device >= built
        if runs or (match[3] and device >= built):
            return True
    return False


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Return the reason why a backend cannot run on a device.

    Args:
        backend: One of BACKENDS.
        device: Device of the tensors.

    Returns:
        The reason and the command that helps, or None if the backend can run.
    """
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on CPU tensors, these are on {device}"
        reason = NOT_LOADED["cpu"]
        return f"{reason}; build it with `pip install .` in the source folder" if reason else None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; `pip install triton`"
        if device.type == "cpu" and not interpreting():
            return (
                "it needs an NVIDIA GPU; on CPU tensors it runs only interpreted, slowly:"
                " set TRITON_INTERPRET=1 before Python starts"
            )
        if device.type not in {"cpu", "cuda"}:
            return f"it runs on NVIDIA GPUs, these tensors are on {device}"
        return None if device.type == "cpu" else _no_gpu()
    return _cuda_unavailable_reason(device)


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU (see nvidia-smi)"


def _cuda_unavailable_reason(device: torch.device) -> str | None:
    rebuild = (
        "build it with `DDPM_FAST_CUDA=1 CUDA_HOME=<toolkit of torch's CUDA major> pip install .`"
        " in the source folder"
    )
    if device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    if NOT_LOADED["cuda"]:
        return f"{NOT_LOADED['cuda']}; {rebuild}"
    if reason := _no_gpu():
        return reason
    capability = torch.cuda.get_device_capability(device)
    built = compiled_architectures()
    if not runs_on(built, capability):
        wanted = f"{capability[0]}{capability[1]}"
        return (
            f"it was built for {' '.join(built)}, this GPU is sm_{wanted};"
            f" {rebuild} with DDPM_FAST_CUDA_ARCHS={wanted}"
        )
    return None


def get_backend(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend for tensors of a dtype on a device.

    Args:
        backend: One of BACKENDS, or "auto" for the fastest that can run, which is logged (logger
            `ddpm_fast`, INFO).
        device: Device of the tensors.
        dtype: Dtype of the tensors.

    Raises:
        ValueError: the name is unknown.
        TypeError: the backend does not support the dtype.
        RuntimeError: the named backend cannot run; the message has the command that helps.
    """
    key = (backend, device, dtype)
    found = _CACHE.get(key)
    if found is None:
        found = _CACHE[key] = _BACKENDS[_choose(backend, device, dtype)]
    return found


def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in DTYPES["reference"]:
        accepted = ", ".join(map(dtype_name, DTYPES["reference"]))
        raise TypeError(f"tensors must be {accepted}; got {dtype_name(dtype)}")
    if backend == "auto":
        for name in _PREFERENCE.get(device.type, ("reference",)):
            if dtype in DTYPES[name] and unavailable_reason(name, device) is None:
                if not torch.compiler.is_compiling():  # a compiled graph cannot log
                    _log.info("backend auto: %s on %s for %s", name, device, dtype)
                return name
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; got {backend!r}")
    if dtype not in DTYPES[backend]:
        accepted = ", ".join(map(dtype_name, DTYPES[backend]))
        raise TypeError(
            f"tensors must be {accepted} for backend {backend}; got {dtype_name(dtype)}"
        )
    if reason := unavailable_reason(backend, device):
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend
