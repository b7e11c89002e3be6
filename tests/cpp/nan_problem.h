// A reverse step with a NaN in x and in the model output, an infinity that is clipped, and NaN in
// every coefficient that the flags exclude: a plain step, or one with a threshold, a learned
// variance, a past value and a second state.
#pragma once

#include <cmath>

#include "check.h"
#include "problems.h"

namespace ddpm::test {

struct NanProblem : ReverseStepProblem {
  const Sizes in_x{0, 1, 2, 3}, in_out{1, 2, 8, 10}, below{0, 0, 0, 0};

  NanProblem(const Choices& choices, bool multistep, Random& random)
      : ReverseStepProblem(choices, random) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const DType dtype = wide ? DType::f64 : DType::f32;
    source = out2 = log_variance = second = history = TestTensor();
    depth = 0;
    std::vector<TestTensor*> tensors{&x, &out, &pred_x0, &noise};
    if (multistep) tensors.insert(tensors.end(), {&log_variance, &second, &history});
    for (TestTensor* tensor : tensors) {
      *tensor = TestTensor(dtype, sizes, Layout::contiguous, random);
      tensor->fill(random, 2.0);
    }
    model_input = TestTensor(DType::f16, sizes, Layout::channels_last, random);
    order = memory_order(x.ndim(), x.sizes().data(), x.strides().data());
    index.assign(index.size(), 0);
    std::vector<double> row(kRowWidth, nan);
    row[kRow_P] = 1.5;
    row[kRow_Q] = -0.5;
    row[kRow_ratio] = -0.5 / 1.5;
    row[kRow_clip] = 1.0;
    row[kRow_Xx] = 0.25;
    row[kRow_Xx0] = 0.75;
    row[kRow_S] = 0.125;
    flags = kClip;
    if (multistep) {
      flags = kThreshold | kLearned | kSecond | kPast1 | kPush;
      depth = 1;
      row[kRow_clip] = nan;
      for (RowColumn used : {kRow_Hx, kRow_Hv, kRow_Yx, kRow_Yy, kRow_Yx0, kRow_Yh1, kRow_Xy,
                             kRow_Xh1, kRow_Lmin, kRow_Lmax, kRow_push}) {
        row[used] = 0.5;
      }
      row[kRow_slot] = 0;
      threshold = Table(wide, {1.0});
      threshold_stride = 0;
    }
    table = Table(wide, row);
    rows = 1;
    x.set(in_x, nan);
    out.set(in_out, nan);
    out.set(below, std::numeric_limits<double>::infinity());
  }

  static Choices choices(bool wide) {
    static const std::vector<Shape> shape = {{{2, 3, 9, 11}, "odd"}};
    Choices c;
    c.from = &shape;
    c.wide = wide;
    return c;
  }

  // After the step exactly the elements with a NaN input are NaN.
  void check_outcome(const char* kernels) const {
    x.each([&](const Sizes& at) {
      const bool expected = at == in_x || at == in_out;
      CHECK(std::isnan(x.get(at)) == expected, kernels, x.get(at));
      CHECK(std::isnan(pred_x0.get(at)) == expected, kernels, pred_x0.get(at));
      CHECK(std::isnan(model_input.get(at)) == expected, kernels, model_input.get(at));
      if (depth == 0) return;
      CHECK(std::isnan(second.get(at)) == expected, kernels, second.get(at));
      CHECK(std::isnan(history.get(at)) == expected, kernels, history.get(at));
    });
    CHECK(pred_x0.get(below) == -1.0, kernels, pred_x0.get(below));
  }
};

}  // namespace ddpm::test
