"""`ddpm-fast info`: versions, devices and available backends."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from ddpm_fast import __version__
from ddpm_fast.ops.dispatch import BACKENDS, interpreting, unavailable_reason
from ddpm_fast.ops.registry import NOT_LOADED

# Kinds of device of each backend.
_FOR = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cuda", "cpu"),
    "cuda": ("cuda",),
}


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices and backends; why a backend is not available, and what to do."""
    document = collect()
    typer.echo(json.dumps(document, indent=2) if as_json else as_text(document))


def collect() -> dict[str, Any]:
    """Return what `info` prints, as JSON can hold it; missing values are None or empty."""
    return {
        "versions": {
            "ddpm_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "build": _build(),
        "cpu_kernels": _cpu_kernels(),
        "devices": _devices(),
        "backends": {name: _backend(name) for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _build() -> dict[str, Any] | None:
    """Return the build facts of the extension; None if it is not built."""
    try:
        from ddpm_fast import _C
    except ImportError:
        return None
    facts = _C.build_info()
    return {
        "torch": facts["torch"],
        "compiler": facts["compiler"],
        "cuda": facts["cuda"] or None,
        "cuda_architectures": facts["cuda_architectures"].split(),
    }


def _cpu_kernels() -> dict[str, Any] | None:
    """Return the instruction set in use, and those that this processor supports."""
    if NOT_LOADED["cpu"]:
        return None
    from ddpm_fast import _C

    in_use = torch.ops.ddpm_fast.use_cpu_kernels("")
    return {"in_use": in_use, "runnable": _C.build_info()["cpu_kernels"].split()}


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "threads": torch.get_num_threads()}]
    for index in range(_gpus()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
            }
        )
    return devices


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _backend(name: str) -> dict[str, Any]:
    """Return the devices that a backend runs on, and the reasons for others of its kinds."""
    gpus = [f"cuda:{index}" for index in range(_gpus())]
    ready, reasons = [], {}
    for kind in _FOR[name]:
        if name == "triton" and kind == "cpu" and not interpreting():
            continue
        if name == "reference" and kind == "cuda" and not gpus:
            continue
        for device in (gpus or ["cuda"]) if kind == "cuda" else ["cpu"]:
            reason = unavailable_reason(name, torch.device(device))
            if reason is None:
                ready.append(device)
            else:
                reasons[device] = reason
    return {"ready_on": ready, "cannot_run_on": reasons}


def as_text(document: dict[str, Any]) -> str:
    """Format the document of `collect` as text."""
    lines = [f"{name:<12}{value or 'not there'}" for name, value in document["versions"].items()]
    build = document["build"]
    if build is None:
        lines.append(
            f"{'build':<12}ddpm_fast/_C is not built; `pip install .` in the source folder"
        )
    else:
        archs = " ".join(build["cuda_architectures"]) or "none"
        lines.append(
            f"{'build':<12}torch {build['torch']}, compiler {build['compiler']},"
            f" CUDA architectures {archs}"
        )
    if kernels := document["cpu_kernels"]:
        runnable = " ".join(kernels["runnable"])
        lines.append(f"{'cpu kernels':<12}{kernels['in_use']} in use; {runnable} run here")
    for found in document["devices"]:
        text = f"{found['device']}, {found.get('threads')} threads"
        if "name" in found:
            capability, memory = found["capability"], found["memory_gib"]
            text = f"{found['device']}, {found['name']}, sm {capability}, {memory} GiB"
        lines.append(f"{'device':<12}{text}")
    lines.append("backends")
    for name, state in document["backends"].items():
        if state["ready_on"]:
            lines.append(f"  {name:<10}ready on {', '.join(state['ready_on'])}")
        for device, reason in state["cannot_run_on"].items():
            lines.append(f"  {name:<10}cannot run on {device}: {reason}")
    return "\n".join(lines)
