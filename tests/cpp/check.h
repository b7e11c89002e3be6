// CHECK and a runner: main() of a test file returns run(case, case, ...).
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>

namespace ddpm::test {

struct Counts {
  long checks = 0;
  long failures = 0;
};

inline Counts& counts() {
  static Counts value;
  return value;
}

constexpr long kMostReported = 20;

inline bool check(bool holds, const char* file, int line, const std::string& what) {
  ++counts().checks;
  if (!holds && ++counts().failures <= kMostReported) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  }
  return holds;
}

// The message is formatted only if the check fails.
#define CHECK(condition, ...)                                    \
  ((condition) ? ddpm::test::check(true, __FILE__, __LINE__, "") \
               : ddpm::test::check(false, __FILE__, __LINE__,    \
                                   std::string(#condition "  ") + ddpm::test::text(__VA_ARGS__)))

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  [[maybe_unused]] const auto add = [&result](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      char digits[64];
      std::snprintf(digits, sizeof digits, "%.9g ", static_cast<double>(part));
      result += digits;
    } else {
      result += part;
      result += ' ';
    }
  };
  (add(parts), ...);
  return result;
}

template <class... Cases>
int run(const Cases&... cases) {
  (cases(), ...);
  std::printf("%ld checks, %ld failures\n", counts().checks, counts().failures);
  return counts().failures == 0 ? 0 : 1;
}

}  // namespace ddpm::test
