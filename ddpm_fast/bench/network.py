"""One forward pass of a network: the engine, and the peers on the same weights and images."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.bench import baselines, networks
from ddpm_fast.bench.published import counts
from ddpm_fast.bench.roofline import RooflineLimits
from ddpm_fast.bench.timing import interleaved, quantiles
from ddpm_fast.engine import UNetEngine, accelerate
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.models import UNet
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import GraphedStep

Run = Callable[[], Tensor]
Say = Callable[[str], None]
TIMESTEP = 500
_LEAST_LEFT_S = 1.0
_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Way:
    """A way to run the network.

    prepare: builds it and returns its calls, and a note on what was built. graph: its calls are
    replayed as a CUDA graph. wave: what takes minutes to build comes in a later one, when the waves
    before have been measured.
    """

    name: str
    prepare: Callable[[], tuple[Run, str]]
    dtype: torch.dtype
    graph: bool = False
    baseline: bool = False
    compiled: bool = False
    wave: int = 0


@dataclass
class _Built:
    way: Way
    run: Run
    seconds: float
    peak: int | None
    error: float
    note: str


class NetworkBench:
    """The ways to run one network on one batch, built one by one and timed together.

    dtype: of the engine, and on a GPU of the peers, which are float32 on a CPU. size: of the
    images; None takes the network's own. left_out: ways that were not built, with the reasons.
    """

    def __init__(
        self,
        name: str,
        unet: UNet,
        batch: int,
        dtype: torch.dtype,
        *,
        with_baselines: bool = True,
        with_compiled: bool = True,
        size: tuple[int, int] | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self.name, self.unet, self.batch, self.dtype = name, unet, batch, dtype
        self.device, self._say = unet.device, say
        self.height, self.width = size or networks.image_size(unet)
        self.left_out: dict[str, str] = {}
        self._with_baselines, self._with_compiled = with_baselines, with_compiled
        self._built: list[_Built] = []
        generator = torch.Generator().manual_seed(0)
        shape = (batch, unet.config.in_channels, self.height, self.width)
        self._x = torch.randn(shape, generator=generator).to(self.device)
        self._t = torch.full((batch,), TIMESTEP, device=self.device)
        self._expected = self._exact()
        program = lower(unet, batch, self.height, self.width, dtype, norms_add=False)[0]
        self._flops = program.flops
        torch.compiler.reset()

    @torch.no_grad()
    def _exact(self) -> Tensor:
        """The first image's prediction by the plain network in float64."""
        exact = copy.deepcopy(self.unet).double()
        return exact(self._x[:1].double(), self._t[:1])

    def ways(self) -> list[Way]:
        """All ways that fit the device and the options, ours first."""
        graph = self.device.type == "cuda"
        dtype = self.dtype
        found = [Way("engine", self._engine, dtype)]
        if graph:
            found.append(Way("engine, CUDA graph", self._engine, dtype, graph=True))
        found.append(Way("accelerate", self._accelerated, dtype))
        if not self._with_baselines:
            return found
        baseline_dtype = dtype if graph else torch.float32

        def way(who: str, mode: str | None, layout: str, **flags: Any) -> Way:
            text = (
                f"{who}, {mode or 'eager'}, {layout}{', CUDA graph' if flags.get('graph') else ''}"
            )
            last = layout == "channels_last"
            return Way(
                text,
                lambda: self._baseline(who, baseline_dtype, mode, last),
                baseline_dtype,
                baseline=True,
                **flags,
            )

        found.append(way("UNet", None, "channels_last"))
        who, layout = "diffusers", "NCHW"
        try:
            _ = baselines.module(
                "diffusers"
            ).UNet2DModel  # imported now, not while memory is watched
        except baselines.MissingError as error:
            self.left_out["diffusers"] = f"{error}; ddpm_fast's plain UNet is compiled instead"
            who, layout = "UNet", "channels_last"
        else:
            found.append(way(who, None, layout))
        if graph:
            found.append(way(who, None, layout, graph=True))
        if self._with_compiled:
            found.append(way(who, "compile", "channels_last", graph=graph, compiled=True, wave=1))
        if self._with_compiled and graph:
            flags = {"graph": True, "compiled": True, "wave": 2}
            found.append(way(who, "max-autotune", "channels_last", **flags))
        return found

    def measure(
        self, roofline: RooflineLimits, rounds: int, limit: float, gpu: str
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows of everything that is built, once after each wave of building.

        peak_MB: on a GPU, what a way adds to the memory in use, its weights included, at the worst
        moment of a call. error: as in `kernels.measure`, of the first image. speedup: over the
        fastest peer. Nothing further is built after ``limit`` seconds. Raises what the engine
        raises; a peer that fails is left out.
        """
        begin = time.perf_counter()
        ways = self.ways()
        for wave in sorted({way.wave for way in ways}):
            before = len(self._built)
            for way in (way for way in ways if way.wave == wave):
                left = limit - (time.perf_counter() - begin)
                if way.baseline and left < _LEAST_LEFT_S:
                    self.left_out[way.name] = "no time left"
                    continue
                self._add(way)
            if len(self._built) > before:
                left = limit - (time.perf_counter() - begin)
                yield self._rows(roofline, rounds, max(left, _LEAST_LEFT_S), gpu)

    def _add(self, way: Way) -> None:
        self._say(f"building {way.name}")
        begin = time.perf_counter()
        memory = _Memory(self.device)
        try:
            with torch.no_grad():
                run, note = way.prepare()
                run()
                memory.restart()
                got = run()[:1].double()
                peak = memory.read()
                if way.graph:
                    run = graphed(run, self.device)
                    got = run()[:1].double()
        except Exception as error:
            if not way.baseline:
                raise
            self.left_out[way.name] = _first_line(error)
            return
        wrong = (got - self._expected).square().mean() / self._expected.square().mean()
        seconds = time.perf_counter() - begin
        self._built.append(_Built(way, run, seconds, peak, float(wrong.sqrt()), note))

    def _rows(
        self, roofline: RooflineLimits, rounds: int, limit: float, gpu: str
    ) -> list[dict[str, Any]]:
        self._say("timing")
        with torch.no_grad():
            cases = {built.way.name: built.run for built in self._built}
            times = interleaved(cases, self.device, rounds, limit=limit)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        best = min((median[b.way.name] for b in self._built if b.way.baseline), default=None)
        compiled = min((median[b.way.name] for b in self._built if b.way.compiled), default=None)
        verdict = counts(
            gpu, self.name, self.batch, self.dtype, None if compiled is None else compiled * 1e3
        )
        rows: list[dict[str, Any]] = []
        for built in self._built:
            name, way = built.way.name, built.way
            rate = self._flops / median[name]
            rows.append(
                {
                    "network": self.name,
                    "batch": self.batch,
                    "device": self.device.type,
                    "dtype": checks.dtype_name(way.dtype),
                    "case": name,
                    "role": "peer" if way.baseline else "ours",
                    "rounds": len(times[name]),
                    **{k: round(us, 2) for k, us in quantiles(times[name]).items()},
                    "speedup": "" if best is None else round(best / median[name], 3),
                    "TFLOP_per_s": round(rate / 1e12, 4),
                    "of_matmul": round(rate / roofline.matmul, 4),
                    "peak_MB": "" if built.peak is None else round(built.peak / 1e6, 1),
                    "error": f"{built.error:.2e}",
                    "build_s": round(built.seconds, 1),
                    "note": built.note,
                    "counts": verdict,
                    **roofline.columns,
                }
            )
        return rows

    def _engine(self) -> tuple[Run, str]:
        engine = UNetEngine(self.unet, self.batch, (self.height, self.width), self.dtype)
        x = self._images(self.dtype, last=True)
        return lambda: engine(x, self._t), f"{len(engine.plan().operations)} operations"

    def _accelerated(self) -> tuple[Run, str]:
        model = accelerate(self.unet, dtype=self.dtype)
        x = self._images(self.dtype, last=True)
        model(x, self._t)
        chosen = next(reversed(model.chosen.values()))
        return lambda: model(x, self._t), f"took {chosen.name}"

    def _baseline(
        self, name: str, dtype: torch.dtype, mode: str | None, last: bool
    ) -> tuple[Run, str]:
        """A peer's model; mode: one of `_MODES`, None for eager."""
        if name == "UNet":
            model: nn.Module = copy.deepcopy(self.unet).to(self.device, dtype)
        else:
            model = baselines.diffusers_unet(self.unet, self.device, dtype)
        if last:
            model.to(memory_format=torch.channels_last)
        x = self._images(dtype, last)
        call: Any = model
        if mode is not None:
            call = torch.compile(model, mode=_MODES[mode], dynamic=False)
        if name == "UNet":
            return lambda: call(x, self._t), ""
        return lambda: call(x, self._t, return_dict=False)[0], ""

    def _images(self, dtype: torch.dtype, last: bool) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return self._x.to(dtype, memory_format=layout)


class _Memory:
    """What torch's allocator has given on a GPU, beyond what it had when this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            gc.collect()
            self._before = torch.cuda.memory_allocated(device)

    def restart(self) -> None:
        """Forget the worst moment so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int | None:
        """Bytes at the worst moment; None on a CPU, where nobody counts them."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


def graphed(run: Run, device: torch.device) -> Run:
    """Replays of one graph; every call returns the same tensor."""
    run()  # whatever it builds or captures by itself, it does before this capture
    out: list[Tensor] = []

    def step() -> None:
        out[:] = [run()]

    graph = GraphedStep(step, lambda: None, device, unrolled=False)

    def replay() -> Tensor:
        graph()
        return out[0]

    return replay


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
