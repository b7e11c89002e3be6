"""Gaussians: divergence, density, and the discretised decoder of 256 bins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.utils import checks

BIN = 2 / 255  # width of a bin of 256 values evenly spaced over [-1, 1]

Value = Tensor | float


def gaussian_kl(mean1: Value, log_variance1: Value, mean2: Value, log_variance2: Value) -> Tensor:
    """Return D_KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats.

    Half of log variance2 - log variance1 + variance1 / variance2 - 1 + (mean1 - mean2)^2 /
    variance2; summed over d elements it is Corollary 9, Khungurn 2022 (printed without the + before
    its logarithms). Differentiable.

    Args:
        mean1: Floating-point tensor or number. All arguments broadcast.
        log_variance1: Natural logarithm of the variance.
        mean2: As `mean1`.
        log_variance2: As `log_variance1`.

    Returns:
        The divergence, with the common shape, device and dtype; float32 for half precision, float64
        if all arguments are numbers.

    Raises:
        TypeError: An argument is neither a floating-point tensor nor a number.
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
    """Return D_KL(N(mean1, covariance1) || N(mean2, covariance2)) in nats (Prop. 8, Khungurn 2022).

    Differentiable. Synchronises with a GPU to check the covariances.

    Args:
        mean1: float32 or float64 [..., d]. All arguments have one dtype and device; the leading
            dimensions broadcast.
        covariance1: Positive definite [..., d, d]; only the lower triangle is read.
        mean2: As `mean1`.
        covariance2: As `covariance1`.

    Returns:
        The divergence [...].

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape, or a covariance is not positive definite.
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
            raise ValueError(f"covariance{i} must be positive definite; got one that is not")
        factors.append(factor)
    first, second = factors
    log_dets = [2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) for factor in factors]
    trace = torch.linalg.solve_triangular(second, first, upper=False).square().sum((-2, -1))
    apart = torch.linalg.solve_triangular(second, (mean2 - mean1)[..., None], upper=False)
    distance = apart.square().sum((-2, -1))
    return (log_dets[1] - log_dets[0] + trace + distance - mean1.shape[-1]) / 2


def gaussian_log_density(x: Value, mean: Value, log_variance: Value) -> Tensor:
    """Return log N(x; mean, variance) of each element, in nats: a density, which may exceed 0.

    Args:
        x: Floating-point tensor or number. All arguments broadcast.
        mean: As `x`.
        log_variance: Natural logarithm of the variance.

    Returns:
        The log-density, as by `gaussian_kl`.

    Raises:
        TypeError: As `gaussian_kl`.
    """
    x, mean, log_variance = _values(x=x, mean=mean, log_variance=log_variance)
    apart = (x - mean) * torch.exp(-log_variance / 2)
    return -(math.log(2 * math.pi) + log_variance + apart.square()) / 2


def discretised_gaussian_log_likelihood(x: Value, mean: Value, log_variance: Value) -> Tensor:
    """Return the log-probability of the bin of x under N(mean, variance) (Eq. 13, Ho et al. 2020).

    The bins have a width of 2/255; that of -1 extends to minus infinity, that of 1 to infinity, so
    the 256 probabilities sum to 1. Evaluated in float64, from logarithms of the smaller tail:
    finite and exact for narrow Gaussians far away, and for wide ones, for which the ends of a bin
    differ only in the last digits of a float32.

    Args:
        x: One of 256 values evenly spaced over [-1, 1]; other values are the middle of a bin of
            that width. Floating-point tensor or number. All arguments broadcast.
        mean: As `x`.
        log_variance: Natural logarithm of the variance.

    Returns:
        The log-probability in nats, as by `gaussian_kl`.

    Raises:
        TypeError: As `gaussian_kl`.
    """
    x, mean, log_variance = _values(x=x, mean=mean, log_variance=log_variance)
    dtype = x.dtype
    x, mean, log_variance = x.double(), mean.double(), log_variance.double()
    narrow = torch.exp(-log_variance / 2)
    lower, upper = (x - mean - BIN / 2) * narrow, (x - mean + BIN / 2) * narrow
    first, last = x < -1 + BIN / 2, x > 1 - BIN / 2
    # Above the mean the bin is mirrored: a lower tail keeps its digits, 1 minus a tail does not.
    mirrored = ((x > mean) | last) & ~first
    below = torch.special.log_ndtr(torch.where(mirrored, -upper, lower))
    above = torch.special.log_ndtr(torch.where(mirrored, -lower, upper))
    # Outer bins have one end; -1 in place of the difference keeps NaN out of the gradient.
    gap = torch.where(first | last, -1.0, below - above)
    inner = above + torch.log(-torch.expm1(gap))
    return torch.where(first | last, above, inner).to(dtype)


def _values(**named: object) -> list[Tensor]:
    """Return the arguments as tensors of one dtype, float32 or float64, on one device."""
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
