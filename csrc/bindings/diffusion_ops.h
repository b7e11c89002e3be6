// The operators torch.ops.ddpm_fast.*, implemented once for every device.
//
// A Launch type runs the kernels on one device. ddpm_fast/ops/registry.py has the schemas, the fake
// kernels and the gradients, and defines the operators before these libraries are loaded. Python
// validates the arguments of users; the checks here only prevent a direct call from accessing
// memory outside its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/written.h"
#include "core/args.h"
#include "core/row.h"

namespace ddpm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
  }
}

// Compares all dimensions of a after the first `skipped` with those of b.
inline bool same_shape(const Tensor& a, const Tensor& b, size_t skipped) {
  const auto sizes = a.sizes(), others = b.sizes();
  if (sizes.size() != others.size() + skipped) return false;
  for (size_t d = 0; d < others.size(); ++d) {
    if (sizes[d + skipped] != others[d]) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The iteration order of the elements of one batch [samples, ...], and views of its tensors.
class Batch {
 public:
  Batch(const Tensor& first_tensor, bool channels_last) : first_tensor_(first_tensor) {
    STD_TORCH_CHECK(first_tensor.dim() > 0, "a tensor of samples needs a batch dimension");
    const int ndim = static_cast<int>(first_tensor.dim());
    order_ = channels_last
                 ? channels_last_order(ndim)
                 : memory_order(ndim, first_tensor.sizes().data(), first_tensor.strides().data());
  }

  int64_t samples() const { return first_tensor_.size(0); }
  int64_t elements() const {
    int64_t count = 1;
    for (int64_t d = 1; d < first_tensor_.dim(); ++d) count *= first_tensor_.size(d);
    return count;
  }

  View view(const Tensor& tensor, const char* name) const { return view_after(0, tensor, name); }

  // Slot 0 of a ring buffer [depth, samples, ...].
  View view_of_slot(const Tensor& ring, const char* name) const {
    return view_after(1, ring, name);
  }

  View view(const std::optional<Tensor>& tensor, const char* name) const {
    return tensor ? view(*tensor, name) : View{};
  }

  View written(const Tensor& tensor, const char* name) const {
    check_written(tensor, name);
    return view(tensor, name);
  }
  View written(const std::optional<Tensor>& tensor, const char* name) const {
    return tensor ? written(*tensor, name) : View{};
  }

 private:
  // View of the dimensions after the first `skipped`.
  View view_after(int skipped, const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(same_shape(tensor, first_tensor_, static_cast<size_t>(skipped)), name,
                    " must have the shape of the state");
    STD_TORCH_CHECK(same_device(tensor, first_tensor_), name,
                    " must be on the device of the state");
    View view{};
    const bool fits = make_view(
        &view, tensor.data_ptr(), dtype_of(tensor, name), static_cast<int>(first_tensor_.dim()),
        tensor.sizes().data() + skipped, tensor.strides().data() + skipped, order_);
    STD_TORCH_CHECK(fits, name, " must have at most ", kMaxDims, " dimensions after merging");
    return view;
  }

  Tensor first_tensor_;
  WalkOrder order_;
};

inline void check_index(const Tensor& index, const Tensor& state, const char* name) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1 &&
                      index.size(0) == state.size(0) && same_device(index, state),
                  name, " must be int64 with one value for each sample, on the state's device");
}

inline void check_coefs(const Tensor& coefs, int64_t width, const Tensor& state, const char* name) {
  const bool wide = state.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(coefs.dim() == 2 && coefs.size(1) == width && coefs.size(0) > 0 &&
                      coefs.is_contiguous() && same_device(coefs, state),
                  name, " must be a contiguous [rows, ", width, "] on the device of the state");
  STD_TORCH_CHECK(coefs.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name,
                  " must be ", wide ? "float64" : "float32");
}

inline Rng rng_of(const Tensor& rng, const Tensor& state) {
  STD_TORCH_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 3 &&
                      rng.is_contiguous() && same_device(rng, state),
                  "rng must be three int64 on the device of the state");
  return {static_cast<const int64_t*>(rng.data_ptr())};
}

inline void check_dtype(const Tensor& tensor, const Tensor& state, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == state.scalar_type(), name,
                  " must have the dtype of the state");
}

inline void check_threshold(const Tensor& threshold, const Tensor& state) {
  const bool wide = state.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(threshold.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      threshold.dim() == 1 && threshold.size(0) == state.size(0) &&
                      same_device(threshold, state),
                  "threshold must be ", wide ? "float64" : "float32",
                  " with one value for each sample, on the state's device");
}

// A tensor must be passed if and only if its flag is set.
inline void check_flagged(const std::optional<Tensor>& tensor, int64_t flag, const char* name) {
  STD_TORCH_CHECK(tensor.has_value() == (flag != 0), name,
                  flag ? " must be a tensor with these flags; got None"
                       : " must be None with these flags; got a tensor");
}

template <class Launch>
struct Ops {
  static void fill_q_sample(QSampleArgs& a, const Tensor& x0, const Tensor& t,
                            const Tensor& coefs) {
    check_coefs(coefs, 2, x0, "coefs");
    check_index(t, x0, "t");
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.t_stride = t.stride(0);
    a.coefs = coefs.data_ptr();
    a.num_timesteps = coefs.size(0);
  }

  static void run_q_sample(QSampleArgs& a, const Batch& batch, const Tensor& x0) {
    a.samples = batch.samples();
    a.elements = batch.elements();
    if (a.samples > 0 && a.elements > 0) Launch::q_sample(a, x0);
  }

  static Tensor q_sample(const Tensor x0, const Tensor t, const Tensor noise, const Tensor coefs) {
    Tensor x_t = torch::stable::empty_like(x0);
    const Batch batch(x_t, /*channels_last=*/false);
    QSampleArgs a{};
    fill_q_sample(a, x0, t, coefs);
    a.x0 = batch.view(x0, "x0");
    a.noise = batch.view(noise, "noise");
    a.x_t = batch.view(x_t, "x_t");
    run_q_sample(a, batch, x0);
    return x_t;
  }

  static std::tuple<Tensor, Tensor> q_sample_philox(const Tensor x0, const Tensor t,
                                                    const Tensor coefs, const Tensor rng) {
    Tensor x_t = torch::stable::empty_like(x0);
    Tensor noise = torch::stable::empty_like(x0);
    const Batch batch(x_t, /*channels_last=*/true);
    QSampleArgs a{};
    fill_q_sample(a, x0, t, coefs);
    a.x0 = batch.view(x0, "x0");
    a.noise = batch.view(noise, "noise");
    a.x_t = batch.view(x_t, "x_t");
    a.rng = rng_of(rng, x0);
    run_q_sample(a, batch, x0);
    return {x_t, noise};
  }

  static std::tuple<Tensor, Tensor, Tensor> q_posterior(const Tensor x0, const Tensor x_t,
                                                        const Tensor t, const Tensor coefs) {
    Tensor mean = torch::stable::empty_like(x_t);
    const Batch batch(mean, /*channels_last=*/false);
    std::vector<int64_t> per_sample(static_cast<size_t>(x_t.dim()), 1);
    per_sample[0] = batch.samples();
    Tensor variance = torch::stable::new_empty(coefs, per_sample);
    Tensor log_variance = torch::stable::new_empty(coefs, per_sample);
    check_coefs(coefs, 4, x_t, "coefs");
    check_index(t, x_t, "t");
    QPosteriorArgs a{};
    a.samples = batch.samples();
    a.elements = batch.elements();
    a.x0 = batch.view(x0, "x0");
    a.x_t = batch.view(x_t, "x_t");
    a.mean = batch.view(mean, "mean");
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.t_stride = t.stride(0);
    a.coefs = coefs.data_ptr();
    a.num_timesteps = coefs.size(0);
    a.variance = variance.data_ptr();
    a.log_variance = log_variance.data_ptr();
    if (a.samples > 0) Launch::q_posterior(a, x_t);
    return {mean, variance, log_variance};
  }

  static void fill_history(ReverseStepArgs& a, const Batch& batch, const Tensor& history,
                           const Tensor& x) {
    check_dtype(history, x, "history");
    check_written(history, "history");
    STD_TORCH_CHECK(history.dim() == x.dim() + 1 && history.size(0) <= kDeepest &&
                        history.size(0) >= std::max(1, history_depth(a.flags)),
                    "history must be [depth, ...], the shape of the state in each of ",
                    history_depth(a.flags), " to ", kDeepest, " slots");
    a.history = batch.view_of_slot(history, "history");
    a.slot_stride = history.stride(0);
    a.depth = history.size(0);
  }

  // Fills the inputs of a step other than the state x.
  static void fill_step(ReverseStepArgs& a, const Batch& batch, const Tensor& x,
                        const Tensor& model_output, const Tensor& rows, const Tensor& step,
                        const std::optional<Tensor>& noise, int64_t flags,
                        const std::optional<Tensor>& log_variance,
                        const std::optional<Tensor>& threshold) {
    check_coefs(rows, kRowWidth, x, "rows");
    check_index(step, x, "step");
    check_flagged(log_variance, flags & kLearned, "log_variance");
    check_flagged(threshold, flags & kThreshold, "threshold");
    a.samples = batch.samples();
    a.elements = batch.elements();
    a.out = batch.view(model_output, "model_output");
    a.noise = batch.view(noise, "noise");
    a.rows = rows.data_ptr();
    a.num_rows = rows.size(0);
    a.step = static_cast<const int64_t*>(step.data_ptr());
    a.step_stride = step.stride(0);
    a.flags = flags;
    a.log_variance = batch.view(log_variance, "log_variance");
    if (threshold) {
      check_threshold(*threshold, x);
      a.threshold = threshold->data_ptr();
      a.threshold_stride = threshold->stride(0);
    }
  }

  static void reverse_step_(
      const Tensor x, const Tensor model_output, const Tensor rows, const Tensor step,
      const std::optional<Tensor> noise, const std::optional<Tensor> rng,
      const std::optional<Tensor> model_input, const std::optional<Tensor> pred_x0, int64_t flags,
      const std::optional<Tensor> model_output2, const std::optional<Tensor> log_variance,
      const std::optional<Tensor> threshold, const std::optional<Tensor> second,
      const std::optional<Tensor> history) {
    STD_TORCH_CHECK(!(noise && rng), "noise and rng must not both be given");
    STD_TORCH_CHECK((flags & ~int64_t{kKnownFlags}) == 0, "flags ", flags,
                    " has a term that this build has no kernel for");
    const Batch batch(x, /*channels_last=*/rng.has_value());
    ReverseStepArgs a{};
    fill_step(a, batch, x, model_output, rows, step, noise, flags, log_variance, threshold);
    a.x = batch.written(x, "x");
    a.model_input = batch.written(model_input, "model_input");
    a.pred_x0 = batch.written(pred_x0, "pred_x0");
    if (rng) a.rng = rng_of(*rng, x);
    check_flagged(model_output2, flags & kGuide, "model_output2");
    check_flagged(second, flags & kSecond, "second");
    check_flagged(history, flags & kRing, "history");
    a.out2 = batch.view(model_output2, "model_output2");
    if (second) {
      check_dtype(*second, x, "second");
      a.second = batch.written(*second, "second");
    }
    if (history) fill_history(a, batch, *history, x);
    if (a.samples > 0 && a.elements > 0) Launch::reverse_step(a, x);
  }

  static std::tuple<Tensor, Tensor> reverse_step(const Tensor x, const Tensor model_output,
                                                 const Tensor rows, const Tensor step,
                                                 const std::optional<Tensor> noise, int64_t flags,
                                                 const std::optional<Tensor> log_variance,
                                                 const std::optional<Tensor> threshold) {
    STD_TORCH_CHECK((flags & ~kFunctionalFlags) == 0, "flags ", flags,
                    " has a term that only reverse_step_ has; reverse_step has ", kFunctionalFlags,
                    ": CLIP, RAW_OUT, LEARNED and THRESHOLD");
    Tensor next = torch::stable::empty_like(x);
    Tensor pred_x0 = torch::stable::empty_like(x);
    const Batch batch(next, /*channels_last=*/false);
    ReverseStepArgs a{};
    fill_step(a, batch, x, model_output, rows, step, noise, flags, log_variance, threshold);
    a.source = batch.view(x, "x");
    a.x = batch.view(next, "x");
    a.pred_x0 = batch.view(pred_x0, "pred_x0");
    if (a.samples > 0 && a.elements > 0) Launch::reverse_step(a, x);
    return {next, pred_x0};
  }

  static void philox_normal_(const Tensor out, const Tensor rng) {
    const Batch batch(out, /*channels_last=*/true);
    PhiloxNormalArgs a{};
    a.samples = batch.samples();
    a.elements = batch.elements();
    a.out = batch.written(out, "out");
    a.rng = rng_of(rng, out);
    if (a.samples > 0 && a.elements > 0) Launch::philox_normal(a, out);
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("q_sample", TORCH_BOX(&q_sample));
    library.impl("q_sample_philox", TORCH_BOX(&q_sample_philox));
    library.impl("q_posterior", TORCH_BOX(&q_posterior));
    library.impl("reverse_step_", TORCH_BOX(&reverse_step_));
    library.impl("reverse_step", TORCH_BOX(&reverse_step));
    library.impl("philox_normal_", TORCH_BOX(&philox_normal_));
  }
};

}  // namespace ddpm
