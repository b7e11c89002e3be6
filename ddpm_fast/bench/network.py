"""Benchmark of one forward pass: the engine, and the baselines with the same weights and images."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.bench import baselines
from ddpm_fast.bench.cases import Benchmark, Case, Prepared, graphed, relative_rms, timing_columns
from ddpm_fast.bench.published import counts
from ddpm_fast.bench.roofline import RooflineLimits
from ddpm_fast.bench.timing import interleaved
from ddpm_fast.engine import AcceleratedUNet, UNetEngine
from ddpm_fast.engine.plan.lowering import lower

_LEAST_LEFT_S = 1.0
_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass
class _Built:
    case: Case
    prepared: Prepared
    seconds: float  # of building
    peak: int | None  # bytes
    error: float


class NetworkBench(Benchmark):
    """The implementations of one network, built one by one and timed together.

    Args:
        with_compiled: measure the baselines compiled by torch.compile too.
        **options: arguments of `Benchmark`.
    """

    def __init__(self, *args: Any, with_compiled: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self._with_compiled = with_compiled
        self._built: list[_Built] = []
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.unet.config.in_channels, *self.size)
        self._x = torch.randn(shape, generator=generator).to(self.device)
        with torch.no_grad():
            exact = copy.deepcopy(self.unet).double()
            self._expected = exact(self._x[:1].double(), self._t[:1])
        self._flops = lower(self.unet, self.batch, *self.size, self.dtype, norms_add=False)[0].flops
        torch.compiler.reset()

    def cases(self) -> list[Case]:
        """List the cases for this device and these options, this package's first."""
        graph, dtype = self.on_gpu, self.dtype
        found = [Case("engine", self._engine, dtype)]
        if graph:
            found.append(Case("engine, CUDA graph", self._engine, dtype, graph=True))
        found.append(Case("accelerate", self._accelerated, dtype))
        if not self._with_baselines:
            return found

        def baseline(network: str, mode: str | None, layout: str, **flags: Any) -> Case:
            name = f"{network}, {mode or 'eager'}, {layout}"
            name += ", CUDA graph" if flags.get("graph") else ""
            last = layout == "channels_last"
            return Case(
                name,
                lambda: self._baseline(network, mode, last),
                self.baseline_dtype,
                baseline=True,
                **flags,
            )

        found.append(baseline("UNet", None, "channels_last"))
        network, layout = "diffusers", "NCHW"
        try:
            _ = baselines.module("diffusers").UNet2DModel  # imported before memory is measured
        except baselines.MissingError as error:
            self.left_out["diffusers"] = f"{error}; ddpm_fast's plain UNet is compiled instead"
            network, layout = "UNet", "channels_last"
        else:
            found.append(baseline(network, None, layout))
        if graph:
            found.append(baseline(network, None, layout, graph=True))
        if self._with_compiled:
            flags = {"graph": graph, "compiled": True}
            found.append(baseline(network, "compile", "channels_last", **flags, wave=1))
            if graph:
                found.append(baseline(network, "max-autotune", "channels_last", **flags, wave=2))
        return found

    def measure(
        self, rounds: int, limit: float, roofline: RooflineLimits
    ) -> Iterator[list[dict[str, Any]]]:
        """Build the cases wave by wave, and time everything built after each wave.

        Args:
            rounds: measurements of each case.
            limit: seconds after which no further baseline is built.
            roofline: the device's limits, measured in the same run.

        Yields:
            The rows of all cases built so far. `peak_MB` is, on a GPU, the peak memory that a case
            adds, weights included. `error` is that of `KernelBench.measure`, for the first image.
            `speedup` is relative to the fastest baseline.

        Raises:
            Exception: raised by the engine. A baseline that fails is left out.
        """
        end = time.perf_counter() + limit
        cases = self.cases()
        for wave in sorted({case.wave for case in cases}):
            before = len(self._built)
            for case in (case for case in cases if case.wave == wave):
                late = case.baseline and end - time.perf_counter() < _LEAST_LEFT_S
                if built := self.attempt(case, lambda case=case: self._build(case), late):  # type: ignore[misc]
                    self._built.append(built)
            if len(self._built) > before:
                yield self._rows(roofline, rounds, max(end - time.perf_counter(), _LEAST_LEFT_S))

    @torch.no_grad()
    def _build(self, case: Case) -> _Built:
        begin = time.perf_counter()
        memory = _PeakMemory(self.device)
        prepared = case.prepare()
        prepared.run()
        memory.reset()
        result = prepared.run()
        peak = memory.read()
        if case.graph:
            prepared = Prepared(graphed(prepared.run, self.device), prepared.note)
            result = prepared.run()
        error = relative_rms(result, self._expected)
        return _Built(case, prepared, time.perf_counter() - begin, peak, error)

    def _rows(self, roofline: RooflineLimits, rounds: int, limit: float) -> list[dict[str, Any]]:
        self._say("timing")
        with torch.no_grad():
            calls = {built.case.name: built.prepared.run for built in self._built}
            times = interleaved(calls, self.device, rounds, limit=limit)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        known = [built.case for built in self._built]
        best = min((median[case.name] for case in known if case.baseline), default=None)
        compiled = min((median[case.name] * 1e3 for case in known if case.compiled), default=None)
        verdict = counts(self.gpu, self.name, self.batch, self.dtype, compiled)
        rows: list[dict[str, Any]] = []
        for built in self._built:
            case, seconds = built.case, median[built.case.name]
            rate = self._flops / seconds
            rows.append(
                {
                    **self.subject(case.dtype),
                    "case": case.name,
                    "role": case.role,
                    **timing_columns(times[case.name], 2),
                    "speedup": "" if best is None else round(best / seconds, 3),
                    "TFLOP_per_s": round(rate / 1e12, 4),
                    "of_matmul": round(rate / roofline.matmul, 4),
                    "peak_MB": "" if built.peak is None else round(built.peak / 1e6, 1),
                    "error": f"{built.error:.2e}",
                    "build_s": round(built.seconds, 1),
                    "note": built.prepared.note,
                    "counts": verdict,
                    **roofline.columns,
                }
            )
        return rows

    def _engine(self) -> Prepared:
        engine = UNetEngine(self.unet, self.batch, self.size, self.dtype)
        x = self._images(self.dtype, last=True)
        return Prepared(lambda: engine(x, self._t), f"{len(engine.plan().operations)} operations")

    def _accelerated(self) -> Prepared:
        model = AcceleratedUNet(self.unet, dtype=self.dtype)
        x = self._images(self.dtype, last=True)
        model(x, self._t)
        choice = next(reversed(model.chosen.values()))
        return Prepared(lambda: model(x, self._t), f"took {choice.name}")

    def _baseline(self, network: str, mode: str | None, last: bool) -> Prepared:
        """Prepare a network of PyTorch; `mode` is a key of `_MODES` or None for eager."""
        dtype = self.baseline_dtype
        if network == "UNet":
            model: nn.Module = copy.deepcopy(self.unet).to(self.device, dtype)
        else:
            model = baselines.diffusers_unet(self.unet, self.device, dtype)
        if last:
            model.to(memory_format=torch.channels_last)
        x = self._images(dtype, last)
        call: Any = model
        if mode is not None:
            call = torch.compile(model, mode=_MODES[mode], dynamic=False)
        if network == "UNet":
            return Prepared(lambda: call(x, self._t))
        return Prepared(lambda: call(x, self._t, return_dict=False)[0])

    def _images(self, dtype: torch.dtype, last: bool) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return self._x.to(dtype, memory_format=layout)


class _PeakMemory:
    """Peak of the GPU memory allocated by torch, beyond that allocated at construction."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            gc.collect()
            self._before = torch.cuda.memory_allocated(device)

    def reset(self) -> None:
        """Reset the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int | None:
        """Return the peak in bytes; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before
