"""Terms of the variational bound, from the output of a model at a timestep."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion.gaussian import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_log_density,
)
from ddpm_fast.diffusion.parameterization import Prediction, x0_coefficients
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.variance import (
    LEARNED,
    VARIANCES,
    FirstLogVariance,
    Variance,
    chosen_log_variance,
    log_variances,
)
from ddpm_fast.utils import checks

Decoder = Literal["discretised", "gaussian"]
DECODERS = ("discretised", "gaussian")


class BoundRow(NamedTuple):
    """Coefficients of the term of one timestep: 0-d, or one for each sample, [N, 1, ...].

    Attributes:
        x_coef: Factor of x_t in x_0 = x_coef x_t + out_coef out.
        out_coef: Factor of the model output in x_0.
        low: Lowest log-variance of p(x_{t-1} | x_t).
        high: Highest log-variance of p(x_{t-1} | x_t).
        x0_coef: Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0).
        log_q: Log-variance of q(x_{t-1} | x_t, x_0).
    """

    x_coef: Tensor
    out_coef: Tensor
    low: Tensor
    high: Tensor
    x0_coef: Tensor
    log_q: Tensor

    def x0(self, x_t: Tensor, out: Tensor) -> Tensor:
        """Return the x_0 of a prediction."""
        return self.x_coef * x_t + self.out_coef * out

    def divergence(self, x0: Tensor, pred_x0: Tensor, log_p: Tensor) -> Tensor:
        """Return L_{t-1} = D_KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), elementwise, in nats.

        Args:
            x0: Data [N, ...].
            pred_x0: Predicted x_0, of the shape of `x0`.
            log_p: Log-variance of p.
        """
        # The terms of x_t in the means are equal; without them no digits cancel.
        return gaussian_kl(self.x0_coef * x0, self.log_q, self.x0_coef * pred_x0, log_p)


class BoundTerms:
    """Terms of the bound for a schedule, a prediction, a variance and a decoder.

    Differentiable. The tables are computed on the device, without synchronisation.

    Args:
        schedule: Noise schedule of T timesteps.
        prediction: Kind of the model output.
        variance: Variance of p(x_{t-1} | x_t), as for `model_variance`.
        decoder: Kind of L_0, "discretised" or "gaussian".
        log_variance: As for `model_variance`.
        device: Device of the tables.
        dtype: Dtype of the tables.

    Raises:
        ValueError: A name is unknown, or as `log_variances` and `x0_coefficients`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        variance: Variance,
        decoder: Decoder,
        log_variance: FirstLogVariance,
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
        """Return the coefficients of a timestep."""
        return BoundRow(*self._rows[t].unbind())

    def rows(self, t: Tensor, ndim: int) -> BoundRow:
        """Return the coefficients of each sample, [N, 1, ...] with `ndim` dimensions.

        Args:
            t: Timesteps in [0, T), int64 [N].
            ndim: Number of dimensions of the data.
        """
        chosen = self._rows.index_select(0, t)
        return BoundRow(*(column.view(-1, *[1] * (ndim - 1)) for column in chosen.unbind(1)))

    def log_variance(self, row: BoundRow, learned_output: Tensor | None) -> Tensor:
        """Return the log-variance of p(x_{t-1} | x_t).

        Args:
            row: Coefficients.
            learned_output: Second half of the model's channels; None for the fixed variances.
        """
        return chosen_log_variance(self._variance, row.low, row.high, learned_output)

    def decode(self, x0: Tensor, pred_x0: Tensor, log_p: Tensor) -> Tensor:
        """Return L_0 = -log p(x_0 | x_1), elementwise, in nats.

        Args:
            x0: Data [N, ...].
            pred_x0: Predicted x_0, of the shape of `x0`.
            log_p: Log-variance of p.
        """
        if self._decoder == "discretised":
            return -discretised_gaussian_log_likelihood(x0, pred_x0, log_p)
        return -gaussian_log_density(x0, pred_x0, log_p)
