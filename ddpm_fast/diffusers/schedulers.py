"""Drop-in replacements for DDPMScheduler and DDIMScheduler of diffusers with a fused `step`.

diffusers writes the name of this module and of its classes into model_index.json.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ddpm_fast.diffusers.fused_step import TimestepRows, fused_step, step_tensors
from ddpm_fast.diffusers.scheduler_base import FusedScheduler, Generators, check_steps
from ddpm_fast.diffusers.step_tables import (
    chain_timesteps,
    ddim_scheduler_rows,
    ddpm_scheduler_rows,
)
from ddpm_fast.utils import checks

# diffusers loads schedulers of a module that has its SchedulerMixin.
__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "SchedulerMixin"]


class FastDDPMScheduler(FusedScheduler, DDPMScheduler, replaces=DDPMScheduler):
    """DDPMScheduler of diffusers with a `step` that is one fused kernel and does not synchronise.

    Options, attributes and methods are those of diffusers, and each class loads the configurations
    of the other. Sampling, training and saving work as with the class of diffusers.

    Args:
        compat: Keyword. "diffusers" (default): coefficients as diffusers computes them in float32,
            including its known bugs. "corrected": those of the papers, in float64
            (docs/diffusers.md lists the differences).

    Raises:
        ValueError: An option is not supported. Also raised by set_timesteps and step, if the
            configuration was changed.
    """

    custom_timesteps: bool
    variance_type: str

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps of the chain, as DDPMScheduler.set_timesteps.

        After an error the scheduler is unchanged.

        Args:
            num_inference_steps: Number of steps, in [1, num_train_timesteps].
            device: Device of `timesteps`. None: the CPU.
            timesteps: Timesteps, descending, instead of a number of steps.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument is out of range, or timesteps are outside of the schedule.
        """
        if num_inference_steps is not None or timesteps is None:
            check_steps("num_inference_steps", num_inference_steps, self)
        if timesteps is not None:
            timesteps = [checks.integer("timesteps", t, 0, 1 << 31) for t in timesteps]
            if not timesteps:
                raise ValueError("timesteps must have at least one element; got none")
        self._set(
            lambda: DDPMScheduler.set_timesteps(self, num_inference_steps, None, timesteps), device
        )

    def previous_timestep(self, timestep: Any) -> Any:
        """Return the timestep after a step, -1 after the last.

        It does not synchronise. A timestep on a GPU that is not in the chain also gives -1.

        Args:
            timestep: An int or an integer tensor.

        Returns:
            A tensor if timesteps are set, else `timestep` - 1.

        Raises:
            ValueError: A timestep on the host is not in the chain.
        """
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        following = torch.cat([self.timesteps[1:], self.timesteps.new_full((1,), -1)])
        value = self._host_value(timestep) if isinstance(timestep, Tensor) else int(timestep)
        if value is not None:
            chain = self._cached().chain
            if value not in chain:
                raise ValueError(f"timestep must be one of scheduler.timesteps; got {value}")
            return following[chain.index(value)]
        matches = self.timesteps == timestep
        # Indexing by a number on the device would synchronise.
        at = following.index_select(0, matches.to(torch.int64).argmax()[None])[0]
        return torch.where(matches.any(), at, -1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Compute one step of the chain (Algorithm 2, Ho et al. 2020), as DDPMScheduler.step.

        A timestep in a tensor that is not an element of `self.timesteps` is not read from a GPU:
        noise is then also drawn at t = 0, and a timestep outside of the chain gives NaN. The same
        holds in compiled code, which should pass tensors. If a gradient is required, the reference
        backend computes the step.

        Args:
            model_output: Model output like `sample`, with twice its channels for a learned
                variance.
            timestep: An int, or an integer tensor of one element or one for each sample.
            sample: State [N, ...], float32, float16, bfloat16 or float64.
            generator: Source of the noise: one, or a list of one for each sample. None: torch's
                global generator.
            return_dict: Return a DDPMSchedulerOutput instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, new tensors like `sample`, of the dtype to which
            `sample` and `model_output` promote.

        Raises:
            TypeError: An argument is of another type or dtype.
            ValueError: An argument has another shape or device, or a timestep on the host is not
                in the chain.
        """
        rows = self._table("rows")
        x, out, v = step_tensors(sample, model_output, self._cached().learned)
        position = self._position(timestep, rows, x)
        noise = None
        if position.timestep is None or position.timestep > 0:
            noise = self._noise(out, generator)
            if self.variance_type == "learned" and not self._corrected:
                noise = cast(Tensor, v) ** 0.5 * noise
        prev, x0 = fused_step(rows, x, out, v if rows.learned else None, position, noise)
        if not return_dict:
            return prev, x0
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self) -> TimestepRows:
        is_set = self.custom_timesteps or self.num_inference_steps
        timesteps = (
            chain_timesteps(self, self._corrected) if is_set else [*range(len(self.alphas_cumprod))]
        )
        rows = ddpm_scheduler_rows(self, timesteps, self._corrected)
        return self._by_timestep(rows, timesteps)


class FastDDIMScheduler(FusedScheduler, DDIMScheduler, replaces=DDIMScheduler):
    """DDIMScheduler of diffusers with a `step` that is one fused kernel and does not synchronise.

    Options, arguments and errors are as those of `FastDDPMScheduler`.
    """

    _default_options = (0.0, False)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Set the timesteps of the chain, as DDIMScheduler.set_timesteps.

        After an error the scheduler is unchanged.

        Args:
            num_inference_steps: Number of steps, in [1, num_train_timesteps].
            device: Device of `timesteps`. None: the CPU.

        Raises:
            TypeError: `num_inference_steps` is not an integer.
            ValueError: It is out of range, or timesteps are outside of the schedule.
        """
        check_steps("num_inference_steps", num_inference_steps, self)
        self._set(lambda: DDIMScheduler.set_timesteps(self, num_inference_steps, None), device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Compute one step of the chain (Eq. 12, Song et al. 2020), as DDIMScheduler.step.

        With compat="diffusers" a step may begin at any timestep of the schedule. Otherwise the
        notes of `FastDDPMScheduler.step` apply.

        Args:
            model_output: Model output like `sample`.
            timestep: An int, or an integer tensor of one element or one for each sample.
            sample: State [N, ...], float32, float16, bfloat16 or float64.
            eta: Factor of the noise: 0 is deterministic, 1 has the variance of the posterior.
            use_clipped_model_output: Compute epsilon from the clipped x0.
            generator: Source of the noise: one, or a list of one for each sample. None: torch's
                global generator.
            variance_noise: The noise, instead of a generator.
            return_dict: Return a DDIMSchedulerOutput instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, as `FastDDPMScheduler.step`.

        Raises:
            TypeError: An argument is of another type or dtype.
            ValueError: set_timesteps was not called, both `generator` and `variance_noise` are
                set, or as `FastDDPMScheduler.step`.
        """
        if self.num_inference_steps is None:
            raise ValueError(
                "num_inference_steps must be set by set_timesteps before step; got None"
            )
        rows = self._table("rows", float(eta), bool(use_clipped_model_output))
        x, out, _ = step_tensors(sample, model_output, False)
        position = self._position(timestep, rows, x)
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator must be None with variance_noise; got both")
            if variance_noise is None:
                variance_noise = self._noise(out, generator)
            noise = checks.like("variance_noise", variance_noise, "sample", x, checks.FLOATS)
        prev, x0 = fused_step(rows, x, out, None, position, noise)
        if not return_dict:
            return prev, x0
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self, eta: float, use_clipped_model_output: bool) -> TimestepRows:
        timesteps = [*range(len(self.alphas_cumprod))]
        if self._corrected:
            timesteps = chain_timesteps(self, True)
        rows = ddim_scheduler_rows(self, timesteps, eta, use_clipped_model_output, self._corrected)
        return self._by_timestep(rows, timesteps)
