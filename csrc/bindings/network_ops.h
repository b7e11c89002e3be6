// The operator group_norm_ of the U-Net, for every device.
//
// As in diffusion_ops.h, the checks only prevent a direct call from accessing memory outside its
// tensors.
#pragma once

#include "bindings/diffusion_ops.h"

namespace ddpm {

inline Map map_of(const Tensor& tensor, const Tensor& out, int64_t channels, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == out.size(0) &&
                      tensor.size(1) == channels && tensor.size(2) == out.size(2) &&
                      tensor.size(3) == out.size(3),
                  name, " must be [N, C, H, W] with the samples and the pixels of out, and ",
                  channels, " channels");
  STD_TORCH_CHECK(tensor.scalar_type() == out.scalar_type(), name, " must have the dtype of out");
  STD_TORCH_CHECK(same_device(tensor, out), name, " must be on the device of out");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

inline Map map_of(const std::optional<Tensor>& tensor, const Tensor& out, int64_t channels,
                  const char* name) {
  return tensor ? map_of(*tensor, out, channels, name) : Map{};
}

inline SampleTable table_of(const std::optional<Tensor>& table, const Tensor& out, int64_t width,
                            const char* name) {
  if (!table) return {};
  const bool wide = out.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(table->dim() == 2 && table->size(0) > 0 && table->size(1) == width &&
                      table->stride(1) == 1 && same_device(*table, out),
                  name, " must be [rows, ", width,
                  "] with at least one row, stride 1 in its rows, on out's device");
  STD_TORCH_CHECK(table->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name,
                  " must be ", wide ? "float64" : "float32");
  return {table->data_ptr(), table->stride(0), table->size(0)};
}

inline const void* parameter_of(const Tensor& values, const Tensor& weight, const Tensor& out,
                                const char* name) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == out.size(1) && values.is_contiguous() &&
                      same_device(values, out),
                  name, " must be a contiguous [", out.size(1), "] on the device of out");
  const ScalarType dtype = values.scalar_type();
  const bool wide = dtype == ScalarType::Float && out.scalar_type() != ScalarType::Double;
  STD_TORCH_CHECK((dtype == out.scalar_type() || wide) && dtype == weight.scalar_type(), name,
                  " must have the dtype of out or float32, and weight and bias the same");
  return values.data_ptr();
}

template <class Launch>
struct NetworkOps {
  static void group_norm_(const Tensor out, const Tensor x, const std::optional<Tensor> x2,
                          const std::optional<Tensor> vector, const std::optional<Tensor> row,
                          const std::optional<Tensor> residual, const std::optional<Tensor> total,
                          const Tensor weight, const Tensor bias,
                          const std::optional<Tensor> modulation, int64_t groups, double eps,
                          bool silu) {
    STD_TORCH_CHECK(out.dim() == 4 && x.dim() == 4 && (!x2 || x2->dim() == 4),
                    "out, x and x2 must be [N, C, H, W]");
    STD_TORCH_CHECK(!x2 || (!residual && !total),
                    "residual and total must be None with two sources; got a tensor");
    GroupNormArgs a{};
    a.samples = out.size(0);
    a.height = out.size(2);
    a.width = out.size(3);
    a.first = x.size(1);
    a.second = x2 ? x2->size(1) : 0;
    a.groups = groups;
    STD_TORCH_CHECK(groups > 0 && a.channels() % groups == 0, "groups must divide the ",
                    a.channels(), " channels of the sources; got ", groups);
    a.dtype = dtype_of(out, "out");
    a.parameters = dtype_of(weight, "weight");
    check_written(out, "out");
    if (total) check_written(*total, "total");
    a.out = map_of(out, out, a.channels(), "out");
    a.x = map_of(x, out, a.first, "x");
    a.x2 = map_of(x2, out, a.second, "x2");
    a.residual = map_of(residual, out, a.first, "residual");
    a.total = map_of(total, out, a.first, "total");
    a.vector = table_of(vector, out, a.channels(), "vector");
    a.modulation = table_of(modulation, out, 2 * a.channels(), "modulation");
    if (row) {
      check_index(*row, out, "row");
      a.row = static_cast<const int64_t*>(row->data_ptr());
      a.row_stride = row->stride(0);
    }
    a.weight = parameter_of(weight, weight, out, "weight");
    a.bias = parameter_of(bias, weight, out, "bias");
    a.eps = eps;
    a.silu = silu;
    if (a.samples > 0 && a.channels() > 0 && a.pixels() > 0) Launch::group_norm(a, out);
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("group_norm_", TORCH_BOX(&group_norm_));
  }
};

}  // namespace ddpm
