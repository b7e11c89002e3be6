// Views of tensors in any layout against the sum of index times stride.
#include "check.h"
#include "core/tensor_view.h"
#include "tensors.h"

namespace ddpm::test {
namespace {

// Offsets of the elements of a sample in iteration order, one index at a time.
std::vector<int64_t> plain_offsets(const Sizes& sizes, const Sizes& strides,
                                   const WalkOrder& order) {
  std::vector<int64_t> offsets{0};
  for (int i = 0; i < order.count; ++i) {
    const size_t d = static_cast<size_t>(order.dims[i]);
    std::vector<int64_t> next;
    for (int64_t offset : offsets) {
      for (int64_t k = 0; k < sizes[d]; ++k) next.push_back(offset + k * strides[d]);
    }
    offsets = next;
  }
  return offsets;
}

void check_view(const TestTensor& tensor, const WalkOrder& order) {
  const View view = tensor.view(order);
  const std::vector<int64_t> offsets = plain_offsets(tensor.sizes(), tensor.strides(), order);
  CHECK(view.sample_stride == tensor.strides()[0]);
  bool linear = true;
  for (size_t e = 0; e < offsets.size(); ++e) {
    const int64_t got = offset_in_sample(view, static_cast<int64_t>(e));
    CHECK(got == offsets[e], got, offsets[e], view.ndim);
    linear = linear && offsets[e] == static_cast<int64_t>(e);
  }
  CHECK(view.linear == linear, view.ndim);
  for (int d = 1; d < view.ndim; ++d) {
    CHECK(view.strides[d - 1] != view.sizes[d] * view.strides[d], d);  // nothing left to merge
  }
}

void views_equal_plain_indexing() {
  Random random(2);
  for (int trial = 0; trial < 2000; ++trial) {
    Sizes sizes;
    const int64_t ndim = 1 + random.below(5);
    for (int64_t d = 0; d < ndim; ++d) sizes.push_back(1 + random.below(5));
    const Layout layout = random_layout(random);
    const TestTensor tensor(DType::f16, sizes, layout, random);
    const int n = tensor.ndim();
    check_view(tensor, channels_last_order(n));
    check_view(tensor, memory_order(n, tensor.sizes().data(), tensor.strides().data()));
  }
}

void dense_tensors_are_linear_in_memory_order() {
  Random random(3);
  for (Layout layout : {Layout::contiguous, Layout::channels_last, Layout::padded, Layout::expanded,
                        Layout::unaligned}) {
    for (const Sizes& sizes : {Sizes{2, 3, 5, 7}, Sizes{4, 6}, Sizes{5}, Sizes{1, 1, 4, 1, 3}}) {
      const TestTensor tensor(DType::f32, sizes, layout, random);
      const int n = tensor.ndim();
      const View view =
          tensor.view(memory_order(n, tensor.sizes().data(), tensor.strides().data()));
      CHECK(view.linear, static_cast<int>(layout), n);
      CHECK(view.ndim <= 1, view.ndim);
    }
  }
}

void channels_last_walks_the_channel_innermost() {
  Random random(4);
  const Sizes sizes{2, 3, 4, 5};
  const WalkOrder order = channels_last_order(4);
  const View last = TestTensor(DType::f32, sizes, Layout::channels_last, random).view(order);
  CHECK(last.linear);
  const View first = TestTensor(DType::f32, sizes, Layout::contiguous, random).view(order);
  CHECK(!first.linear && first.ndim == 2, first.ndim);
  CHECK(first.sizes[0] == 20 && first.sizes[1] == 3);
  CHECK(first.strides[0] == 1 && first.strides[1] == 20);
}

void too_many_dimensions_are_refused() {
  for (int dims : {kMaxDims, kMaxDims + 1}) {
    Sizes sizes(static_cast<size_t>(dims + 1), 2), strides(sizes.size());
    int64_t stride = 1;
    for (int d = dims; d >= 0; --d, stride *= 3) strides[static_cast<size_t>(d)] = stride;
    const WalkOrder order = memory_order(dims + 1, sizes.data(), strides.data());
    View view{};
    const bool fits =
        make_view(&view, nullptr, DType::f32, dims + 1, sizes.data(), strides.data(), order);
    CHECK(fits == (dims <= kMaxDims), dims);
  }
}

// Offsets beyond 2^31 in every dimension.
void offsets_have_64_bits() {
  const int64_t big = int64_t{1} << 33;
  const Sizes sizes{2, 3, 5, 7}, strides{4 * big, big + 1, 3 * big, 7};
  View view{};
  make_view(&view, nullptr, DType::f32, 4, sizes.data(), strides.data(), channels_last_order(4));
  const std::vector<int64_t> offsets = plain_offsets(sizes, strides, channels_last_order(4));
  for (size_t e = 0; e < offsets.size(); ++e) {
    CHECK(offset_in_sample(view, static_cast<int64_t>(e)) == offsets[e], e);
  }
  // Elements beyond 2^32.
  const Sizes line{1, 3 * big}, pairs{6 * big, 2};
  make_view(&view, nullptr, DType::f32, 2, line.data(), pairs.data(), channels_last_order(2));
  CHECK(offset_in_sample(view, 3 * big - 1) == 6 * big - 2);
  const Sizes planes{1, 3, big}, apart{6 * big, 2 * big, 1};
  make_view(&view, nullptr, DType::f32, 3, planes.data(), apart.data(), channels_last_order(3));
  CHECK(offset_in_sample(view, 3 * big - 1) == 5 * big - 1);
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(views_equal_plain_indexing, dense_tensors_are_linear_in_memory_order,
             channels_last_walks_the_channel_innermost, too_many_dimensions_are_refused,
             offsets_have_64_bits);
}
