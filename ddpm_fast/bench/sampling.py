"""Whole jobs: a batch of images from noise to the end, ours and the peers', with as many steps."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast._accelerate import accelerate
from ddpm_fast.bench import baselines, networks
from ddpm_fast.bench.network import TIMESTEP, Run, Say, graphed
from ddpm_fast.bench.timing import interleaved, quantiles
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks


@dataclass(frozen=True)
class Job:
    """A whole job, and the forward pass of its network as the job runs it.

    forward: None where the loop's own cost is not asked for. images_differ: from diffusers'
    pipeline with the same generator, the largest value, of images in [0, 1]; None where it draws
    others.
    """

    run: Callable[[], object]
    forward: Run | None
    dtype: torch.dtype
    note: str = ""
    images_differ: float | None = None


Make = Callable[[], Job]


class SamplingBench:
    """Jobs of one network: ``batch`` images in ``steps`` ancestral steps each.

    dtype: of our networks and of diffusers' on a GPU; on a CPU diffusers' is float32. left_out:
    jobs that were not run, with the reasons. Raises ValueError for a batch or steps below 1.
    """

    def __init__(
        self,
        name: str,
        unet: UNet,
        batch: int,
        steps: int,
        dtype: torch.dtype,
        *,
        with_baselines: bool = True,
        size: tuple[int, int] | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self.name, self.unet, self.dtype = name, unet, dtype
        self.batch = checks.integer("batch", batch, 1, 1 << 20)
        self.steps = checks.integer("steps", steps, 1, 1000)
        self.device, self._say = unet.device, say
        self.left_out: dict[str, str] = {}
        self._with_baselines = with_baselines
        self._shape = (unet.config.in_channels, *(size or networks.image_size(unet)))
        self._table = StepTable.ddpm(NoiseSchedule.linear(), steps=steps)
        self._t = torch.full((batch,), TIMESTEP, device=self.device)

    def jobs(self) -> dict[str, Make]:
        """What makes each job, by name, ours first."""
        found: dict[str, Make] = {"Sampler, accelerate": self._accelerated}
        found["Sampler, UNet"] = self._plain
        if self._with_baselines:
            found["accelerate(DDPMPipeline)"] = self._fast_pipeline
            found["diffusers' DDPMPipeline"] = self._pipeline
            found["lucidrains' GaussianDiffusion"] = self._lucidrains
        return found

    def measure(self, rounds: int, limit: float) -> list[dict[str, Any]]:
        """One row for each job that runs.

        of_network: the job's time over that of as many forward passes, measured in the same rounds.
        No job is made after ``limit`` seconds.
        """
        begin = time.perf_counter()
        jobs: dict[str, Job] = {}
        cases: dict[str, Callable[[], object]] = {}
        with torch.no_grad():
            for name, make in self.jobs().items():
                if jobs and time.perf_counter() - begin > limit:
                    self.left_out[name] = "no time left"
                    continue
                self._say(f"preparing {name}")
                try:
                    job = make()
                except baselines.MissingError as error:
                    self.left_out[name] = str(error)
                    continue
                jobs[name] = job
                cases[name] = job.run
                if job.forward is not None:
                    cases[f"{name}: network"] = job.forward
            self._say("timing")
            left = max(1.0, limit - (time.perf_counter() - begin))
            times = interleaved(cases, self.device, rounds, limit=left)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        baseline = median.get("diffusers' DDPMPipeline")
        rows: list[dict[str, Any]] = []
        for name, job in jobs.items():
            network = median.get(f"{name}: network")
            of_network = median[name] / (self.steps * network) if network else None
            rows.append(
                {
                    "network": self.name,
                    "batch": self.batch,
                    "steps": self.steps,
                    "device": self.device.type,
                    "dtype": checks.dtype_name(job.dtype),
                    "case": name,
                    "role": "ours" if name.startswith(("Sampler", "accelerate")) else "peer",
                    "rounds": len(times[name]),
                    **{k: round(us, 1) for k, us in quantiles(times[name]).items()},
                    "ms_per_step": round(median[name] / self.steps * 1e3, 4),
                    "images_per_s": round(self.batch / median[name], 4),
                    "of_network": "" if of_network is None else round(of_network, 4),
                    "speedup": "" if baseline is None else round(baseline / median[name], 3),
                    "images_differ": ""
                    if job.images_differ is None
                    else f"{job.images_differ:.1e}",
                    "note": job.note,
                }
            )
        return rows

    def _sampler(self, model: Any, dtype: torch.dtype, note: str) -> Job:
        sampler = Sampler(
            model, self._table, self._shape, self.batch, device=self.device, dtype=dtype
        )
        x = torch.randn((self.batch, *self._shape), device=self.device).to(
            dtype, memory_format=torch.channels_last
        )
        forward = _network(lambda: model(x, self._t), self.device)
        return Job(lambda: sampler.sample(self.batch, progress=False), forward, dtype, note)

    def _accelerated(self) -> Job:
        model = accelerate(self.unet, dtype=self.dtype)
        job = self._sampler(model, self.dtype, "")
        job.run()
        chosen = next(reversed(model.chosen.values()))
        return Job(job.run, job.forward, job.dtype, f"took {chosen.name}")

    def _plain(self) -> Job:
        return self._sampler(copy.deepcopy(self.unet).to(self.dtype), self.dtype, "eager")

    @functools.cached_property
    def _diffusers_pipeline(self) -> Any:
        """diffusers' pipeline of the network. Raises MissingError."""
        dtype = self.dtype if self.device.type == "cuda" else torch.float32
        if self._shape[1:] != networks.image_size(self.unet):
            raise baselines.MissingError(
                "the pipeline draws images of the network's own size alone"
            )
        return baselines.diffusers_pipeline(self.unet, self.device, dtype)

    def _drawn(self, pipeline: Any, generator: torch.Generator | None = None) -> Any:
        """The images of a pipeline, float [N, H, W, C] in [0, 1]."""
        return pipeline(
            self.batch, generator, num_inference_steps=self.steps, output_type="np"
        ).images

    def _fast_pipeline(self) -> Job:
        pipeline = self._diffusers_pipeline
        fast = accelerate(pipeline)
        want, got = (
            self._drawn(p, torch.Generator(self.device).manual_seed(0)) for p in (pipeline, fast)
        )
        (chosen,) = fast.chosen.values()
        differ = float(abs(got.astype("float64") - want.astype("float64")).max())
        return Job(
            lambda: self._drawn(fast), None, pipeline.unet.dtype, f"took {chosen.name}", differ
        )

    def _pipeline(self) -> Job:
        pipeline = self._diffusers_pipeline
        dtype = pipeline.unet.dtype
        x = torch.randn((self.batch, *self._shape), device=self.device).to(dtype)

        def forward() -> Tensor:
            return pipeline.unet(x, self._t, return_dict=False)[0]

        return Job(lambda: self._drawn(pipeline), forward, dtype)

    def _lucidrains(self) -> Job:
        channels, height, width = self._shape
        if height != width:
            raise baselines.MissingError("it draws square images alone")
        diffusion = baselines.lucidrains(channels, height, self.steps, self.device)
        parameters = sum(p.numel() for p in diffusion.model.parameters())
        note = f"another network, {parameters / 1e6:.1f} M parameters"
        return Job(lambda: diffusion.sample(self.batch), None, torch.float32, note)


def _network(run: Run, device: torch.device) -> Run:
    """A forward pass as the sampler runs it: on a GPU the replay of a graph."""
    return graphed(run, device) if device.type == "cuda" else run
