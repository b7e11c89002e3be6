"""One micro-batch of a reverse chain: static buffers, and the step that advances them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_call import call_model
from ddpm_fast.diffusion.model_output import model_tensor, split_learned_variance
from ddpm_fast.ops import Backend
from ddpm_fast.ops.philox import STREAM_STEPS, STREAM_X_T, philox_rng
from ddpm_fast.ops.row import RowFlag
from ddpm_fast.sampling.reverse_step import thresholds
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks, in_place

Model = Callable[..., Any]


class StepLoop:
    """Buffers of a micro-batch and one step of its chains.

    All tensors are allocated in the constructor and keep their addresses, so that a step can be
    captured in a CUDA graph. A step allocates nothing that outlives it and does not synchronise
    with the GPU. Under guidance the model input holds the batch twice, and each call of the model
    evaluates both: with the labels, then with the null label.

    Args:
        model: The model.
        table: The step table.
        run: Backend of the fused step.
        batch: Number of samples.
        sample_shape: Shape of one sample.
        device: Device of the buffers.
        dtype: Dtype of the model input.
        generates_noise: The kernel generates the noise; otherwise the caller fills `noise`.
        labels: Labels of a batch, for their shape, dtype and device; None for an unconditional
            model.

    Attributes:
        x: State [batch, ...]; the same memory as the model input if their dtypes agree.
        step_index: Next row of each sample, int64 [batch].
        noise: Noise of the next step, filled by the caller; None if the kernel generates it.
    """

    def __init__(
        self,
        model: Model,
        table: StepTable,
        run: Backend,
        batch: int,
        sample_shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        generates_noise: bool,
        labels: Tensor | None = None,
    ) -> None:
        self._model, self._run, self._flags = model, run, int(table.flags)
        state_dtype = checks.compute_dtype(dtype)
        times = 2 if table.guided else 1
        self._input = checks.empty_samples(times * batch, sample_shape, dtype, device).zero_()
        scaled = table.flags & RowFlag.SCALE_IN or table.init_scale != 1
        shared = dtype == state_dtype and not scaled
        if shared:
            self.x = self._input[:batch]
        else:
            self.x = checks.empty_samples(batch, sample_shape, state_dtype, device).zero_()
        self._target = None if shared else self._input[:batch]
        self._memory = table.memory(self.x)
        self.step_index = torch.zeros(batch, dtype=torch.int64, device=device)
        self._table = table
        rows, timesteps = self._tables(table)
        self._rows, self._timesteps = rows.clone(), timesteps.clone()
        noisy = table.uses_noise
        self.noise = torch.zeros_like(self.x) if noisy and not generates_noise else None
        self._rng = philox_rng(0, device=device) if noisy and generates_noise else None
        self._labels = (
            labels.new_zeros(times * batch, *labels.shape[1:]) if labels is not None else None
        )

    @staticmethod
    def kind(table: StepTable) -> Hashable:
        """Return a key; tables with the same key can be loaded into one loop."""
        rows = table.steps, int(table.flags), table.uses_noise, table.start == "random"
        return *rows, table.threshold, table.init_scale != 1

    def load(self, table: StepTable) -> None:
        """Replace the table by another one of the same kind."""
        if table is not self._table:
            buffers = self._rows, self._timesteps
            for buffer, values in zip(buffers, self._tables(table), strict=True):
                buffer.copy_(values, non_blocking=True)
            self._table = table

    def _tables(self, table: StepTable) -> tuple[Tensor, Tensor]:
        """Return the rows of a table, and the timestep of every value of the step counter."""
        rows, timesteps = table.to(self.x.device, self.x.dtype)
        # The counter of a chain that has ended still advances, beside longer ones.
        ended = timesteps[-1:].expand(table.steps if table.start == "random" else 0)
        return rows, torch.cat([timesteps, ended])

    def start(self, seed: int, first_sample: int, start_rows: Tensor | None) -> None:
        """Begin the chains with x_T from Philox.

        Args:
            seed: Seed of the noise.
            first_sample: Index of the sample in slot 0.
            start_rows: First row of each sample, int64 [batch]. None: row 0.
        """
        device = self.x.device
        self._run.philox_normal_(self.x, philox_rng(seed, STREAM_X_T, first_sample, device))
        if self._table.init_scale != 1:
            self.x.mul_(self._table.init_scale)
        if self._rng is not None:
            self._rng.copy_(philox_rng(seed, STREAM_STEPS, first_sample), non_blocking=True)
        for buffer in self._memory:
            if buffer is not None:
                buffer.zero_()  # the first rows multiply it by 0, so it must be finite
        self.rewind()
        if start_rows is not None:
            self.step_index.copy_(start_rows)
        self.refresh_input()

    def label(self, labels: Tensor, null: Tensor | None) -> None:
        """Set the labels.

        Args:
            labels: Labels of the batch [batch, ...].
            null: Null label, under guidance; else None.
        """
        if self._labels is not None:
            self._labels[: len(labels)].copy_(labels)
            if null is not None:
                self._labels[len(labels) :].copy_(null)

    def rewind(self) -> None:
        """Reset the step counter to row 0."""
        self.step_index.zero_()

    def refresh_input(self) -> None:
        """Recompute the model input after the caller changed x."""
        if self._target is not None:
            scale = self._table.init_scale
            self._target.copy_(self.x if scale == 1 else self.x / scale)
        self._repeat_input()

    def _repeat_input(self) -> None:
        batch = len(self.x)
        if len(self._input) > batch:
            self._input[batch:].copy_(self._input[:batch])

    def step(self) -> None:
        """Run one step: the model, the fused update, the counter."""
        t = self._timesteps.index_select(0, self.step_index)
        if len(self._input) > len(self.x):
            t = t.repeat(2)
        arguments = () if self._labels is None else (self._labels,)
        out, v, out2 = self._outputs(call_model(self._model, self._input, t, *arguments))
        threshold, s = self._table.threshold, None
        if threshold is not None:
            s = thresholds(threshold, self.x, out, out2, self._rows, self.step_index)
        self._run.reverse_step_(
            self.x,
            out,
            self._rows,
            self.step_index,
            self.noise,
            self._rng,
            self._target,
            None,
            self._flags,
            out2,
            v,
            s,
            *self._memory,
        )
        self._repeat_input()
        self.step_index.add_(1)

    def advance(self, steps: int) -> None:
        """Run several steps eagerly."""
        for _ in range(steps):
            self.step()

    def _outputs(self, out: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the prediction, the learned v and the unconditional prediction, checked."""
        out = model_tensor(out)
        if out.device != self.x.device:
            raise ValueError(
                f"model must return a tensor on {self.x.device}, the device of its input;"
                f" got one on {out.device}"
            )
        accepted = checks.FLOATS[:3] if self.x.dtype == torch.float32 else checks.FLOATS[3:]
        if out.dtype not in accepted:
            raise TypeError(
                f"model must return {' or '.join(map(checks.dtype_name, accepted))} for a"
                f" {checks.dtype_name(self.x.dtype)} state; got {checks.dtype_name(out.dtype)}"
            )
        batch = len(self.x)
        both, v = split_learned_variance(
            "the model's output", out, self.x, self._table.learned, len(self._input)
        )
        out2 = None if len(both) == batch else self._apart(both[batch:])
        return self._apart(both[:batch]), None if v is None else self._apart(v[:batch]), out2

    def _apart(self, out: Tensor) -> Tensor:
        return in_place.without_overlap(out, self.x, self._target)
