// Memory layout of a sample's elements, as the kernels see a tensor.
//
// All tensors of an operation are iterated in one order. If the operation generates noise, that is
// channels-last (every spatial dimension, then the channel), the order in which noise is numbered.
// Otherwise it is the memory order of the updated tensor, which makes that tensor linear.
#pragma once

#include "core/macros.h"

namespace ddpm {

enum class DType : int32_t { f16, bf16, f32, f64 };

constexpr int kMaxDims = 16;  // most dimensions of a sample after merging

// One tensor [samples, ...]: sizes and strides (in elements) of the dimensions of one sample,
// outermost first in iteration order. Neighbouring dimensions are merged where one stride covers
// both.
struct View {
  void* data;
  int64_t sample_stride;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  DType dtype;
  int32_t ndim;
  bool linear;  // element e of a sample has offset e
};

DDPM_HD int64_t offset_in_sample(const View& view, int64_t element) {
  if (view.linear) return element;
  int64_t offset = 0;
  for (int d = view.ndim - 1; d > 0; --d) {
    const int64_t size = view.sizes[d];
    const int64_t quotient = element / size;
    offset += (element - quotient * size) * view.strides[d];
    element = quotient;
  }
  return view.ndim > 0 ? offset + element * view.strides[0] : 0;
}

// Dimension of the tensor (1 .. ndim - 1) at each depth of the iteration, outermost first.
struct WalkOrder {
  int dims[64];
  int count;
};

// [N, C, d1, d2, ...] is iterated in the order d1, d2, ..., C.
inline WalkOrder channels_last_order(int ndim) {
  WalkOrder order{};
  for (int d = 2; d < ndim; ++d) order.dims[order.count++] = d;
  if (ndim > 1) order.dims[order.count++] = 1;
  return order;
}

// Dimensions by decreasing stride: the order in memory.
inline WalkOrder memory_order(int ndim, const int64_t* sizes, const int64_t* strides) {
  WalkOrder order{};
  for (int d = 1; d < ndim; ++d) {
    if (sizes[d] == 1) continue;
    int at = order.count++;
    while (at > 0 && strides[order.dims[at - 1]] < strides[d]) {
      order.dims[at] = order.dims[at - 1];
      --at;
    }
    order.dims[at] = d;
  }
  return order;
}

// Returns false if more than kMaxDims dimensions remain after merging.
inline bool make_view(View* view, void* data, DType dtype, int ndim, const int64_t* sizes,
                      const int64_t* strides, const WalkOrder& order) {
  view->data = data;
  view->dtype = dtype;
  view->sample_stride = ndim > 0 ? strides[0] : 0;
  view->ndim = 0;
  for (int i = 0; i < order.count; ++i) {
    const int64_t size = sizes[order.dims[i]];
    const int64_t stride = strides[order.dims[i]];
    if (size == 1) continue;
    int& n = view->ndim;
    if (n > 0 && view->strides[n - 1] == size * stride) {
      view->sizes[n - 1] *= size;
      view->strides[n - 1] = stride;
    } else {
      if (n == kMaxDims) return false;
      view->sizes[n] = size;
      view->strides[n] = stride;
      ++n;
    }
  }
  view->linear = view->ndim == 0 || (view->ndim == 1 && view->strides[0] == 1);
  return true;
}

}  // namespace ddpm
