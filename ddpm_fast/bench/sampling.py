"""Benchmark of whole sampling: a batch of images from noise, with the same number of steps."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from ddpm_fast._accelerate import accelerate
from ddpm_fast.bench import baselines, networks
from ddpm_fast.bench.cases import Benchmark, Case, Prepared, Run, graphed, timing_columns
from ddpm_fast.bench.timing import interleaved
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks

PIPELINE = "diffusers' DDPMPipeline"


class SamplingBench(Benchmark):
    """Ancestral sampling of one batch by this package and by the baselines.

    Args:
        *args: name, network, batch size and dtype of `Benchmark`.
        steps: steps of the chain, 1 to 1000.
        **options: options of `Benchmark`.

    Raises:
        ValueError: `steps` or the batch size is out of range.
    """

    def __init__(self, *args: Any, steps: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps = checks.integer("steps", steps, 1, 1000)
        self._shape = (self.unet.config.in_channels, *self.size)
        self._table = StepTable.ddpm(NoiseSchedule.linear(), steps=steps)

    def cases(self) -> list[Case]:
        """List the cases, this package's first."""
        found = [
            Case("Sampler, accelerate", self._accelerated, self.dtype),
            Case("Sampler, UNet", self._plain, self.dtype),
        ]
        if self._with_baselines:
            dtype, single = self.baseline_dtype, torch.float32
            found += [
                Case("accelerate(DDPMPipeline)", self._fast_pipeline, dtype),
                Case(PIPELINE, self._pipeline, dtype, baseline=True),
                Case("lucidrains' GaussianDiffusion", self._lucidrains, single, baseline=True),
            ]
        return found

    def measure(self, rounds: int, limit: float) -> Iterator[list[dict[str, Any]]]:
        """Measure all cases together.

        Args:
            rounds: measurements of each case.
            limit: seconds after which no further case is prepared; the first always is.

        Yields:
            The rows, once. `of_network` is the time of the job relative to that of as many forward
            passes, measured in the same rounds. `images_differ` is the largest difference of the
            images, in [0, 1], from diffusers' pipeline with the same generator. `speedup` is
            relative to diffusers' pipeline.
        """
        end = time.perf_counter() + limit
        built: list[tuple[Case, Prepared]] = []
        calls: dict[str, Run] = {}
        with torch.no_grad():
            for case in self.cases():
                late = bool(built) and time.perf_counter() > end
                if not (prepared := self.attempt(case, case.prepare, late)):
                    continue
                built.append((case, prepared))
                calls[case.name] = prepared.run
                if prepared.forward is not None:
                    calls[f"{case.name}: network"] = prepared.forward
            self._say("timing")
            left = max(1.0, end - time.perf_counter())
            times = interleaved(calls, self.device, rounds, limit=left)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        baseline = median.get(PIPELINE)
        rows: list[dict[str, Any]] = []
        for case, prepared in built:
            seconds, network = median[case.name], median.get(f"{case.name}: network")
            rows.append(
                {
                    **self.subject(case.dtype, steps=self.steps),
                    "case": case.name,
                    "role": case.role,
                    **timing_columns(times[case.name], 1),
                    "ms_per_step": round(seconds / self.steps * 1e3, 4),
                    "images_per_s": round(self.batch / seconds, 4),
                    "of_network": round(seconds / (self.steps * network), 4) if network else "",
                    "speedup": "" if baseline is None else round(baseline / seconds, 3),
                    "images_differ": prepared.columns.get("images_differ", ""),
                    "note": prepared.note,
                }
            )
        yield rows

    def _sampler(self, model: Any, note: str) -> Prepared:
        sampler = Sampler(
            model, self._table, self._shape, self.batch, device=self.device, dtype=self.dtype
        )
        x = torch.randn((self.batch, *self._shape), device=self.device)
        x = x.to(self.dtype, memory_format=torch.channels_last)

        def forward() -> Any:
            return model(x, self._t)

        # The sampler replays a CUDA graph of the forward pass on a GPU.
        network = graphed(forward, self.device) if self.on_gpu else forward
        return Prepared(lambda: sampler.sample(self.batch, progress=False), note, network)

    def _accelerated(self) -> Prepared:
        model = accelerate(self.unet, dtype=self.dtype)
        job = self._sampler(model, "")
        job.run()
        choice = next(reversed(model.chosen.values()))
        return Prepared(job.run, f"took {choice.name}", job.forward)

    def _plain(self) -> Prepared:
        return self._sampler(copy.deepcopy(self.unet).to(self.dtype), "eager")

    @functools.cached_property
    def _diffusers_pipeline(self) -> Any:
        if self.size != networks.image_size(self.unet):
            raise baselines.MissingError(
                "the pipeline draws images of the network's own size alone"
            )
        return baselines.diffusers_pipeline(self.unet, self.device, self.baseline_dtype)

    def _images(self, pipeline: Any, generator: torch.Generator | None = None) -> Any:
        """Sample by a pipeline: float [N, H, W, C] in [0, 1]."""
        return pipeline(
            self.batch, generator, num_inference_steps=self.steps, output_type="np"
        ).images

    def _fast_pipeline(self) -> Prepared:
        pipeline = self._diffusers_pipeline
        fast = accelerate(pipeline)
        want, got = (
            self._images(p, torch.Generator(self.device).manual_seed(0)) for p in (pipeline, fast)
        )
        (choice,) = fast.chosen.values()
        difference = float(abs(got.astype("float64") - want.astype("float64")).max())
        columns = {"images_differ": f"{difference:.1e}"}
        return Prepared(lambda: self._images(fast), f"took {choice.name}", columns=columns)

    def _pipeline(self) -> Prepared:
        pipeline = self._diffusers_pipeline
        x = torch.randn((self.batch, *self._shape), device=self.device).to(self.baseline_dtype)
        return Prepared(
            lambda: self._images(pipeline),
            forward=lambda: pipeline.unet(x, self._t, return_dict=False)[0],
        )

    def _lucidrains(self) -> Prepared:
        channels, height, width = self._shape
        if height != width:
            raise baselines.MissingError("it draws square images alone")
        diffusion = baselines.lucidrains(channels, height, self.steps, self.device)
        parameters = sum(p.numel() for p in diffusion.model.parameters())
        note = f"another network, {parameters / 1e6:.1f} M parameters"
        return Prepared(lambda: diffusion.sample(self.batch), note)
