"""The terms of the variational bound, from what a model returned at a timestep."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion.gaussian import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_log_density,
)
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.variance import (
    LEARNED,
    VARIANCES,
    First,
    Variance,
    chosen_log_variance,
    log_variances,
    x0_coefficients,
)
from ddpm_fast.utils import checks

Decoder = Literal["discretised", "gaussian"]
DECODERS = ("discretised", "gaussian")


class BoundRow(NamedTuple):
    """What a timestep's term takes: numbers, or one for each sample, [N, 1, ...]."""

    x_coef: Tensor  # x_0 = x_coef x_t + out_coef out
    out_coef: Tensor
    low: Tensor  # the log-variances of p lie between
    high: Tensor
    x0_coef: Tensor  # factor of x_0 in the mean of q(x_{t-1} | x_t, x_0)
    log_q: Tensor  # its log-variance

    def x0(self, x_t: Tensor, out: Tensor) -> Tensor:
        """The x_0 that the model's prediction stands for."""
        return self.x_coef * x_t + self.out_coef * out

    def divergence(self, x0: Tensor, pred_x0: Tensor, log_p: Tensor) -> Tensor:
        """L_{t-1}: D_KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each element, in nats."""
        # The means' shares of x_t are equal, and left out so that their digits are not lost.
        return gaussian_kl(self.x0_coef * x0, self.log_q, self.x0_coef * pred_x0, log_p)


class BoundTerms:
    """The rows of a schedule, a prediction, a variance of p and a decoder. Differentiable.

    Made on a device from what the schedule keeps there: nothing waits for a GPU.
    Raises ValueError for an unknown name, and what `log_variances` and `x0_coefficients` raise.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        variance: Variance,
        decoder: Decoder,
        log_variance: First,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        checks.choice("variance", variance, VARIANCES)
        checks.choice("decoder", decoder, DECODERS)
        self._variance, self._decoder = variance, decoder
        ends = log_variances(schedule, variance, log_variance, device)
        if decoder == "gaussian" and variance not in LEARNED:
            first = schedule.levels(device, torch.float64)[:1, :1].log().expand(1, 2)
            ends = torch.cat([first, ends[1:]])
        posterior = schedule.q_posterior_coefs(device, torch.float64)
        columns = [x0_coefficients(schedule, prediction, device), ends, posterior[:, ::3]]
        self._rows = torch.cat(columns, 1).to(dtype)

    def row(self, t: int) -> BoundRow:
        """The row of a timestep."""
        return BoundRow(*self._rows[t].unbind())

    def rows(self, t: Tensor, ndim: int) -> BoundRow:
        """The row of each sample, for tensors of ndim dimensions; t: int64 [N], in [0, T)."""
        chosen = self._rows.index_select(0, t)
        return BoundRow(*(column.view(-1, *[1] * (ndim - 1)) for column in chosen.unbind(1)))

    def log_variance(self, row: BoundRow, learned_output: Tensor | None) -> Tensor:
        """Log-variance of p(x_{t-1} | x_t); learned_output is None for the fixed variances."""
        return chosen_log_variance(self._variance, row.low, row.high, learned_output)

    def decode(self, x0: Tensor, pred_x0: Tensor, log_p: Tensor) -> Tensor:
        """L_0: -log p(x_0 | x_1) of each element, in nats."""
        if self._decoder == "discretised":
            return -discretised_gaussian_log_likelihood(x0, pred_x0, log_p)
        return -gaussian_log_density(x0, pred_x0, log_p)
