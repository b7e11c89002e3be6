// Tensors [N, C, d1, d2, ...] of any dtype and layout, as arguments of the kernels.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/half.h"
#include "core/tensor_view.h"
#include "random.h"

namespace ddpm::test {

using Sizes = std::vector<int64_t>;

enum class Layout {
  contiguous,
  channels_last,
  permuted,       // dense, dimensions permuted
  sliced,         // part of a larger tensor in every dimension
  padded,         // gaps between samples, each dense
  expanded,       // one sample for all, stride 0
  broadcast,      // one pixel for the whole sample, stride 0
  unaligned,      // dense, one element after an aligned address
  channel_slice,  // channels-last, first or second half of the channels of a larger tensor
};

constexpr Layout kLayouts[] = {Layout::contiguous, Layout::channels_last, Layout::permuted,
                               Layout::sliced,     Layout::padded,        Layout::expanded,
                               Layout::broadcast,  Layout::unaligned,     Layout::channel_slice};

inline Layout random_layout(Random& random) {
  return kLayouts[random.below(sizeof kLayouts / sizeof *kLayouts)];
}

// True if every element has its own memory.
inline bool writable(Layout layout) {
  return layout != Layout::expanded && layout != Layout::broadcast;
}

inline int64_t product(const Sizes& sizes, size_t first = 0) {
  int64_t result = 1;
  for (size_t d = first; d < sizes.size(); ++d) result *= sizes[d];
  return result;
}

inline size_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"f16", "bf16", "f32", "f64"};
  return kNames[static_cast<int>(dtype)];
}

class TestTensor {
 public:
  TestTensor() = default;

  TestTensor(DType dtype, Sizes sizes, Layout layout, Random& random)
      : dtype_(dtype), sizes_(std::move(sizes)) {
    const int ndim = static_cast<int>(sizes_.size());
    Sizes outer = sizes_;    // allocated sizes
    std::vector<int> order;  // dimensions in memory order, outermost first
    for (int d = 0; d < ndim; ++d) order.push_back(d);
    const bool channel_slice = layout == Layout::channel_slice && ndim > 2;
    if ((layout == Layout::channels_last || channel_slice) && ndim > 2) {
      order.erase(order.begin() + 1);
      order.push_back(1);
    }
    if (layout == Layout::permuted) {
      for (int d = ndim - 1; d > 0; --d) std::swap(order[d], order[random.below(d + 1)]);
    }
    if (layout == Layout::sliced) {
      for (int64_t& size : outer) size += 1 + random.below(3);
    }
    if (channel_slice) outer[1] *= 2;
    strides_.assign(sizes_.size(), 0);
    int64_t count = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const int d = order[i];
      if ((layout == Layout::expanded && d == 0) || (layout == Layout::broadcast && d > 1))
        continue;
      if (layout == Layout::padded && d == 0) count += random.coin() ? 8 : 1 + random.below(3);
      strides_[d] = count;
      count *= outer[d];
    }
    offset_ = layout == Layout::unaligned ? 1 : channel_slice && random.coin() ? sizes_[1] : 0;
    if (layout == Layout::sliced) {
      for (int d = 0; d < ndim; ++d) offset_ += (outer[d] - sizes_[d]) * strides_[d];
    }
    // For a channel slice, `count` includes the offset.
    bytes_ = static_cast<size_t>(count + (channel_slice ? 0 : offset_)) * bytes_of(dtype);
    allocate();
    std::memset(memory_.get(), 0xCD, bytes_);
  }

  TestTensor(const TestTensor& other) { *this = other; }
  TestTensor& operator=(const TestTensor& other) {
    dtype_ = other.dtype_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    offset_ = other.offset_;
    bytes_ = other.bytes_;
    if (other.exists()) {
      allocate();
      std::memcpy(memory_.get(), other.memory_.get(), bytes_);
    }
    return *this;
  }

  bool exists() const { return memory_ != nullptr; }
  DType dtype() const { return dtype_; }
  const Sizes& sizes() const { return sizes_; }
  const Sizes& strides() const { return strides_; }
  int ndim() const { return static_cast<int>(sizes_.size()); }

  View view(const WalkOrder& order) const {
    View view{};
    if (exists()) {
      make_view(&view, at(0), dtype_, ndim(), sizes_.data(), strides_.data(), order);
    }
    return view;
  }

  void* data() const { return exists() ? at(0) : nullptr; }

  // Position of the element at a multi-index.
  int64_t position(const Sizes& index) const {
    int64_t position = 0;
    for (size_t d = 0; d < index.size(); ++d) position += index[d] * strides_[d];
    return position;
  }

  double get(const Sizes& index) const {
    const void* from = at(position(index));
    switch (dtype_) {
      case DType::f16:
        return static_cast<double>(to_float(*static_cast<const half_t*>(from)));
      case DType::bf16:
        return static_cast<double>(to_float(*static_cast<const bfloat16_t*>(from)));
      case DType::f32:
        return static_cast<double>(*static_cast<const float*>(from));
      default:
        return *static_cast<const double*>(from);
    }
  }

  void set(const Sizes& index, double value) {
    void* to = at(position(index));
    switch (dtype_) {
      case DType::f16:
        *static_cast<half_t*>(to) = to_half(static_cast<float>(value));
        break;
      case DType::bf16:
        *static_cast<bfloat16_t*>(to) = to_bfloat16(static_cast<float>(value));
        break;
      case DType::f32:
        *static_cast<float*>(to) = static_cast<float>(value);
        break;
      default:
        *static_cast<double*>(to) = value;
    }
  }

  template <class Visit>
  void each(Visit visit) const {
    if (product(sizes_) == 0) return;
    Sizes index(sizes_.size(), 0);
    for (;;) {
      visit(index);
      size_t d = sizes_.size();
      while (d > 0 && ++index[d - 1] == sizes_[d - 1]) index[--d] = 0;
      if (d == 0) return;
    }
  }

  void fill(Random& random, double limit) {
    each([&](const Sizes& index) { set(index, random.symmetric(limit)); });
  }

  // Compares the whole allocation, including the gaps between elements.
  bool same_memory(const TestTensor& other) const {
    return bytes_ == other.bytes_ &&
           (!exists() || !std::memcmp(memory_.get(), other.memory_.get(), bytes_));
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };

  // Allocates the exact number of bytes, so that a sanitizer detects any access beyond them.
  void allocate() {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes_ > 0 ? bytes_ : 1)) std::abort();
    memory_.reset(static_cast<unsigned char*>(memory));
  }

  void* at(int64_t element) const {
    return memory_.get() + (offset_ + element) * static_cast<int64_t>(bytes_of(dtype_));
  }

  DType dtype_ = DType::f32;
  Sizes sizes_, strides_;
  int64_t offset_ = 0;
  size_t bytes_ = 0;
  std::unique_ptr<unsigned char, Free> memory_;
};

}  // namespace ddpm::test
