"""Arithmetic of the updates and of their noise, for Triton kernels.

The counterpart of csrc/core/{philox,normal,diffusion}.h, with the same names, constants and order
of operations, so that the float32 bits are the same. This requires enable_fp_fusion=False: every
fma is explicit.

Constants are written where they are used: at each launch, Triton compares every global that a
kernel has read with its former value.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tuple:
    """Return four uint32 words of a counter and a key (k0 low, k1 high); shapes broadcast.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    for _ in tl.static_range(10):
        p0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        p1 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        n0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        n2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        c0 = n0
        c2 = n2
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform_of(word: tl.tensor) -> tl.tensor:
    """Return a uint32 as a uniform in (0, 1]: word * 2^-32 + 2^-33, rounded to float32."""
    return tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)


@triton.jit
def log_unit(u: tl.tensor) -> tl.tensor:
    """Return ln(u) for float32 u in [2^-33, 1], within one unit in the last place.

    u = m * 2^e with m in [2/3, 4/3); log1p(f) = f - f^2/2 + f^3 q(f), q a minimax polynomial.
    """
    # 0x3F2AAAAB is 2/3.
    shifted = tl.sub(u.to(tl.uint32, bitcast=True), 0x3F2AAAAB, sanitize_overflow=False)
    e = shifted.to(tl.int32, bitcast=True) >> 23
    m = tl.add(shifted & 0x007FFFFF, 0x3F2AAAAB, sanitize_overflow=False)
    f = m.to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    q = tl.fma(f, -0.12891684, 0.13984437)
    q = tl.fma(q, f, -0.121842615)
    q = tl.fma(q, f, 0.14005868)
    q = tl.fma(q, f, -0.16680488)
    q = tl.fma(q, f, 0.20010406)
    q = tl.fma(q, f, -0.24999797)
    q = tl.fma(q, f, 0.33333215)
    tail = tl.fma(f2 * f, q, -0.5 * f2)
    ef = e.to(tl.float32)
    # ln 2 in two parts: ef * high is exact.
    return tl.fma(ef, 0.69314575, f + tl.fma(ef, 1.4286068e-06, tail))


@triton.jit
def sincos_turns(u: tl.tensor) -> tl.tuple:
    """Return sine and cosine of 2 pi u for float32 u in [0, 1], within 1e-7.

    u = quadrant / 4 + r with abs(r) <= 1/8, exactly.
    """
    quadrant = tl.fma(u, 4.0, 0.5).to(tl.int32)
    r = tl.fma(quadrant.to(tl.float32), -0.25, u)
    y = r * r
    s = tl.fma(y, -75.39356, 81.592354)
    s = tl.fma(s, y, -41.341663)
    s = tl.fma(s, y, 6.2831855)
    s = s * r
    c = tl.fma(y, 59.245964, -85.44374)
    c = tl.fma(c, y, 64.93932)
    c = tl.fma(c, y, -19.739208)
    c = tl.fma(c, y, 1.0)
    odd = (quadrant & 1) != 0
    sin_abs = tl.where(odd, c, s)
    cos_abs = tl.where(odd, s, c)
    turned = quadrant.to(tl.uint32, bitcast=True)
    sin_bits = sin_abs.to(tl.uint32, bitcast=True) ^ ((turned & 2) << 30)
    cos_bits = cos_abs.to(tl.uint32, bitcast=True) ^ (((turned + 1) & 2) << 30)
    return sin_bits.to(tl.float32, bitcast=True), cos_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word0: tl.tensor, word1: tl.tensor) -> tl.tuple:
    """Return two independent N(0, 1) from two uint32 words (Box and Muller 1958)."""
    radius = tl.sqrt_rn(-2.0 * log_unit(uniform_of(word0)))
    sin, cos = sincos_turns(uniform_of(word1))
    return radius * cos, radius * sin


@triton.jit
def normal4(block: tl.tensor, stream: tl.tensor, sample: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Return the normals of Philox blocks: float32 [..., 4 * B] of blocks [..., B].

    block: uint32, the elements 4 * block .. 4 * block + 3 of a sample in channels-last order.
    stream: uint32; sample and seed: uint64; each broadcasts against block.
    """
    sample_low = sample.to(tl.uint32)
    sample_high = (sample >> 32).to(tl.uint32)
    key_low = seed.to(tl.uint32)
    key_high = (seed >> 32).to(tl.uint32)
    r0, r1, r2, r3 = philox4x32_10(block, stream, sample_low, sample_high, key_low, key_high)
    a0, a1 = box_muller(r0, r1)
    b0, b1 = box_muller(r2, r3)
    return tl.interleave(tl.interleave(a0, b0), tl.interleave(a1, b1))


@triton.jit
def _pow2(n: tl.tensor) -> tl.tensor:
    """Return 2^n for int32 n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x: tl.tensor) -> tl.tensor:
    """Return e^x for any float32 x, within 1.1 units in the last place; NaN passes.

    x = k ln 2 + r with abs(r) <= ln(2) / 2; e^r = 1 + r + r^2 q(r), q a minimax polynomial. Beyond
    the two bounds of x the result is 0 or infinity.
    """
    x = tl.where(x < -104.0, -104.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    # Added to 1.5 * 2^23, whose bits are 0x4B400000, x / ln 2 is rounded to an integer.
    shifted = tl.fma(x, 1.442695, 12582912.0)
    k = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    kf = shifted - 12582912.0
    # ln 2 in two parts: kf * high is exact.
    r = tl.fma(kf, -0.69140625, x)
    r = tl.fma(kf, -0.0017409306, r)
    q = tl.fma(r, 0.0013821446, 0.008368662)
    q = tl.fma(q, r, 0.041668255)
    q = tl.fma(q, r, 0.16666521)
    q = tl.fma(q, r, 0.49999994)
    p = 1.0 + tl.fma(r * r, q, r)
    # In two steps: 2^k itself may be no float32, and only the second can round.
    half = k >> 1
    return (p * _pow2(half)) * _pow2(k - half)


@triton.jit
def q_sample(
    x0: tl.tensor, noise: tl.tensor, signal_scale: tl.tensor, noise_scale: tl.tensor
) -> tl.tensor:
    """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, Eq. 4)."""
    return tl.fma(signal_scale, x0, noise_scale * noise)


@triton.jit
def q_posterior_mean(
    x0: tl.tensor, x_t: tl.tensor, coef_x0: tl.tensor, coef_x_t: tl.tensor
) -> tl.tensor:
    """Return the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7)."""
    return tl.fma(coef_x0, x0, coef_x_t * x_t)


@triton.jit
def guide(out: tl.tensor, out2: tl.tensor, G0: tl.tensor, G1: tl.tensor) -> tl.tensor:
    """Combine the two outputs of classifier-free guidance."""
    return tl.fma(G1, out2, G0 * out)


@triton.jit
def predict_x0(
    x: tl.tensor, out: tl.tensor, P: tl.tensor, Q: tl.tensor, ratio: tl.tensor
) -> tl.tensor:
    """Return x0 = P x + Q out of the model's output, by the ratio Q / P if P is not 0."""
    direct = P == 0
    sum = tl.where(direct, out, tl.fma(ratio, out, x))
    return tl.where(direct, Q, P) * sum


@triton.jit
def clip(value: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """Clip to [-bound, bound]. NaN passes: both comparisons are false for it."""
    value = tl.where(value < -bound, -bound, value)
    return tl.where(value > bound, bound, value)


@triton.jit
def threshold(value: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """Clip to [-bound, bound] and divide by bound: dynamic thresholding."""
    return tl.div_rn(clip(value, bound), bound)


@triton.jit
def step_mean(
    x: tl.tensor,
    x0: tl.tensor,
    out: tl.tensor,
    Xx: tl.tensor,
    Xx0: tl.tensor,
    Xo: tl.tensor | None,
) -> tl.tensor:
    """Return the first terms of the next x or, with other coefficients, of the next y or of h0.

    Xo: None if no row uses it.
    """
    next = tl.fma(Xx0, x0, Xx * x)
    if Xo is not None:
        next = tl.fma(Xo, out, next)
    return next


@triton.jit
def add_term(sum: tl.tensor, value: tl.tensor, coef: tl.tensor) -> tl.tensor:
    """Add a term to the next x or y."""
    return tl.fma(coef, value, sum)


@triton.jit
def add_noise(mean: tl.tensor, noise: tl.tensor, S: tl.tensor) -> tl.tensor:
    """Add the noise to the mean of the next x."""
    return tl.fma(S, noise, mean)


@triton.jit
def learned_noise(noise: tl.tensor, v: tl.tensor, Lmin: tl.tensor, Lmax: tl.tensor) -> tl.tensor:
    """Scale noise by a learned variance v, whose logarithm is Lmin at v = 0 and Lmax at v = 1."""
    return exponential(tl.fma(v, 0.5 * (Lmax - Lmin), 0.5 * Lmin)) * noise
