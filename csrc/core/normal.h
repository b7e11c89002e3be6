// Standard normals from random words, with the same float32 bits on every processor.
//
// Only fma, add, multiply, the correctly rounded square root and integer operations are used: log,
// sin and cos of the libraries differ between platforms. csrc is compiled without contraction, so
// that an fma is used exactly where one is written. ddpm_fast/ops/triton/arithmetic.py has the same
// functions for Triton: same names, same order, same constants.
#pragma once

#include "core/macros.h"
#include "core/philox.h"

namespace ddpm {

// Maps a random word r to a uniform number in (0, 1]: r * 2^-32 + 2^-33, rounded to float32.
DDPM_HD float uniform_of(uint32_t word) {
  return fma(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
}

// ln(u) for u in [2^-33, 1], within one ulp. u = m * 2^e with m in [2/3, 4/3); log1p(f) = f - f^2/2
// + f^3 q(f), q a minimax polynomial.
DDPM_HD float log_unit(float u) {
  const uint32_t shifted = bits_of(u) - 0x3F2AAAABu;
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float m = float_of((shifted & 0x007FFFFFu) + 0x3F2AAAABu);
  const float f = m - 1.0f;
  const float f2 = f * f;
  float q = -0x1.08058Ep-3f;
  q = fma(q, f, 0x1.1E66BAp-3f);
  q = fma(q, f, -0x1.F3113Ep-4f);
  q = fma(q, f, 0x1.1ED716p-3f);
  q = fma(q, f, -0x1.559DCCp-3f);
  q = fma(q, f, 0x1.99D028p-3f);
  q = fma(q, f, -0x1.FFFEF0p-3f);
  q = fma(q, f, 0x1.555506p-2f);
  const float tail = fma(f2 * f, q, -0.5f * f2);
  const float ef = static_cast<float>(e);
  // ln 2 is split into two parts, so that ef * high is exact.
  return fma(ef, 0x1.62E400p-1f, f + fma(ef, 0x1.7F7D1Cp-20f, tail));
}

struct SinCos {
  float sin, cos;
};

// sin and cos of 2 pi u for u in [0, 1], with an absolute error below 1e-7. u = quadrant / 4 + r
// with |r| <= 1/8, exactly.
DDPM_HD SinCos sincos_turns(float u) {
  const int32_t quadrant = static_cast<int32_t>(fma(u, 4.0f, 0.5f));
  const float r = fma(static_cast<float>(quadrant), -0.25f, u);
  const float y = r * r;
  float s = -75.39356f;
  s = fma(s, y, 81.592354f);
  s = fma(s, y, -41.341663f);
  s = fma(s, y, 6.2831855f);
  s = s * r;
  float c = 59.245964f;
  c = fma(c, y, -85.44374f);
  c = fma(c, y, 64.93932f);
  c = fma(c, y, -19.739208f);
  c = fma(c, y, 1.0f);
  const bool odd = quadrant & 1;
  const float sin_abs = odd ? c : s;
  const float cos_abs = odd ? s : c;
  const uint32_t sin_sign = static_cast<uint32_t>(quadrant & 2) << 30;
  const uint32_t cos_sign = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  return {float_of(bits_of(sin_abs) ^ sin_sign), float_of(bits_of(cos_abs) ^ cos_sign)};
}

struct NormalPair {
  float z0, z1;
};

// Two independent N(0, 1) from two random words (Box and Muller 1958).
DDPM_HD NormalPair box_muller(uint32_t word0, uint32_t word1) {
  const float radius = sqrt_rn(-2.0f * log_unit(uniform_of(word0)));
  const SinCos angle = sincos_turns(uniform_of(word1));
  return {radius * angle.cos, radius * angle.sin};
}

// The four normals of one Philox block: elements 4 * block .. 4 * block + 3 of a sample, numbered
// in channels-last order. Streams: 0 is x_T, 1 + i the noise of step i; training streams set the
// top bit.
struct Normal4 {
  float z[4];
};

DDPM_HD Normal4 normal4(uint32_t block, uint32_t stream, uint64_t sample, uint64_t seed) {
  const Philox4 w = philox4x32_10(block, stream, static_cast<uint32_t>(sample),
                                  static_cast<uint32_t>(sample >> 32), static_cast<uint32_t>(seed),
                                  static_cast<uint32_t>(seed >> 32));
  const NormalPair a = box_muller(w.r0, w.r1);
  const NormalPair b = box_muller(w.r2, w.r3);
  return {{a.z0, a.z1, b.z0, b.z1}};
}

}  // namespace ddpm
