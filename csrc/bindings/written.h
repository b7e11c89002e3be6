// Check of a tensor that an operator writes: no two of its elements share memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace ddpm {

// True if two elements have the same address. Tensors of many elements in an unusual order of
// strides are assumed to.
inline bool overlaps_itself(const torch::stable::Tensor& tensor) {
  constexpr int64_t kMostCompared = 1 << 24;
  if (tensor.is_contiguous() || tensor.numel() == 0) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  bool apart = true;  // no index of a dimension is within reach of the smaller ones
  for (const auto& [stride, size] : dims) {
    apart = apart && stride > reach;
    reach += (size - 1) * stride;
  }
  if (apart || tensor.numel() > kMostCompared) return !apart;
  std::vector<int64_t> offsets{0};
  for (const auto& [stride, size] : dims) {
    const size_t count = offsets.size();
    offsets.reserve(count * static_cast<size_t>(size));
    for (int64_t i = 1; i < size; ++i) {
      for (size_t k = 0; k < count; ++k) offsets.push_back(offsets[k] + i * stride);
    }
  }
  std::sort(offsets.begin(), offsets.end());
  return std::adjacent_find(offsets.begin(), offsets.end()) != offsets.end();
}

inline void check_written(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(!overlaps_itself(tensor), name,
                  " is written in place and its elements must not share memory");
}

}  // namespace ddpm
