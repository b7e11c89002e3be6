"""Gaussians: their divergence, their density, and the decoder that puts one into 256 bins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.utils import checks

BIN = 2 / 255  # width of a bin: 256 values evenly spaced over [-1, 1]

Value = Tensor | float


def gaussian_kl(mean1: Value, log_variance1: Value, mean2: Value, log_variance2: Value) -> Tensor:
    """D_KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats.

    Half of log variance2 - log variance1 + variance1 / variance2 - 1 + (mean1 - mean2)^2 /
    variance2, which summed over d elements is Corollary 9 of Khungurn 2022 (printed without the +
    before its logarithms). Arguments are floating-point tensors of shapes that broadcast, or
    numbers. Returns their common shape, device and dtype, float32 for half precision (float64
    where all are numbers). Differentiable.

    Raises TypeError for an argument that is neither.
    """
    m1, log1, m2, log2 = _values(
        mean1=mean1, log_variance1=log_variance1, mean2=mean2, log_variance2=log_variance2
    )
    ratio = log1 - log2
    apart = (m1 - m2) * torch.exp(-log2 / 2)
    return (torch.expm1(ratio) - ratio + apart.square()) / 2


def gaussian_kl_full(
    mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor
) -> Tensor:
    """D_KL(N(mean1, covariance1) || N(mean2, covariance2)) in nats (Prop. 8, Khungurn 2022).

    mean1, mean2: [..., d]; covariance1, covariance2: [..., d, d], positive definite, of which the
    lower triangles are read. All float32 or all float64, on one device; leading sizes broadcast.
    Returns [...]. Differentiable. Waits for a GPU, to check what it was given.

    Raises TypeError for other dtypes; ValueError for other shapes and for a covariance that is not
    positive definite.
    """
    means, covariances = (mean1, mean2), (covariance1, covariance2)
    factors = []
    for i, (mean, covariance) in enumerate(zip(means, covariances, strict=True), 1):
        accepted = (torch.float32, torch.float64) if i == 1 else (mean1.dtype,)
        checks.batch(f"mean{i}", mean, accepted)
        checks.batch(f"covariance{i}", covariance, (mean1.dtype,))
        if covariance.shape[-2:] != (mean1.shape[-1],) * 2 or mean.shape[-1] != mean1.shape[-1]:
            raise ValueError(
                f"mean{i} and covariance{i} must be [..., d] and [..., d, d] with d ="
                f" {mean1.shape[-1]}; got {checks.shape_text(mean)} and"
                f" {checks.shape_text(covariance)}"
            )
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed.any() or not factor.isfinite().all():
            raise ValueError(f"covariance{i} must be positive definite; one is not")
        factors.append(factor)
    first, second = factors
    log_dets = [2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) for factor in factors]
    trace = torch.linalg.solve_triangular(second, first, upper=False).square().sum((-2, -1))
    apart = torch.linalg.solve_triangular(second, (mean2 - mean1)[..., None], upper=False)
    distance = apart.square().sum((-2, -1))
    return (log_dets[1] - log_dets[0] + trace + distance - mean1.shape[-1]) / 2


def gaussian_log_density(x: Value, mean: Value, log_variance: Value) -> Tensor:
    """log N(x; mean, variance) of each element, in nats: a density, which may exceed 0.

    Arguments, result and errors are those of gaussian_kl.
    """
    x, mean, log_variance = _values(x=x, mean=mean, log_variance=log_variance)
    apart = (x - mean) * torch.exp(-log_variance / 2)
    return -(math.log(2 * math.pi) + log_variance + apart.square()) / 2


def discretised_gaussian_log_likelihood(x: Value, mean: Value, log_variance: Value) -> Tensor:
    """Log-probability of x's bin under N(mean, variance), in nats (Eq. 13, Ho et al. 2020).

    x: one of 256 values evenly spaced over [-1, 1], the middle of a bin of width 2/255; the bin of
    -1 reaches down to minus infinity, that of 1 up to infinity, so that the 256 probabilities sum
    to 1. Other values of x are taken as the middle of a bin of that width. Arguments, result and
    errors are otherwise those of gaussian_kl.

    Evaluated in float64 whatever the dtype, from logarithms of the smaller tail: finite and exact
    for narrow Gaussians far away, and for wide ones, where the bin's ends differ in the last digits
    of a float32 alone.
    """
    x, mean, log_variance = _values(x=x, mean=mean, log_variance=log_variance)
    dtype = x.dtype
    x, mean, log_variance = x.double(), mean.double(), log_variance.double()
    narrow = torch.exp(-log_variance / 2)
    lower, upper = (x - mean - BIN / 2) * narrow, (x - mean + BIN / 2) * narrow
    first, last = x < -1 + BIN / 2, x > 1 - BIN / 2
    # Above the mean the bin is mirrored to below it: a lower tail has digits, 1 minus it has not.
    mirrored = ((x > mean) | last) & ~first
    below = torch.special.log_ndtr(torch.where(mirrored, -upper, lower))
    above = torch.special.log_ndtr(torch.where(mirrored, -lower, upper))
    # -1 stands where the outer bins have no lower end, to keep NaN out of the gradient.
    gap = torch.where(first | last, -1.0, below - above)
    inner = above + torch.log(-torch.expm1(gap))
    return torch.where(first | last, above, inner).to(dtype)


def _values(**named: object) -> list[Tensor]:
    """The arguments as tensors of one floating dtype, float32 at least, on one device."""
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    for name, value in named.items():
        if isinstance(value, Tensor):
            checks.floating(name, value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            got = type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor or a number; got {got}")
    wide = not tensors or any(value.dtype == torch.float64 for value in tensors)
    dtype = torch.float64 if wide else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    return [
        value.to(dtype)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=dtype, device=device)  # type: ignore[arg-type]
        for value in named.values()
    ]
