// Launch plan of group_norm_, computed on the host.
#pragma once

#include "core/args.h"

namespace ddpm {

// Properties of a GPU that the plan depends on.
struct NormDevice {
  int multiprocessors;
  uint32_t max_cluster_bits;  // clusters have at most 2^this blocks: 3, or 0 before sm_90
};

// Most threads of a block: with as many held vectors as possible, and otherwise.
constexpr uint32_t kNormThreads = 1024, kNormFewThreads = 512;
constexpr uint32_t kNormColumns = 256;        // most vectors of a pixel's slab
constexpr uint32_t kNormWanted = 256;         // preferred number of threads
constexpr uint32_t kNormSharedBytes = 48000;  // most shared memory of a block
constexpr uint32_t kNormStreamed = 4;         // vectors per thread and chunk if they are not held

// A slab is some whole groups of one image. A cluster of blocks processes one slab; each block has
// a share of the pixels. A thread processes one 16-byte vector of a pixel's slab (a column), in
// several pixels.
struct NormPlan {
  bool vectorized;        // false: element by element, for any strides
  bool stream;            // values do not fit in registers and are read again in each pass
  uint32_t slab;          // channels
  uint32_t unit;          // channels of a vector summed together, all in one group
  uint32_t columns;       // vectors of a pixel's slab
  uint32_t rows;          // pixels processed at once
  uint32_t held;          // vectors per thread and chunk: 1, 2, 4 or 8
  uint32_t threads;       // columns * rows, rounded up to whole warps
  uint32_t cluster_bits;  // log2 of the cluster size: 0 .. 3
  uint32_t share;         // pixels per block
  uint32_t writers;       // partial sums per unit: one per warp or one per row
  bool shuffled;          // the rows of a warp are summed by shuffles
  uint32_t shared_bytes;

  DDPM_HD uint32_t cluster() const { return 1u << cluster_bits; }
};

inline uint32_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline int64_t greatest_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t remainder = a % b;
    a = b;
    b = remainder;
  }
  return a;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// True for dense channels-last maps in which every 16-byte vector is aligned.
inline bool is_vectorizable(const Map& map, int64_t channels, const GroupNormArgs& a) {
  if (map.data == nullptr) return true;
  const int64_t values = 16 / element_bytes(a.dtype);
  const bool dense = (a.width == 1 || a.height == 1 || map.row == a.width * map.column) &&
                     map.channel == 1 && channels % values == 0;
  const int64_t pixel = a.width == 1 ? map.row : map.column;
  return dense && (a.samples == 1 || map.sample % values == 0) &&
         (a.pixels() == 1 || pixel % values == 0) &&
         reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
}

// Layout of the shared memory, in floats: four constants per channel, two totals per group and
// block, and the partial sums. The rows of partial sums have an odd stride, to avoid bank
// conflicts.
struct NormShared {
  uint32_t gain, offset, vector, shift, totals, partials, end;
  uint32_t groups, units;

  DDPM_HD NormShared(const NormPlan& plan, uint32_t group_size)
      : gain(0),
        offset(plan.slab),
        vector(2 * plan.slab),
        shift(3 * plan.slab),
        totals(4 * plan.slab),
        groups(plan.slab / group_size),
        units(plan.slab / plan.unit) {
    partials = totals + 2 * plan.cluster() * groups;
    end = partials + plan.writers * partial_stride();
  }
  DDPM_HD uint32_t partial_stride() const { return units | 1; }
  DDPM_HD uint32_t total(uint32_t pass, uint32_t cluster, uint32_t rank, uint32_t group) const {
    return totals + (pass * cluster + rank) * groups + group;
  }
};

// True if the threads hold the float32 sum, otherwise they hold x as loaded. A vector alone is
// added to 16-bit values when they are used. To float32 it is added once, so that equal values stay
// equal.
inline bool keeps_sum(const GroupNormArgs& a) {
  return a.residual.data != nullptr || a.total.data != nullptr ||
         (a.dtype == DType::f32 && a.vector.data != nullptr);
}

// Most vectors held by a thread: 32 registers, so that a block can have 1024 threads; half as many
// while the two maps of a sum are loaded.
constexpr uint32_t kMostHeld = 8, kMostHeldSum = 4;

inline uint32_t most_held(const GroupNormArgs& a) {
  return keeps_sum(a) ? kMostHeldSum : kMostHeld;
}

// Fills the plan for slabs of `slab` channels and a cluster size; returns false if it is not
// possible.
inline bool plan_slab(const GroupNormArgs& a, int64_t slab, uint32_t cluster_bits, NormPlan* plan) {
  const int64_t values = 16 / element_bytes(a.dtype);
  const int64_t columns = slab / values;
  if (columns > kNormColumns) return false;
  const uint32_t most = most_held(a);
  const int64_t share = ceil_div(a.pixels(), int64_t{1} << cluster_bits);
  static_assert(kNormWanted + kNormColumns <= kNormFewThreads);
  uint32_t held = 1;
  while (held < most && share * columns > held * kNormWanted) held *= 2;
  int64_t rows = ceil_div(share, held);
  plan->stream = rows > kNormThreads / columns;
  if (plan->stream) {
    held = kNormStreamed;
    rows = kNormFewThreads / columns;
  }
  plan->vectorized = true;
  plan->slab = static_cast<uint32_t>(slab);
  plan->unit = static_cast<uint32_t>(greatest_divisor(a.group_size(), values));
  plan->columns = static_cast<uint32_t>(columns);
  plan->rows = static_cast<uint32_t>(rows);
  plan->held = held;
  plan->threads = static_cast<uint32_t>(ceil_div(columns * rows, 32) * 32);
  plan->cluster_bits = cluster_bits;
  plan->share = static_cast<uint32_t>(share);
  plan->shuffled = columns <= 32 && 32 % columns == 0;
  plan->writers = plan->shuffled ? plan->threads / 32 : plan->rows;
  plan->shared_bytes = 4 * NormShared(*plan, static_cast<uint32_t>(a.group_size())).end;
  return plan->shared_bytes <= kNormSharedBytes;
}

// Chooses the slab and the cluster size. The numbers here and above are guesses, not tuned on a
// GPU. Slabs have 64 bytes per pixel if that leaves two blocks per multiprocessor, otherwise they
// are as small as possible. Clusters grow if the values do not fit in the registers of one block,
// or if multiprocessors would be idle and each block still has 512 vectors.
inline NormPlan choose_group_norm(const GroupNormArgs& a, const NormDevice& device) {
  NormPlan plan{};
  const bool vectors = is_vectorizable(a.x, a.first, a) && is_vectorizable(a.x2, a.second, a) &&
                       is_vectorizable(a.out, a.channels(), a) &&
                       is_vectorizable(a.residual, a.first, a) &&
                       is_vectorizable(a.total, a.first, a) && a.pixels() < (int64_t{1} << 30);
  if (!vectors) return plan;
  const int64_t values = 16 / element_bytes(a.dtype);
  const int64_t smallest =
      a.group_size() / greatest_divisor(a.group_size(), values) * values;  // least common multiple
  const int64_t slabs = a.channels() / smallest;
  const int64_t wide = 64 / element_bytes(a.dtype);
  NormPlan best{};
  for (int64_t times = 1; times <= slabs; ++times) {
    const int64_t slab = times * smallest;
    if (slabs % times != 0) continue;
    const int64_t count = a.samples * (slabs / times);
    if (times > 1 && count < 2 * device.multiprocessors) break;
    if (!plan_slab(a, slab, 0, &plan)) continue;
    const auto larger = [&] {
      NormPlan next{};
      if (plan.cluster_bits == device.max_cluster_bits ||
          !plan_slab(a, slab, plan.cluster_bits + 1, &next)) {
        return false;
      }
      plan = next;
      return true;
    };
    while (plan.stream && larger()) {
    }
    while (count * plan.cluster() < device.multiprocessors &&
           ceil_div(a.pixels(), 2 * plan.cluster()) * plan.columns >= 512 && larger()) {
    }
    if (times > 1 && plan.stream && !best.stream) break;
    best = plan;
    if (slab >= wide) break;
  }
  return best;
}

}  // namespace ddpm
