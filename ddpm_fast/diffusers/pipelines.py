"""diffusers' pipelines for unconditional images, run by the `Sampler` and the engine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ddpm_fast.diffusers.compatibility import check_components, fingerprint, unwrap
from ddpm_fast.diffusers.scheduler_base import check_steps
from ddpm_fast.diffusers.scheduler_options import (
    Compat,
    base_class,
    check_compat,
    get_compat,
    get_options,
)
from ddpm_fast.diffusers.step_tables import step_table
from ddpm_fast.engine import AcceleratedUNet, Tuner
from ddpm_fast.engine.accelerated_unet import Choice
from ddpm_fast.ops.aten import no_autocast
from ddpm_fast.sampling.noise_source import GeneratorNoise
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks

Generators = torch.Generator | list[torch.Generator] | None
Noise = Literal["generator", "philox"]
OUTPUT_TYPES = ("pil", "np", "numpy", "pt", None)


@dataclass(frozen=True)
class Settings:
    """How an accelerated pipeline runs; see `accelerate_pipeline`."""

    dtype: torch.dtype | None = None
    compat: Compat | None = None
    noise: Noise = "generator"
    micro_batch: int | None = None
    tuner: Tuner | None = None


class _Accelerated:
    """What the pipelines share: a network made fast, and its chain run for a batch."""

    unet: Any
    scheduler: Any
    settings = Settings()
    _compiled: _CompiledPipeline | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: engines and buffers are made anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    @property
    def chosen(self) -> dict[tuple[int, ...], Choice]:
        """What runs the network for each shape [N, C, H, W] that was seen (`AcceleratedUNet`)."""
        return self._current().model.chosen

    def report(self) -> str:
        """What runs the network for each shape that was seen, with the times that were measured."""
        return self._current().model.report()

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """As DiffusionPipeline.from_pipe, with what the pipeline was accelerated by."""
        made = super().from_pipe(pipeline, **options)  # type: ignore[misc]
        made.settings = getattr(pipeline, "settings", cls.settings)
        return made

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """As the pipeline of diffusers that this one stands in for, which loads without us."""
        plain = _plain(self)
        plain.save_pretrained(save_directory, **options)

    def _images(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        **of_step: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """The chain of the scheduler, and the images as they are asked for."""
        batch = checks.integer("batch_size", batch_size, 1, 1 << 31)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(map(str, OUTPUT_TYPES))};"
                f" got {output_type!r}"
            )
        check_components(self.unet, self.scheduler, self._compat)
        check_steps("num_inference_steps", num_inference_steps, self.scheduler)
        made = self._current()
        noise, seed = self._noise(generator, batch, made.model.device)
        self.scheduler.set_timesteps(num_inference_steps)
        table = step_table(self.scheduler, self._compat, **of_step)
        sampler = made.sampler(table, self.settings.micro_batch or batch)
        total = table.steps * -(-batch // sampler.micro_batch)
        bar_of_pipe = cast(Any, self).progress_bar(total=total)
        with bar_of_pipe as bar, no_autocast(made.model.device):
            x = sampler.with_noise(noise).sample(batch, seed=seed, progress=bar)
        if isinstance(noise, GeneratorNoise) and not table.uses_noise:
            self._advance_generator(noise, table, x, **of_step)
        images: Any = (x / 2 + 0.5).clamp_(0, 1).to(made.dtype).contiguous()
        if output_type != "pt":
            wide = images.float() if images.dtype == torch.bfloat16 else images
            images = wide.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = cast(Any, self).numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _advance_generator(
        self, noise: GeneratorNoise, table: StepTable, x: Tensor, eta: float = 0.0, **_: Any
    ) -> None:
        """Leave the generator where the library does, which draws what a factor of 0 meets too."""
        kind = base_class(self.scheduler)
        for t in table.timesteps.tolist():
            if (kind is DDPMScheduler and t > 0) or eta > 0 or self._sde:
                noise.draw(x, slice(None), noise.step_dtype)

    @property
    def _sde(self) -> bool:
        return get_options(self.scheduler).get("algorithm_type") == "sde-dpmsolver++"

    @property
    def _compat(self) -> Compat:
        """That of the settings, else of the scheduler, if it has one."""
        return self.settings.compat or get_compat(self.scheduler)

    def _noise(
        self, generator: Any, batch: int, device: torch.device
    ) -> tuple[Literal["philox"] | GeneratorNoise, int]:
        """The source of noise of a call, and the seed where the kernel makes it."""
        for one in generator if isinstance(generator, list | tuple) else [generator]:
            if one is not None:
                checks.instance("generator", one, torch.Generator)
        if isinstance(generator, list | tuple) and len(generator) != batch:
            raise ValueError(
                f"generator must be one, or a list of batch_size = {batch}; got {len(generator)}"
            )
        if self.settings.noise == "philox":
            if isinstance(generator, list | tuple):
                raise ValueError(
                    "generator must be one with noise='philox', where an image is its seed's and"
                    " its place's alone; got a list"
                )
            return "philox", int(
                torch.randint(1 << 62, (), generator=generator, device=_of(generator))
            )
        if generator is None:
            generator = _global_generator(device)
        dtype = unwrap(self.unet).dtype
        found = GeneratorNoise(generator, dtype, torch.float32 if self._sde else dtype)
        for one in generator if isinstance(generator, list | tuple) else [generator]:
            if one.device.type not in ("cpu", device.type):
                raise ValueError(f"generator must be on the CPU or {device}; got {one.device}")
        return found, 0

    def _current(self) -> _CompiledPipeline:
        """What was made for the network as it is: where it is, in its dtype."""
        unet = unwrap(self.unet)
        steps = self.scheduler.config.num_train_timesteps
        made, weights = self._compiled, fingerprint(unet)
        if made is not None and made.weights != weights:
            made.model.refresh()
            made.weights = weights
        if made is None or made.of != (unet, unet.device, unet.dtype, steps):
            model = AcceleratedUNet(
                unet,
                dtype=self.settings.dtype or unet.dtype,
                num_timesteps=steps,
                tuner=self.settings.tuner,
            )
            made = self._compiled = _CompiledPipeline(
                (unet, unet.device, unet.dtype, steps), model, weights
            )
        return made


class _CompiledPipeline:
    """A network made fast, and the sampler of the batch that was drawn last."""

    def __init__(self, of: tuple[Any, ...], model: AcceleratedUNet, weights: Any) -> None:
        self.of, self.model, self.dtype, self.weights = of, model, of[2], weights
        self._sampler: Sampler | None = None

    def sampler(self, table: StepTable, micro_batch: int) -> Sampler:
        """A sampler of micro-batches of that size for a table."""
        kept = self._sampler
        if kept is None or kept.micro_batch != micro_batch:
            shape = cast(tuple[int, int, int], self.model.config.sample_shape)
            kept = self._sampler = Sampler(self.model, table, shape, micro_batch)
        return kept.with_table(table)


class FastDDPMPipeline(_Accelerated, DDPMPipeline):
    """diffusers' DDPMPipeline on the engine and the fused step; `accelerate` makes it."""

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__(unet, scheduler)

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As DDPMPipeline.__call__: images in [0, 1], drawn in the library's order.

        generator: None draws from torch's own; one, or a list of one for each image. With the noise
        "philox" it only gives the seed, by one draw. output_type: "pil", "np" (float [N, H, W, C])
        or "pt" ([N, C, H, W] in the network's dtype). Autocast around the call changes nothing: the
        network computes in the dtype that `accelerate` was given. Raises TypeError, ValueError
        naming the argument or the option.
        """
        return self._images(batch_size, generator, num_inference_steps, output_type, return_dict)


class FastDDIMPipeline(_Accelerated, DDIMPipeline):
    """diffusers' DDIMPipeline on the engine and the fused step; `accelerate` makes it."""

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        # Not DDIMPipeline's, which puts another scheduler in the place of the one it is given.
        DiffusionPipeline.__init__(cast(Any, self))
        cast(Any, self).register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As DDIMPipeline.__call__, with `FastDDPMPipeline`'s arguments.

        eta: at least 0; above 1 as long as the variance of a step allows it.
        """
        eta = checks.real("eta", eta, 0, math.inf, "[)")
        if base_class(self.scheduler) is not DDIMScheduler:
            raise TypeError(
                f"scheduler must be a DDIMScheduler; got {type(self.scheduler).__name__}"
            )
        return self._images(
            batch_size,
            generator,
            num_inference_steps,
            output_type,
            return_dict,
            eta=eta,
            use_clipped_model_output=bool(use_clipped_model_output),
        )


_PLAIN: dict[type, Any] = {FastDDPMPipeline: DDPMPipeline, FastDDIMPipeline: DDIMPipeline}
_FAST: dict[type, Any] = {DDPMPipeline: FastDDPMPipeline, DDIMPipeline: FastDDIMPipeline}


def pipeline_of(unet: Any, scheduler: Any) -> FastDDPMPipeline | FastDDIMPipeline:
    """A pipeline of a network and a scheduler. Raises TypeError, ValueError as `accelerate`."""
    cls = FastDDIMPipeline if base_class(scheduler) is DDIMScheduler else FastDDPMPipeline
    return cls(unet=unet, scheduler=scheduler)


def accelerate_pipeline(
    pipe: Any,
    *,
    dtype: torch.dtype | None = None,
    compat: Compat | None = None,
    noise: Noise = "generator",
    micro_batch: int | None = None,
    tuner: Tuner | None = None,
) -> FastDDPMPipeline | FastDDIMPipeline:
    """A pipeline to be called in the place of ``pipe``; see `ddpm_fast.accelerate`."""
    kind = type(pipe)
    cls: Any = kind if kind in _PLAIN else _FAST.get(kind)
    if cls is None:
        raise TypeError(
            "target must be a DDPMPipeline, a DDIMPipeline or a network; got"
            f" {kind.__name__}, whose own loop is not known. Give its scheduler's place to"
            " ddpm_fast.diffusers.FastDDPMScheduler or FastDDIMScheduler"
        )
    if noise not in ("generator", "philox"):
        raise ValueError(f"noise must be 'generator' or 'philox'; got {noise!r}")
    if micro_batch is not None:
        checks.integer("micro_batch", micro_batch, 1, 1 << 31)
        if noise != "philox":
            raise ValueError(
                "micro_batch is for noise='philox': a generator draws for the whole batch at once"
            )
    if compat is not None:
        check_compat(compat)
    if tuner is not None:
        checks.instance("tuner", tuner, Tuner)
    settings = Settings(dtype, compat, noise, micro_batch, tuner)
    fast = cls(unet=pipe.unet, scheduler=pipe.scheduler)
    for name, value in pipe.__dict__.items():
        if name != "_compiled" and name not in fast.__dict__:
            setattr(fast, name, value)
    fast.settings = settings
    check_components(fast.unet, fast.scheduler, fast._compat)
    fast._current()
    return fast


def _plain(pipe: Any) -> Any:
    """The pipeline of diffusers with the same parts, a scheduler of ours as the library's."""
    scheduler = pipe.scheduler
    own = getattr(type(scheduler), "replaces", None)
    if own is not None:
        scheduler = own.from_config(get_options(scheduler))
    return _PLAIN[type(pipe)](unet=pipe.unet, scheduler=scheduler)


def _of(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _global_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a device when it is given none."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
