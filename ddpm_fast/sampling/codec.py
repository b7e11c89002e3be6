"""Images in and out of a model's latent space: encode, decode, interpolate, image to image."""

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

Mode = Literal["latent-slerp", "latent-lerp", "stochastic"]
MODES = ("latent-slerp", "latent-lerp", "stochastic")


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each sample, [N, ...] (Eq. 67, Song et al. 2020).

    (sin((1 - w) theta) a + sin(w theta) b) / sin theta, theta the angle between a and b as vectors;
    linear where they are parallel. Arithmetic is in float64; returns the dtype of a.

    Raises TypeError or ValueError naming the argument.
    """
    a = checks.batch("a", a)
    b = checks.like("b", b, "a", a, checks.FLOATS)
    weight = checks.real("weight", weight, -math.inf, math.inf, "()")
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / lengths).clamp(-1, 1)
    angle = cosine.acos()
    parallel = (angle.sin() < 1e-7) | (lengths == 0)
    sine = torch.where(parallel, 1, angle.sin())
    of_a = torch.where(parallel, 1 - weight, ((1 - weight) * angle).sin() / sine)
    of_b = torch.where(parallel, weight, (weight * angle).sin() / sine)
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).view(a.shape).to(a.dtype)


def image_to_image(
    sampler: Sampler,
    images: Tensor,
    schedule: NoiseSchedule,
    seed: int = 0,
    first_sample: int = 0,
    labels: Tensor | int | None = None,
    progress: bool = True,
) -> Tensor:
    """New images near given ones: noise them part of the way and come back (Meng et al. 2022).

    The images are noised to the first timestep of the sampler's table, which should begin below the
    top: ``start=`` of every solver, or a list of timesteps. The more of the chain is run, the less
    of an image is kept. images: float32 [num, *sample_shape], in [-1, 1]; schedule: the table's.
    The noise of x_t is that of x_T in `Sampler.sample`, so that image k of a seed is the same in
    any batch. Returns float32 like images. Raises as `Sampler.sample` and `q_sample`.
    """
    images = checks.batch("images", images, (torch.float32, torch.float64))
    table = sampler.table
    if table.start in ("random", "data"):
        raise ValueError(f"sampler's table must begin at a noise level; it begins at {table.start}")
    images = images.to(sampler.device, sampler.state_dtype)
    t = int(table.timesteps[0])
    x_t, _ = q_sample_philox(images, t, schedule, seed, STREAM_X_T, first_sample)
    return sampler.sample(
        len(images), seed, first_sample, x_t * table.init_scale, progress, labels=labels
    )


class Codec:
    """A model's latent codes: images to noise by the ODE of DDIM, and back.

    Encoding runs ``StepTable.ddim_inverse``, decoding ``StepTable.ddim`` with eta = 0 over the same
    timesteps, so that decode(encode(x)) is x up to the error of the steps.

    model, sample_shape, and options (micro_batch, device, dtype, backend, null_label, ...): as
    `Sampler` takes them; only the wanted samples are run (pad is False). schedule, steps,
    prediction, clip, spacing: as `StepTable.ddim` takes them (steps: None for listed timesteps; at
    most as many as there are timesteps below a code's); "linspace" and "trailing" reach exactly the
    timestep of a code, "leading" and "quad" end below it. A clip, off unless given, makes encoding
    lossy. variance: of the ancestral chain that the mode "stochastic" of interpolate ends with.
    guidance: the scale of classifier-free guidance in every chain (`StepTable.with_guidance`).

    Raises TypeError or ValueError naming the argument.
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
        """The latent codes of images [N, *sample_shape] in [-1, 1]: float32 of that shape.

        t: the timestep of the codes, 0-based; None: the top of the chain, where codes of data that
        the model knows look like N(0, I).
        """
        return self._run("encode", images, t, labels, progress)

    def decode(
        self,
        latents: Tensor,
        t: int | None = None,
        labels: Tensor | int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The images of latent codes [N, *sample_shape], float32; t as for encode."""
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
        """Images between x_a (weight 0) and x_b (weight 1): float32 [weights, N, *sample_shape].

        x_a, x_b: [N, *sample_shape] in [-1, 1]. weights: finite numbers. mode:
        "latent-slerp": encode both, interpolate on the sphere, decode (Song et al. 2020, D.5);
        "latent-lerp": the same along a line, which passes closer to 0 than codes lie;
        "stochastic": noise both to timestep t, interpolate along a line, and run the ancestral
        chain from there (Section 4.3, Ho et al. 2020). The noise of image k of a seed is the same
        for every weight.
        t: 0-based timestep; None: the top of the chain, for "stochastic" half of it.

        Raises TypeError or ValueError naming the argument.
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
            spacing = [kept for kept in spacing if kept < start]
            if t not in spacing:
                raise ValueError(f"t must be one of the listed timesteps of spacing; got {t}")
        elif start is not None and steps is not None:
            steps = min(steps, start)
            if steps == 1 and spacing == "linspace":
                spacing = "trailing"  # a single one is t, not 0
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
    """Labels of a batch for several copies of it, one after the other."""
    if not isinstance(labels, Tensor):
        return labels
    return labels.repeat(times, *[1] * (labels.ndim - 1))
