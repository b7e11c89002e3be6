// exp against libm in double: the error bounds stated in exponential.h.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "core/exponential.h"

namespace ddpm::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Every 1021st float32: both signs and every exponent.
template <class Visit>
void sweep(Visit visit) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1021) {
    const float x = float_of(static_cast<uint32_t>(bits));
    if (std::isfinite(x)) visit(x);
  }
}

// Distance between neighbouring float32 numbers near `value`, including subnormal ones.
double ulp(double value) {
  return std::ldexp(1.0, std::max(std::ilogb(value), -126) - 23);
}

void exponential_is_within_1_1_ulp() {
  double worst = 0, worst_subnormal = 0;
  sweep([&](float x) {
    const double exact = std::exp(static_cast<double>(x));
    if (exact < 0x1p-150 || exact >= 0x1.ffffffp127) return;  // 0 or infinity in float32
    const double error = std::fabs(static_cast<double>(exponential(x)) - exact) / ulp(exact);
    double& range_worst = exact < 0x1p-126 ? worst_subnormal : worst;
    range_worst = std::max(range_worst, error);
  });
  CHECK(worst <= 1.1, worst);
  CHECK(worst > 0.1, worst);  // the sweep is not empty
  CHECK(worst_subnormal <= 1.0, worst_subnormal);
  CHECK(worst_subnormal > 0.1, worst_subnormal);
}

void what_is_out_of_range_is_0_or_infinite() {
  sweep([](float x) {
    if (x > 88.7229f) CHECK(exponential(x) == kInfinity, x);
    if (x < -103.98f) CHECK(bits_of(exponential(x)) == 0, x, exponential(x));
  });
  CHECK(exponential(88.7228f) < kInfinity);
  CHECK(exponential(-103.97f) == 0x1p-149f, exponential(-103.97f));
  CHECK(exponential(kInfinity) == kInfinity);
  CHECK(bits_of(exponential(-kInfinity)) == 0);
}

// A hash of the results. Every processor and the Triton function have these bits.
void the_bits_are_these() {
  uint64_t hash = 0xCBF29CE484222325u;
  sweep([&](float x) { hash = (hash ^ bits_of(exponential(x))) * 0x100000001B3u; });
  CHECK(hash == 0x1A21C79D1D970143u, hash >> 32, hash & 0xFFFFFFFFu);
}

void exact_values_and_nan() {
  CHECK(exponential(0.0f) == 1.0f && exponential(-0.0f) == 1.0f);
  for (uint32_t nan : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFFFFFFFFu}) {
    CHECK(std::isnan(exponential(float_of(nan))), nan);
  }
  CHECK(exponential(1.0) == std::exp(1.0));
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(exponential_is_within_1_1_ulp, what_is_out_of_range_is_0_or_infinite,
             the_bits_are_these, exact_values_and_nan);
}
