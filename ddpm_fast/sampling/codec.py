"""Latent codes of images: encode, decode, interpolate, and image to image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.forward import q_sample_philox
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip
from ddpm_fast.ops.philox import STREAM_PARTNER, STREAM_X_T
from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.solvers.ddpm import SamplerVariance
from ddpm_fast.sampling.step_loop import Model
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import by_sample

Mode = Literal["latent-slerp", "latent-lerp", "stochastic"]
MODES = ("latent-slerp", "latent-lerp", "stochastic")


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate each sample on the sphere (Eq. 67, Song et al. 2020).

    (sin((1 - w) theta) a + sin(w theta) b) / sin theta, theta the angle between a and b as vectors;
    linear where they are parallel. Arithmetic is in float64.

    Args:
        a: Floating-point [N, ...], at weight 0.
        b: Of the shape and device of `a`, at weight 1.
        weight: A finite number.

    Returns:
        The interpolation, with the shape and dtype of `a`.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, or is not finite.
    """
    a = checks.batch("a", a)
    b = checks.like("b", b, "a", a, checks.FLOATS)
    weight = checks.real("weight", weight, -math.inf, math.inf, "()")
    flat_a, flat_b = by_sample(a.double()), by_sample(b.double())
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / lengths).clamp(-1, 1)
    angle = cosine.acos()
    parallel = (angle.sin() < 1e-7) | (lengths == 0)
    sine = torch.where(parallel, 1, angle.sin())
    a_coef = torch.where(parallel, 1 - weight, ((1 - weight) * angle).sin() / sine)
    b_coef = torch.where(parallel, weight, (weight * angle).sin() / sine)
    return (a_coef[:, None] * flat_a + b_coef[:, None] * flat_b).view(a.shape).to(a.dtype)


def image_to_image(
    sampler: Sampler,
    images: Tensor,
    schedule: NoiseSchedule,
    seed: int = 0,
    first_sample: int = 0,
    labels: Tensor | int | None = None,
    progress: bool = True,
) -> Tensor:
    """Noise images part of the way and denoise them (Meng et al. 2022).

    The images are noised to the first timestep of the sampler's table, which should be below T - 1:
    `start` of a solver, or listed timesteps. The more of the chain is run, the less of an image is
    kept. The noise is that of x_T in `Sampler.sample`: image k of a seed is the same in any batch.

    Args:
        sampler: The sampler.
        images: float32 or float64 [num, *sample_shape], in [-1, 1].
        schedule: Noise schedule of the table.
        seed: Seed in [0, 2^64).
        first_sample: Index of the first image.
        labels: As for `Sampler.sample`.
        progress: Show a progress bar.

    Returns:
        Images, as by `Sampler.sample`.

    Raises:
        TypeError: As `Sampler.sample` and `q_sample`.
        ValueError: As `Sampler.sample` and `q_sample`.
    """
    images = checks.batch("images", images, (torch.float32, torch.float64))
    table = sampler.table
    if table.start in ("random", "data"):
        raise ValueError(
            f"sampler's table must begin at a noise level; got one that begins at {table.start}"
        )
    images = images.to(sampler.device, sampler.state_dtype)
    t = int(table.timesteps[0])
    x_t, _ = q_sample_philox(images, t, schedule, seed, STREAM_X_T, first_sample)
    return sampler.sample(
        len(images), seed, first_sample, x_t * table.init_scale, progress, labels=labels
    )


class Codec:
    """Encode images as latent codes by the ODE of DDIM, and decode them.

    `encode` runs `StepTable.ddim_inverse`, `decode` runs `StepTable.ddim` with eta = 0 over the
    same timesteps; decode(encode(x)) is x up to the discretisation error.

    Args:
        model: As for `Sampler`.
        schedule: Noise schedule of T timesteps.
        sample_shape: As for `Sampler`.
        steps: Number of timesteps, at most the number below the timestep of a code. None: with
            listed timesteps.
        prediction: Kind of the model output.
        clip: As for `StepTable.ddim`. With a clip the encoding is lossy.
        spacing: As for `timesteps`. "linspace" and "trailing" reach exactly the timestep of a code;
            "leading" and "quad" end below it.
        variance: Variance of the ancestral chain of the interpolation mode "stochastic".
        guidance: Scale of classifier-free guidance in all chains (`StepTable.with_guidance`).
        **options: Options of `Sampler`, such as micro_batch, device, dtype, backend and null_label.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        sample_shape: Sequence[int],
        steps: int | None = 50,
        prediction: Prediction = "epsilon",
        clip: Clip = None,
        spacing: str | Sequence[int] = "linspace",
        variance: SamplerVariance = "posterior",
        guidance: float | None = None,
        **options: Any,
    ) -> None:
        self.schedule = schedule
        listed = checks.as_list(spacing)
        self.steps = None if isinstance(listed, list) else steps
        self._chain: dict[str, Any] = {"prediction": prediction, "clip": clip}
        self._spacing, self._variance, self._guidance = listed, variance, guidance
        table = self._table("decode", None)
        self._sampler = Sampler(model, table, sample_shape, pad=False, **options)

    def encode(
        self,
        images: Tensor,
        t: int | None = None,
        labels: Tensor | int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Encode images as latent codes.

        Args:
            images: float32 or float64 [N, *sample_shape], in [-1, 1].
            t: Timestep of the codes, 0-based. None: the highest of the chain, where codes of data
                that the model was trained for are close to N(0, I).
            labels: As for `Sampler.sample`.
            progress: Show a progress bar.

        Returns:
            Latent codes of the shape of `images`.

        Raises:
            TypeError: An argument has another type or dtype.
            ValueError: An argument has another shape, or is out of range.
        """
        return self._run("encode", images, t, labels, progress)

    def decode(
        self,
        latents: Tensor,
        t: int | None = None,
        labels: Tensor | int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Decode latent codes into images.

        Args:
            latents: float32 or float64 [N, *sample_shape].
            t: Timestep of the codes, as for `encode`.
            labels: As for `Sampler.sample`.
            progress: Show a progress bar.

        Returns:
            Images of the shape of `latents`.

        Raises:
            TypeError: An argument has another type or dtype.
            ValueError: An argument has another shape, or is out of range.
        """
        return self._run("decode", latents, t, labels, progress)

    def interpolate(
        self,
        x_a: Tensor,
        x_b: Tensor,
        weights: float | Sequence[float] | Tensor,
        mode: Mode = "latent-slerp",
        t: int | None = None,
        seed: int = 0,
        labels: Tensor | int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Interpolate between images.

        Args:
            x_a: Images at weight 0, float32 or float64 [N, *sample_shape], in [-1, 1].
            x_b: Images at weight 1, of the shape of `x_a`.
            weights: A finite number, or a sequence of them.
            mode: "latent-slerp": interpolate latent codes on the sphere (Song et al. 2020, D.5).
                "latent-lerp": linearly, which passes closer to 0 than latent codes do.
                "stochastic": noise both images to timestep t, interpolate linearly, and run the
                ancestral chain from there (Section 4.3, Ho et al. 2020); the noise of image k of a
                seed is the same for all weights.
            t: Timestep of the codes, 0-based. None: the highest of the chain; T // 2 for
                "stochastic".
            seed: Seed of the noise of "stochastic".
            labels: As for `Sampler.sample`, one for each pair.
            progress: Show a progress bar.

        Returns:
            Images [weights, N, *sample_shape].

        Raises:
            TypeError: An argument has another type or dtype.
            ValueError: An argument has another shape, or is out of range.
        """
        checks.choice("mode", mode, MODES)
        dtypes = (torch.float32, torch.float64)
        x_a = checks.batch("x_a", x_a, dtypes)
        x_b = checks.like("x_b", x_b, "x_a", x_a, dtypes)
        listed = checks.as_list(weights)
        chosen = [
            checks.real(f"weights[{i}]", w, -math.inf, math.inf, "()")
            for i, w in enumerate(listed if isinstance(listed, list) else [listed])
        ]
        if not chosen:
            raise ValueError("weights must be a number or a sequence of at least one; got none")
        if mode == "stochastic":
            return self._stochastic(x_a, x_b, chosen, t, seed, labels, progress)
        codes = self.encode(torch.cat([x_a, x_b]), t, _repeated(labels, 2), progress)
        a, b = codes.chunk(2) if len(codes) else (codes, codes)
        between: Any = slerp if mode == "latent-slerp" else torch.lerp
        mixed = torch.cat([between(a, b, w) for w in chosen])
        images = self.decode(mixed, t, _repeated(labels, len(chosen)), progress)
        return images.unflatten(0, (len(chosen), len(x_a)))

    def _stochastic(
        self,
        x_a: Tensor,
        x_b: Tensor,
        weights: list[float],
        t: int | None,
        seed: int,
        labels: Tensor | int | None,
        progress: bool,
    ) -> Tensor:
        t = self.schedule.T // 2 if t is None else checks.integer("t", t, 0, self.schedule.T)
        steps = t + 1 if self.steps is None else min(self.steps, t + 1)
        options: dict[str, Any] = {
            "variance": self._variance,
            "spacing": "trailing",
            "start": t + 1,
        }
        table = self._guided(StepTable.ddpm(self.schedule, steps, **options, **self._chain))
        sampler = self._sampler.with_table(table)

        def noised(x: Tensor, stream: int) -> Tensor:
            x = x.to(sampler.device, sampler.state_dtype)
            return q_sample_philox(x, t, self.schedule, seed, stream)[0]

        a, b = noised(x_a, STREAM_X_T), noised(x_b, STREAM_PARTNER)
        images = [
            sampler.sample(len(a), seed, 0, torch.lerp(a, b, w), progress, labels=labels)
            for w in weights
        ]
        return torch.stack(images)

    def _table(self, way: str, t: int | None) -> StepTable:
        T, steps, spacing = self.schedule.T, self.steps, self._spacing
        start = None if t is None else checks.integer("t", t, 0, T) + 1
        if start is not None and isinstance(spacing, list):
            spacing = [each for each in spacing if each < start]
            if t not in spacing:
                raise ValueError(f"t must be one of the listed timesteps of spacing; got {t}")
        elif start is not None and steps is not None:
            steps = min(steps, start)
            if steps == 1 and spacing == "linspace":
                spacing = "trailing"  # the single timestep is t, not 0
        make: Any = StepTable.ddim if way == "decode" else StepTable.ddim_inverse
        return self._guided(make(self.schedule, steps, spacing=spacing, start=start, **self._chain))

    def _guided(self, table: StepTable) -> StepTable:
        return table if self._guidance is None else table.with_guidance(self._guidance)

    def _run(
        self, way: str, x: Tensor, t: int | None, labels: Tensor | int | None, progress: bool
    ) -> Tensor:
        name = "images" if way == "encode" else "latents"
        x = checks.batch(name, x, (torch.float32, torch.float64))
        if tuple(x.shape[1:]) != self._sampler.sample_shape:
            raise ValueError(
                f"{name} must be [N, {', '.join(map(str, self._sampler.sample_shape))}];"
                f" got {checks.shape_text(x)}"
            )
        sampler = self._sampler.with_table(self._table(way, t))
        return sampler.sample(len(x), x_T=x, progress=progress, labels=labels)


def _repeated(labels: Tensor | int | None, times: int) -> Tensor | int | None:
    """Return the labels of `times` copies of a batch, one after another."""
    if not isinstance(labels, Tensor):
        return labels
    return labels.repeat(times, *[1] * (labels.ndim - 1))
