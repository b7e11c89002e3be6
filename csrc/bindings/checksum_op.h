// The operator checksum, for every device.
#pragma once

#include "bindings/diffusion_ops.h"
#include "core/checksum.h"

namespace ddpm {

// The bytes from the first to the last element of a tensor in memory.
inline ChecksumArgs bytes_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, 0};
  int64_t elements = 1;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) elements += (sizes[d] - 1) * strides[d];
  return {tensor.data_ptr(), elements * static_cast<int64_t>(tensor.element_size())};
}

template <class Launch>
struct ChecksumOp {
  static Tensor checksum(const std::vector<Tensor> tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "tensors must not be empty");
    std::vector<ChecksumArgs> args;
    args.reserve(tensors.size());
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(same_device(tensor, tensors[0]), "tensors must be on one device");
      args.push_back(bytes_of(tensor));
    }
    const int64_t sizes[] = {static_cast<int64_t>(tensors.size()), 2};
    const Tensor out = torch::stable::new_zeros(tensors[0], {sizes, 2}, ScalarType::Long);
    static_assert(sizeof(Checksum) == 16);
    Launch::checksum(args, static_cast<Checksum*>(out.data_ptr()), out);
    return out;
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("checksum", TORCH_BOX(&checksum));
  }
};

}  // namespace ddpm
