// Conversions between float32 and 16-bit types, against a reference in double.
#include <cmath>
#include <limits>

#include "check.h"
#include "core/half.h"
#include "random.h"

namespace ddpm::test {
namespace {

// A binary floating-point format: bits of the fraction, and the exponent bias.
struct Format {
  int fraction_bits;
  int bias;
};
constexpr Format kF16{10, 15};
constexpr Format kBf16{7, 127};

uint32_t infinity_bits(Format f) {
  return static_cast<uint32_t>(2 * f.bias + 1) << f.fraction_bits;
}

double decoded(uint32_t bits, Format f) {
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  const uint32_t magnitude = bits & 0x7FFFu;
  if (magnitude > infinity_bits(f)) return std::numeric_limits<double>::quiet_NaN();
  if (magnitude == infinity_bits(f)) return sign * std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(magnitude >> f.fraction_bits);
  const uint32_t fraction = magnitude & ((1u << f.fraction_bits) - 1);
  const uint32_t significand = exponent == 0 ? fraction : fraction | 1u << f.fraction_bits;
  const int power = (exponent == 0 ? 1 : exponent) - f.bias - f.fraction_bits;
  return sign * std::ldexp(static_cast<double>(significand), power);
}

// Rounds to nearest, ties to even, by the spacing of the format at the value.
uint32_t encoded(float value, Format f) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0) return sign;
  const int lowest = 1 - f.bias;
  int exponent = std::isinf(magnitude) ? f.bias : std::ilogb(magnitude);
  if (exponent < lowest) exponent = lowest;
  const double spacing = std::ldexp(1.0, exponent - f.fraction_bits);
  const double units = std::nearbyint(magnitude / spacing);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -f.fraction_bits), f.bias);
  if (units * spacing > largest) return sign | infinity_bits(f);
  // `units` is the significand with its hidden bit, which carries into the exponent.
  const uint32_t base = static_cast<uint32_t>(exponent - lowest) << f.fraction_bits;
  return sign | (base + static_cast<uint32_t>(units));
}

void check_decoding(uint32_t bits, float got, Format f) {
  const double expected = decoded(bits, f);
  if (std::isnan(expected)) {
    CHECK(std::isnan(got), bits, got);
  } else {
    CHECK(bits_of(got) == bits_of(static_cast<float>(expected)), bits, got, expected);
  }
}

void every_16_bit_float_is_decoded() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    check_decoding(bits, to_float(half_t{low}), kF16);
    check_decoding(bits, to_float(bfloat16_t{low}), kBf16);
  }
}

void check_encoding(float value) {
  const uint32_t f16 = to_half(value).bits;
  const uint32_t bf16 = to_bfloat16(value).bits;
  if (std::isnan(value)) {
    CHECK(std::isnan(decoded(f16, kF16)), bits_of(value), f16);
    CHECK(std::isnan(decoded(bf16, kBf16)), bits_of(value), bf16);
  } else {
    CHECK(f16 == encoded(value, kF16), value, f16, encoded(value, kF16));
    CHECK(bf16 == encoded(value, kBf16), value, bf16, encoded(value, kBf16));
  }
}

// Checks the float and its two neighbours, with both signs.
void check_around(float value) {
  const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
  for (uint32_t m : {magnitude - 1, magnitude, magnitude + 1}) {
    if (m > 0x7FFFFFFFu) continue;
    check_encoding(float_of(m));
    check_encoding(float_of(m | 0x80000000u));
  }
}

void values_and_ties_of_every_16_bit_float() {
  for (uint32_t bits = 0; bits < 0x7FFFu; ++bits) {
    for (Format f : {kF16, kBf16}) {
      const double low = decoded(bits, f);
      const double high = decoded(bits + 1, f);
      if (!std::isfinite(low)) continue;
      check_around(static_cast<float>(low));
      if (std::isfinite(high)) check_around(static_cast<float>(0.5 * (low + high)));
    }
  }
  check_around(65520.0f);      // the tie between the largest float16 and infinity
  check_around(0x1.FFp+127f);  // and of bfloat16
  check_around(std::numeric_limits<float>::infinity());
}

void every_exponent_of_float32() {
  Random random(1);
  for (uint32_t exponent = 0; exponent < 256; ++exponent) {
    for (uint32_t fraction : {0u, 1u, 0x0FFFu, 0x1000u, 0x1001u, 0x7FFFu, 0x8000u, 0x8001u,
                              0x400000u, 0x7FFFFEu, 0x7FFFFFu}) {
      check_encoding(float_of(exponent << 23 | fraction));
      check_encoding(float_of(0x80000000u | exponent << 23 | fraction));
    }
    for (int i = 0; i < 500; ++i) {
      const uint32_t remainder = static_cast<uint32_t>(random.word()) & 0x807FFFFFu;
      check_encoding(float_of(exponent << 23 | remainder));
    }
  }
}

}  // namespace
}  // namespace ddpm::test

int main() {
  return ddpm::test::run(ddpm::test::every_16_bit_float_is_decoded,
                         ddpm::test::values_and_ties_of_every_16_bit_float,
                         ddpm::test::every_exponent_of_float32);
}
