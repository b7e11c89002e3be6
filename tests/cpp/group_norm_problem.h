// Random problems for group_norm_, and their results in float64.
#pragma once

#include <cmath>
#include <limits>

#include "check.h"
#include "core/args.h"
#include "problems.h"

namespace ddpm::test {

struct NormChoices {
  DType dtype = DType::f32;
  int64_t samples = 2, first = 32, second = 0, height = 4, width = 4, groups = 4;
  bool vector = false, modulation = false, row = true, outside = false;
  bool residual = false, total = false, over_residual = false, silu = true;
  bool wide_parameters = false;
  Layout layout = Layout::channels_last;
  double mean = 0.0;
};

// Shapes with one group and with many, groups of 12 that straddle the two sources, groups of every
// common divisor with a vector, odd numbers of pixels and a single one, channels that fill no
// vector.
inline NormChoices random_choices(Random& random) {
  struct Shape {
    int64_t first, second, groups, height, width;
  };
  static const std::vector<Shape> shapes = {
      {32, 0, 8, 4, 4},     {64, 0, 32, 3, 5},  {128, 0, 32, 8, 8}, {32, 16, 4, 5, 4},
      {256, 128, 32, 4, 4}, {24, 0, 8, 7, 3},   {48, 48, 32, 3, 3}, {192, 0, 32, 2, 2},
      {8, 0, 8, 1, 1},      {16, 0, 1, 33, 31}, {64, 0, 1, 9, 8},   {40, 0, 5, 12, 12},
      {10, 5, 3, 3, 5},     {7, 0, 1, 4, 5},    {8, 248, 2, 2, 3},  {96, 0, 4, 5, 5},
      {8, 0, 2, 64, 64},    {4, 4, 2, 6, 1},    {512, 0, 1, 2, 3},  {16, 0, 16, 1, 9},
  };
  const Shape& s = shapes[static_cast<size_t>(random.below(static_cast<int64_t>(shapes.size())))];
  NormChoices c;
  c.samples = 1 + random.below(3);
  c.first = s.first;
  c.second = s.second;
  c.groups = s.groups;
  c.height = s.height;
  c.width = s.width;
  c.vector = random.coin();
  c.modulation = random.coin();
  c.row = random.coin();
  c.outside = c.row && random.below(4) == 0;
  c.residual = s.second == 0 && random.coin();
  c.total = s.second == 0 && random.coin();
  c.over_residual = c.residual && c.total && random.coin();
  c.silu = random.coin();
  c.wide_parameters = random.coin();
  c.mean = random.below(4) == 0 ? 100.0 : 0.0;
  return c;
}

struct NormProblem {
  NormChoices c;
  TestTensor out, x, x2, residual, total;
  Table vector, modulation, weight, bias;
  std::vector<uint16_t> narrow[2];  // weight and bias in 16 bits
  std::vector<int64_t> row;
  static constexpr int64_t kRows = 3, kGap = 5;  // rows of the tables, and gap between them

  NormProblem(const NormChoices& choices, Random& random) : c(choices) {
    const bool wide = c.dtype == DType::f64;
    const auto map = [&](int64_t channels, double mean) {
      TestTensor tensor(c.dtype, {c.samples, channels, c.height, c.width}, c.layout, random);
      tensor.each([&](const Sizes& at) { tensor.set(at, mean + random.symmetric(2.0)); });
      return tensor;
    };
    x = map(c.first, c.mean);
    if (c.second > 0) x2 = map(c.second, c.mean);
    if (c.residual) residual = map(c.first, 0.0);
    if (c.total) total = map(c.first, 0.0);
    out = map(channels(), 0.0);
    if (c.vector) vector = random_table(wide, kRows * (channels() + kGap), random);
    if (c.modulation) modulation = random_table(wide, kRows * (2 * channels() + kGap), random);
    for (Table* table : {&weight, &bias}) {
      std::vector<double> values(static_cast<size_t>(channels()));
      for (double& v : values) v = rounded(random.symmetric(2.0));
      std::vector<uint16_t>& bits = narrow[table == &bias];
      for (double v : values) bits.push_back(bits_of_16(v));
      *table = Table(wide, values);
    }
    for (int64_t n = 0; n < 2 * c.samples; ++n) row.push_back(random.below(kRows));
    if (c.outside) row[0] = random.coin() ? -1 : kRows;
  }

  int64_t channels() const { return c.first + c.second; }
  bool has_16_bits() const { return c.dtype == DType::f16 || c.dtype == DType::bf16; }
  double rounded(double v) const {
    const float f = static_cast<float>(v);
    return c.dtype == DType::f16    ? static_cast<double>(to_float(to_half(f)))
           : c.dtype == DType::bf16 ? static_cast<double>(to_float(to_bfloat16(f)))
                                    : v;
  }
  uint16_t bits_of_16(double v) const {
    const float f = static_cast<float>(v);
    return c.dtype == DType::bf16 ? to_bfloat16(f).bits : to_half(f).bits;
  }

  static Map map_of(const TestTensor& tensor) {
    if (!tensor.exists()) return {};
    const Sizes& s = tensor.strides();
    return {tensor.data(), s[0], s[1], s[2], s[3]};
  }

  GroupNormArgs args() const {
    GroupNormArgs a{};
    a.samples = c.samples;
    a.height = c.height;
    a.width = c.width;
    a.first = c.first;
    a.second = c.second;
    a.groups = c.groups;
    a.dtype = c.dtype;
    const bool narrows = has_16_bits() && !c.wide_parameters;
    a.parameters = has_16_bits() && c.wide_parameters ? DType::f32 : c.dtype;
    a.out = map_of(out);
    a.x = map_of(x);
    a.x2 = map_of(x2);
    a.residual = map_of(residual);
    a.total = c.over_residual ? a.residual : map_of(total);
    if (c.vector) a.vector = {vector.data(), channels() + kGap, kRows};
    if (c.modulation) a.modulation = {modulation.data(), 2 * channels() + kGap, kRows};
    if (c.row) a.row = row.data();
    a.row_stride = 2;
    a.weight = narrows ? narrow[0].data() : weight.data();
    a.bias = narrows ? narrow[1].data() : bias.data();
    a.eps = 1e-5;
    a.silu = c.silu;
    return a;
  }

  double entry(const Table& table, int64_t width, int64_t sample, int64_t column) const {
    const int64_t r = c.row ? row[static_cast<size_t>(2 * sample)] : 0;
    const bool inside = r >= 0 && r < kRows;
    return inside ? table[r * (width + kGap) + column] : std::nan("");
  }

  // h at an index, before any kernel has run.
  double sum_at(const Sizes& at) const {
    const int64_t channel = at[1];
    Sizes second_at = at;
    second_at[1] -= c.first;
    double h = channel < c.first ? x.get(at) : x2.get(second_at);
    if (c.residual) h += residual.get(at);
    return c.vector ? h + entry(vector, channels(), at[0], channel) : h;
  }
};

// The result in float64. Computed before the kernels run, because total may alias the residual.
class NormReference {
 public:
  explicit NormReference(const NormProblem& problem) : p_(problem) {
    const int64_t size = p_.channels() / p_.c.groups;
    const size_t groups = static_cast<size_t>(p_.c.samples * p_.c.groups);
    std::vector<double> mean(groups, 0.0), variance(groups, 0.0);
    const double count = static_cast<double>(size * p_.c.height * p_.c.width);
    const auto group = [&](const Sizes& at) {
      return static_cast<size_t>(at[0] * p_.c.groups + at[1] / size);
    };
    p_.out.each([&](const Sizes& at) {
      sums_.push_back(p_.sum_at(at));
      mean[group(at)] += sums_.back() / count;
    });
    size_t i = 0;
    p_.out.each([&](const Sizes& at) {
      const double d = sums_[i++] - mean[group(at)];
      variance[group(at)] += d * d / count;
    });
    i = 0;
    p_.out.each([&](const Sizes& at) {
      const size_t g = group(at);
      double y = (sums_[i++] - mean[g]) / std::sqrt(variance[g] + 1e-5);
      double gain = p_.weight[at[1]] / std::sqrt(variance[g] + 1e-5);
      y = y * p_.weight[at[1]] + p_.bias[at[1]];
      if (p_.c.modulation) {
        const int64_t width = 2 * p_.channels();
        const double factor = 1 + p_.entry(p_.modulation, width, at[0], at[1]);
        y = y * factor + p_.entry(p_.modulation, width, at[0], p_.channels() + at[1]);
        gain *= factor;
      }
      offsets_.push_back(std::fabs(mean[g] * gain));
      values_.push_back(p_.c.silu ? y / (1 + std::exp(-y)) : y);
    });
  }

  // `ran` is a copy of the problem after a kernel has run.
  void check(const NormProblem& ran, const char* what) const {
    size_t i = 0;
    double top = 0, sum_top = 0;
    for (double v : values_) top = std::isnan(v) ? top : std::max(top, std::fabs(v));
    for (double v : sums_) sum_top = std::isnan(v) ? sum_top : std::max(sum_top, std::fabs(v));
    const bool wide = p_.c.dtype == DType::f64;
    const double eps = wide ? 0x1p-50 : 0x1p-21;  // eight roundings
    const double half_ulp = p_.c.dtype == DType::f16    ? 0x1p-11
                            : p_.c.dtype == DType::bf16 ? 0x1p-8
                                                        : 0;
    const double cancellation = eps * (1 + std::fabs(p_.c.mean));  // the mean is subtracted
    const double folded = p_.has_16_bits() ? 0x1p-22 : 0.0;        // the mean is part of an offset
    const TestTensor& total = p_.c.over_residual ? ran.residual : ran.total;
    ran.out.each([&](const Sizes& at) {
      const double want = values_[i], got = ran.out.get(at);
      const double bound =
          cancellation * top + folded * offsets_[i] + 1.01 * half_ulp * std::fabs(want) + 0x1p-24;
      CHECK(same(got, want, bound), what, at[0], at[1], at[2], at[3], got, want, bound);
      if (p_.c.total) {
        const double sum = total.get(at);
        const double near = eps * sum_top + 1.01 * half_ulp * std::fabs(sums_[i]) + 0x1p-24;
        CHECK(same(sum, sums_[i], near), what, "total", sum, sums_[i]);
      }
      ++i;
    });
  }

 private:
  static bool same(double got, double want, double bound) {
    return std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= bound;
  }

  const NormProblem p_;
  std::vector<double> sums_, values_;
  std::vector<double> offsets_;  // shift of each result by the mean
};

}  // namespace ddpm::test
