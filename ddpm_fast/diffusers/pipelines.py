"""Drop-in replacements for DDPMPipeline and DDIMPipeline of diffusers, run by a `Sampler`."""

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

from ddpm_fast.diffusers.compatibility import check_components, unwrap
from ddpm_fast.diffusers.scheduler_base import check_steps
from ddpm_fast.diffusers.scheduler_options import (
    Compat,
    base_class,
    check_compat,
    get_compat,
    get_options,
    warn_of_ignored_prediction,
)
from ddpm_fast.diffusers.step_tables import step_table
from ddpm_fast.engine import AcceleratedUNet, Tuner
from ddpm_fast.engine.choice import Choice
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
    """Settings of an accelerated pipeline; see `ddpm_fast.accelerate`."""

    dtype: torch.dtype | None = None
    compat: Compat | None = None
    noise: Noise = "generator"
    micro_batch: int | None = None
    tuner: Tuner | None = None
    check_weights: bool = True


class _Accelerated:
    """Base class of the pipelines: an accelerated network, and sampling of a batch."""

    unet: Any
    scheduler: Any
    settings = Settings()
    _compiled: _CompiledPipeline | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which builds its own engines and buffers."""
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    @property
    def chosen(self) -> dict[tuple[int, ...], Choice]:
        """Choices of `AcceleratedUNet` for each shape [N, C, H, W] so far."""
        return self._current().model.chosen

    def report(self) -> str:
        """Return a text with the choice for each shape so far, and the measured times."""
        return self._current().model.report()

    def refresh(self) -> None:
        """Build the engines again at the next call, as `AcceleratedUNet.refresh`."""
        self._current().model.refresh()

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """Make a pipeline of the parts of another, as DiffusionPipeline.from_pipe.

        Args:
            pipeline: A pipeline; the settings of an accelerated one are copied.
            **options: Options of DiffusionPipeline.from_pipe.
        """
        pipe = super().from_pipe(pipeline, **options)  # type: ignore[misc]
        pipe.settings = getattr(pipeline, "settings", cls.settings)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save as the pipeline of diffusers that this one replaces.

        Args:
            save_directory: The folder.
            **options: Options of DiffusionPipeline.save_pretrained.
        """
        _as_diffusers(self).save_pretrained(save_directory, **options)

    def _images(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        **step_options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images by the chain of the scheduler, and convert them to the output type."""
        batch = checks.integer("batch_size", batch_size, 1, 1 << 31)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(map(str, OUTPUT_TYPES))};"
                f" got {output_type!r}"
            )
        check_components(self.unet, self.scheduler, self._compat)
        check_steps("num_inference_steps", num_inference_steps, self.scheduler)
        compiled = self._current()
        noise, seed = self._noise(generator, batch, compiled.model.device)
        self.scheduler.set_timesteps(num_inference_steps)
        table = step_table(self.scheduler, self._compat, **step_options)
        sampler = compiled.sampler(table, self.settings.micro_batch or batch)
        total = table.steps * -(-batch // sampler.micro_batch)
        progress_bar = cast(Any, self).progress_bar(total=total)
        with progress_bar as bar, no_autocast(compiled.model.device):
            x = sampler.with_noise(noise).sample(batch, seed=seed, progress=bar)
        if isinstance(noise, GeneratorNoise) and not table.uses_noise:
            self._advance_generator(noise, table, x, **step_options)
        images: Any = (x / 2 + 0.5).clamp_(0, 1).to(compiled.dtype).contiguous()
        if output_type != "pt":
            images = images.float() if images.dtype == torch.bfloat16 else images
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = cast(Any, self).numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _advance_generator(
        self, noise: GeneratorNoise, table: StepTable, x: Tensor, eta: float = 0.0, **_: Any
    ) -> None:
        """Draw unused noise: diffusers also draws noise that is multiplied by 0."""
        kind = base_class(self.scheduler)
        for t in table.timesteps.tolist():
            if (kind is DDPMScheduler and t > 0) or eta > 0 or self._sde:
                noise.draw(x, slice(None), noise.step_dtype)

    @property
    def _sde(self) -> bool:
        return get_options(self.scheduler).get("algorithm_type") == "sde-dpmsolver++"

    @property
    def _compat(self) -> Compat:
        """Option compat of the settings, else of the scheduler."""
        return self.settings.compat or get_compat(self.scheduler)

    def _noise(
        self, generator: Any, batch: int, device: torch.device
    ) -> tuple[Literal["philox"] | GeneratorNoise, int]:
        """Return the source of noise of a call, and the seed if the kernel generates it."""
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
                    "generator must be a single one with noise='philox', where an image depends on"
                    " seed and index only; got a list"
                )
            source = torch.device("cpu") if generator is None else generator.device
            seed = torch.randint(1 << 62, (), generator=generator, device=source)
            return "philox", int(seed)
        if generator is None:
            generator = _global_generator(device)
        dtype = unwrap(self.unet).dtype
        noise = GeneratorNoise(generator, dtype, torch.float32 if self._sde else dtype)
        for one in generator if isinstance(generator, list | tuple) else [generator]:
            if one.device.type not in ("cpu", device.type):
                raise ValueError(f"generator must be on the CPU or {device}; got {one.device}")
        return noise, 0

    def _current(self) -> _CompiledPipeline:
        """Return the accelerated network, rebuilt if network, device or dtype have changed."""
        unet = unwrap(self.unet)
        steps = self.scheduler.config.num_train_timesteps
        compiled = self._compiled
        source = unet, unet.device, unet.dtype, steps
        if compiled is None or compiled.source != source:
            model = AcceleratedUNet(
                unet,
                dtype=self.settings.dtype or unet.dtype,
                num_timesteps=steps,
                tuner=self.settings.tuner,
                check_weights=self.settings.check_weights,
            )
            compiled = self._compiled = _CompiledPipeline(source, model)
        return compiled


class _CompiledPipeline:
    """An accelerated network, and the sampler of the last micro-batch size."""

    def __init__(self, source: tuple[Any, ...], model: AcceleratedUNet) -> None:
        self.source, self.model, self.dtype = source, model, source[2]
        self._sampler: Sampler | None = None

    def sampler(self, table: StepTable, micro_batch: int) -> Sampler:
        """Return a sampler for a step table and a micro-batch size."""
        sampler = self._sampler
        if sampler is None or sampler.micro_batch != micro_batch:
            shape = cast(tuple[int, int, int], self.model.config.sample_shape)
            sampler = self._sampler = Sampler(self.model, table, shape, micro_batch)
        return sampler.with_table(table)


class FastDDPMPipeline(_Accelerated, DDPMPipeline):
    """DDPMPipeline of diffusers on the engine and the fused step, made by `accelerate`."""

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
        """Sample images, with the noise of DDPMPipeline in the same order.

        Autocast has no effect: the network computes in the dtype passed to `accelerate`.

        Args:
            batch_size: Number of images.
            generator: A generator, or a list of one for each image. None: torch's global
                generator. With noise="philox" one draw gives the seed.
            num_inference_steps: Number of steps.
            output_type: "pil", "np" or "numpy" (float arrays [N, H, W, C]), or "pt" (tensors
                [N, C, H, W] in the dtype of the network). Values are in [0, 1].
            return_dict: Return an ImagePipelineOutput instead of a tuple.

        Returns:
            The images.

        Raises:
            TypeError: An argument is of another type, or a part of the pipeline not supported.
            ValueError: An argument is out of range, or an option not supported.
        """
        return self._images(batch_size, generator, num_inference_steps, output_type, return_dict)


class FastDDIMPipeline(_Accelerated, DDIMPipeline):
    """DDIMPipeline of diffusers on the engine and the fused step, made by `accelerate`."""

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        # DDIMPipeline.__init__ would convert the scheduler.
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
        """Sample images, with the noise of DDIMPipeline in the same order.

        Args:
            batch_size: As for `FastDDPMPipeline`.
            generator: As for `FastDDPMPipeline`.
            eta: Factor of the noise, at least 0; above 1 if the variance of each step allows it.
            num_inference_steps: Number of steps.
            use_clipped_model_output: Compute epsilon from the clipped x0.
            output_type: As for `FastDDPMPipeline`.
            return_dict: As for `FastDDPMPipeline`.

        Returns:
            The images.

        Raises:
            TypeError: As `FastDDPMPipeline`, or the scheduler is no DDIMScheduler.
            ValueError: As `FastDDPMPipeline`.
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
    """Return a pipeline of a network and a scheduler; raise as `ddpm_fast.accelerate`."""
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
    check_weights: bool = True,
) -> FastDDPMPipeline | FastDDIMPipeline:
    """Return an accelerated pipeline of the same parts; see `ddpm_fast.accelerate`."""
    kind = type(pipe)
    cls: Any = kind if kind in _PLAIN else _FAST.get(kind)
    if cls is None:
        raise TypeError(
            "target must be a DDPMPipeline, a DDIMPipeline or a network; got"
            f" {kind.__name__}, whose loop is not known. Replace its scheduler by"
            " ddpm_fast.diffusers.FastDDPMScheduler or FastDDIMScheduler"
        )
    if noise not in ("generator", "philox"):
        raise ValueError(f"noise must be one of generator, philox; got {noise!r}")
    if micro_batch is not None:
        checks.integer("micro_batch", micro_batch, 1, 1 << 31)
        if noise != "philox":
            raise ValueError(
                "micro_batch must be None with noise='generator', which is drawn for the whole"
                f" batch; got {micro_batch}"
            )
    if compat is not None:
        check_compat(compat)
    if tuner is not None:
        checks.instance("tuner", tuner, Tuner)
    settings = Settings(dtype, compat, noise, micro_batch, tuner, check_weights)
    fast = cls(unet=pipe.unet, scheduler=pipe.scheduler)
    for name, value in pipe.__dict__.items():
        if name != "_compiled" and name not in fast.__dict__:
            setattr(fast, name, value)
    fast.settings = settings
    check_components(fast.unet, fast.scheduler, fast._compat)
    warn_of_ignored_prediction(fast.scheduler)
    fast._current()
    return fast


def _as_diffusers(pipe: Any) -> Any:
    """Return the pipeline of diffusers with the same parts and a scheduler of diffusers."""
    scheduler = pipe.scheduler
    base = getattr(type(scheduler), "replaces", None)
    if base is not None:
        scheduler = base.from_config(get_options(scheduler))
    return _PLAIN[type(pipe)](unet=unwrap(pipe.unet), scheduler=scheduler)


def _global_generator(device: torch.device) -> torch.Generator:
    """Return torch's global generator of a device."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
