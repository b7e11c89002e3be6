"""diffusers' DDPMScheduler and DDIMScheduler with a fused `step`."""

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

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "SchedulerMixin"]  # what diffusers looks for


class FastDDPMScheduler(FusedScheduler, DDPMScheduler, replaces=DDPMScheduler):
    """diffusers' DDPMScheduler whose `step` is one fused kernel and waits for nothing.

    Options, attributes and methods are the library's; a configuration of either loads into the
    other. compat: "diffusers" (the default) computes the library's coefficients in float32, slips
    included; "corrected" those of the papers in float64 (docs/diffusers.md lists what differs).
    Sampling, training and saving go as with the library's own class.

    Raises ValueError for an option that is not supported, named, also at set_timesteps and step.
    """

    custom_timesteps: bool
    variance_type: str

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As DDPMScheduler.set_timesteps.

        Raises TypeError, ValueError naming the argument, with everything left as it was.
        """
        if num_inference_steps is not None or timesteps is None:
            check_steps("num_inference_steps", num_inference_steps, self)
        if timesteps is not None:
            timesteps = [checks.integer("timesteps", t, 0, 1 << 31) for t in timesteps]
            if not timesteps:
                raise ValueError("timesteps must be one or more; got none")
        self._set(
            lambda: DDPMScheduler.set_timesteps(self, num_inference_steps, None, timesteps), device
        )

    def previous_timestep(self, timestep: Any) -> Any:
        """The timestep that a step leads to, -1 after the last; a tensor in a chain that is set.

        An int or an integer tensor, on a GPU without waiting for it; -1 also for a timestep there
        that is not of the chain. Raises ValueError for one on the host.
        """
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        following = torch.cat([self.timesteps[1:], self.timesteps.new_full((1,), -1)])
        known = self._host_value(timestep) if isinstance(timestep, Tensor) else int(timestep)
        if known is not None:
            chain = self._cached().chain
            if known not in chain:
                raise ValueError(f"timestep must be one of scheduler.timesteps; got {known}")
            return following[chain.index(known)]
        found = self.timesteps == timestep
        # Indexed by a number on the device, which would be looked at, it would wait.
        at = following.index_select(0, found.to(torch.int64).argmax()[None])[0]
        return torch.where(found.any(), at, -1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the chain (Algorithm 2, Ho et al. 2020), as DDPMScheduler.step.

        model_output: the shape of sample, with twice its channels for a learned variance. timestep:
        an int, or an integer tensor of one element or one for each sample; a timestep of a tensor
        that did not come out of ``self.timesteps`` is not looked at on a GPU, so that noise is
        drawn at t = 0 too, and a value that is not of the chain gives NaN; so in a compiled caller,
        which should hand over tensors. sample: [N, ...],
        float32, float16, bfloat16 or float64. generator: one, or a list of one for each sample.

        Returns prev_sample and pred_original_sample, new tensors like sample, of the dtype that it
        and model_output promote to. Where a gradient is wanted it is recorded, by the reference
        backend. Raises TypeError, ValueError naming the argument.
        """
        rows = self._table("rows")
        x, out, v = step_tensors(sample, model_output, self._cached().learned)
        where = self._position(timestep, rows, x)
        noise = None
        if where.known is None or where.known > 0:
            noise = self._noise(out, generator)
            if self.variance_type == "learned" and not self._corrected:
                noise = cast(Tensor, v) ** 0.5 * noise
        prev, x0 = fused_step(rows, x, out, v if rows.learned else None, where, noise)
        if not return_dict:
            return prev, x0
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self) -> TimestepRows:
        of_chain = self.custom_timesteps or self.num_inference_steps
        timesteps = (
            chain_timesteps(self, self._corrected)
            if of_chain
            else [*range(len(self.alphas_cumprod))]
        )
        rows = ddpm_scheduler_rows(self, timesteps, self._corrected)
        return self._by_timestep(rows, timesteps)


class FastDDIMScheduler(FusedScheduler, DDIMScheduler, replaces=DDIMScheduler):
    """diffusers' DDIMScheduler whose `step` is one fused kernel and waits for nothing.

    As `FastDDPMScheduler`.
    """

    _default_how = (0.0, False)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """As DDIMScheduler.set_timesteps.

        Raises TypeError, ValueError naming the argument, with everything left as it was.
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
        """One step of the chain (Eq. 12, Song et al. 2020), as DDIMScheduler.step.

        eta: 0 is deterministic, 1 has the variance of the posterior. use_clipped_model_output: the
        direction is that of the clipped x0. variance_noise: the noise, in place of a generator's.
        The other arguments, what comes back and the errors are those of `FastDDPMScheduler.step`;
        with compat="diffusers" a step may begin at any timestep of the schedule.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        rows = self._table("rows", float(eta), bool(use_clipped_model_output))
        x, out, _ = step_tensors(sample, model_output, False)
        where = self._position(timestep, rows, x)
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator and variance_noise: give one of them; got both")
            if variance_noise is None:
                variance_noise = self._noise(out, generator)
            noise = checks.like("variance_noise", variance_noise, "sample", x, checks.FLOATS)
        prev, x0 = fused_step(rows, x, out, None, where, noise)
        if not return_dict:
            return prev, x0
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self, eta: float, use_clipped_model_output: bool) -> TimestepRows:
        timesteps = [*range(len(self.alphas_cumprod))]
        if self._corrected:
            timesteps = chain_timesteps(self, True)
        rows = ddim_scheduler_rows(self, timesteps, eta, use_clipped_model_output, self._corrected)
        return self._by_timestep(rows, timesteps)
