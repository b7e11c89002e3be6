"""One micro-batch of a reverse chain: static buffers, and the step that advances them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_output import model_tensor, split_learned_variance
from ddpm_fast.ops import Backend
from ddpm_fast.ops.philox import STREAM_STEPS, STREAM_X_T, philox_rng
from ddpm_fast.ops.row import RowFlag
from ddpm_fast.sampling.reverse_step import thresholds
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks, in_place

Model = Callable[..., Any]


class StepLoop:
    """The state of ``batch`` samples and one step of their chains.

    Every tensor is allocated here and keeps its address, so that a step can be captured in a CUDA
    graph: the state x [batch, ...] and what a multistep solver keeps beside it, the network's input
    (x itself where the dtypes agree), labels, the row of each sample in ``step``, and the noise,
    either a buffer that the caller fills or made in the kernel from ``rng``. Under guidance the
    input holds the batch twice, and so does each call of the network: with its labels, then with
    the null label. A step allocates nothing that outlives it and does not wait for the GPU.

    labels: those of a batch, for their shape, dtype and device; None for a model without.
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
        makes_noise: bool,
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
        self.noise = torch.zeros_like(self.x) if noisy and not makes_noise else None
        self._rng = philox_rng(0, device=device) if noisy and makes_noise else None
        self._labels = (
            labels.new_zeros(times * batch, *labels.shape[1:]) if labels is not None else None
        )

    @staticmethod
    def kind(table: StepTable) -> Hashable:
        """What a loop is made for: tables of one kind may be loaded into it one after another."""
        rows = table.steps, int(table.flags), table.uses_noise, table.start == "random"
        return *rows, table.threshold, table.init_scale != 1

    def load(self, table: StepTable) -> None:
        """Go by another table of the same kind from here on."""
        if table is not self._table:
            for mine, given in zip((self._rows, self._timesteps), self._tables(table), strict=True):
                mine.copy_(given, non_blocking=True)
            self._table = table

    def _tables(self, table: StepTable) -> tuple[Tensor, Tensor]:
        """The rows of a table, and the timestep of every value of the step counter."""
        rows, timesteps = table.to(self.x.device, self.x.dtype)
        # A chain of random length that has ended goes on counting beside longer ones.
        rest = timesteps[-1:].expand(table.steps if table.start == "random" else 0)
        return rows, torch.cat([timesteps, rest])

    def start(self, seed: int, first_sample: int, start_rows: Tensor | None) -> None:
        """Begin the chains of samples first_sample .. with x_T from Philox.

        start_rows: int64 [batch], each sample's first row; None: row 0.
        """
        device = self.x.device
        self._run.philox_normal_(self.x, philox_rng(seed, STREAM_X_T, first_sample, device))
        if self._table.init_scale != 1:
            self.x.mul_(self._table.init_scale)
        if self._rng is not None:
            self._rng.copy_(philox_rng(seed, STREAM_STEPS, first_sample), non_blocking=True)
        for kept in self._memory:
            if kept is not None:
                kept.zero_()  # a coefficient of 0 meets finite numbers in the first rows
        self.rewind()
        if start_rows is not None:
            self.step_index.copy_(start_rows)
        self.refresh_input()

    def label(self, labels: Tensor, null: Tensor | None) -> None:
        """The labels of the batch [batch, ...], and under guidance the null label."""
        if self._labels is not None:
            self._labels[: len(labels)].copy_(labels)
            if null is not None:
                self._labels[len(labels) :].copy_(null)

    def rewind(self) -> None:
        """Back to row 0 in every sample."""
        self.step_index.zero_()

    def refresh_input(self) -> None:
        """Bring the network's input up to date after x was written from outside."""
        if self._target is not None:
            scale = self._table.init_scale
            self._target.copy_(self.x if scale == 1 else self.x / scale)
        self._repeat_input()

    def _repeat_input(self) -> None:
        batch = len(self.x)
        if len(self._input) > batch:
            self._input[batch:].copy_(self._input[:batch])

    def step(self) -> None:
        """One step: the network, the fused update, the counter."""
        t = self._timesteps.index_select(0, self.step_index)
        if len(self._input) > len(self.x):
            t = t.repeat(2)
        arguments = () if self._labels is None else (self._labels,)
        out, v, out2 = self._outputs(self._model(self._input, t, *arguments))
        how, s = self._table.threshold, None
        if how is not None:
            s = thresholds(how, self.x, out, out2, self._rows, self.step_index)
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
        """So many steps, one after the other."""
        for _ in range(steps):
            self.step()

    def _outputs(self, out: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The prediction, the learned v and the unconditional prediction of a call, checked."""
        out = model_tensor(out)
        if out.device != self.x.device:
            raise ValueError(
                f"model must return a tensor on {self.x.device}, the device of its input;"
                f" it returned one on {out.device}"
            )
        accepted = checks.FLOATS[:3] if self.x.dtype == torch.float32 else checks.FLOATS[3:]
        if out.dtype not in accepted:
            raise TypeError(
                f"model must return {' or '.join(map(checks.dtype_name, accepted))} for a"
                f" {checks.dtype_name(self.x.dtype)} state; it returned"
                f" {checks.dtype_name(out.dtype)}"
            )
        batch = len(self.x)
        both, v = split_learned_variance(
            "the model's output", out, self.x, self._table.learned, len(self._input)
        )
        out2 = None if len(both) == batch else self._apart(both[batch:])
        return self._apart(both[:batch]), None if v is None else self._apart(v[:batch]), out2

    def _apart(self, out: Tensor) -> Tensor:
        return in_place.without_overlap(out, self.x, self._target)
