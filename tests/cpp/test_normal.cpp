// Logarithm, sine and cosine against libm in double: the error bounds stated in normal.h.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "core/normal.h"

namespace ddpm::test {
namespace {

// Every 4093rd word, and every word near both ends.
template <class Visit>
void sweep(Visit visit) {
  constexpr uint64_t kEnd = uint64_t{1} << 32;
  constexpr uint64_t kDense = 4096;
  for (uint64_t word = 0; word < kDense; ++word) visit(static_cast<uint32_t>(word));
  for (uint64_t word = kDense; word < kEnd - kDense; word += 4093) {
    visit(static_cast<uint32_t>(word));
  }
  for (uint64_t word = kEnd - kDense; word < kEnd; ++word) visit(static_cast<uint32_t>(word));
}

// Distance between neighbouring float32 numbers near `value`.
double ulp(double value) {
  const int exponent = std::max(std::ilogb(value), -126);
  return std::ldexp(1.0, exponent - 23);
}

void uniforms_are_rounded_once() {
  sweep([](uint32_t word) {
    const float u = uniform_of(word);
    const double exact = std::fma(static_cast<double>(static_cast<float>(word)), 0x1p-32, 0x1p-33);
    CHECK(u == static_cast<float>(exact), word, u);
    CHECK(u > 0.0f && u <= 1.0f, word, u);
  });
}

void logarithm_is_within_one_ulp() {
  double worst = 0;
  sweep([&worst](uint32_t word) {
    const float u = uniform_of(word);
    const double exact = std::log(static_cast<double>(u));
    const double error = std::fabs(static_cast<double>(log_unit(u)) - exact);
    if (exact != 0) worst = std::max(worst, error / ulp(exact));
  });
  CHECK(worst <= 1.0, worst);
  CHECK(worst > 0.1, worst);  // the sweep is not empty
  CHECK(bits_of(log_unit(1.0f)) == 0);
}

void sine_and_cosine_are_within_1e7() {
  constexpr double kTurn = 6.283185307179586476925;
  double worst = 0;
  sweep([&worst](uint32_t word) {
    const float u = uniform_of(word);
    const SinCos got = sincos_turns(u);
    const double angle = kTurn * static_cast<double>(u);
    worst = std::max({worst, std::fabs(static_cast<double>(got.sin) - std::sin(angle)),
                      std::fabs(static_cast<double>(got.cos) - std::cos(angle))});
  });
  CHECK(worst <= 1e-7, worst);
  CHECK(worst > 1e-9, worst);
  const SinCos zero = sincos_turns(0.0f);
  CHECK(zero.sin == 0.0f && zero.cos == 1.0f, zero.sin, zero.cos);
}

void normals_follow_box_and_muller() {
  constexpr double kTurn = 6.283185307179586476925;
  double worst = 0;
  uint32_t other = 12345;
  sweep([&](uint32_t word) {
    other = other * 1664525u + 1013904223u;
    const NormalPair z = box_muller(word, other);
    const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(uniform_of(word))));
    const double angle = kTurn * static_cast<double>(uniform_of(other));
    worst = std::max({worst, std::fabs(static_cast<double>(z.z0) - radius * std::cos(angle)),
                      std::fabs(static_cast<double>(z.z1) - radius * std::sin(angle))});
    CHECK(std::isfinite(z.z0) && std::isfinite(z.z1), word, z.z0, z.z1);
  });
  // 1e-7 of the largest radius, 6.77, and one ulp of the result.
  CHECK(worst <= 1.5e-6, worst);
}

}  // namespace
}  // namespace ddpm::test

int main() {
  return ddpm::test::run(
      ddpm::test::uniforms_are_rounded_once, ddpm::test::logarithm_is_within_one_ulp,
      ddpm::test::sine_and_cosine_are_within_1e7, ddpm::test::normals_follow_box_and_muller);
}
