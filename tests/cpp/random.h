// Reproducible random numbers for the tests, from a generator other than the one under test.
#pragma once

#include <cstdint>

namespace ddpm::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint64_t word() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // Uniform in 0 .. count - 1.
  int64_t below(int64_t count) {
    return static_cast<int64_t>(word() % static_cast<uint64_t>(count));
  }

  bool coin() { return word() >> 63; }

  // Uniform in [-limit, limit).
  double symmetric(double limit) {
    return limit * (static_cast<double>(word() >> 11) * 0x1p-52 - 1.0);
  }

 private:
  uint64_t state_;
};

}  // namespace ddpm::test
