// Mapping of threads to elements, and the launch configuration.
//
// The unit is a Vec4: four consecutive elements of a sample, which are one Philox block and 16
// bytes of float32.
#pragma once

#include "core/macros.h"

// Unrolls a loop over an array in registers, which must be indexed by constants.
#if defined(__CUDA_ARCH__)
#define DDPM_UNROLL _Pragma("unroll")
#else
#define DDPM_UNROLL
#endif

namespace ddpm {

constexpr uint32_t kThreads = 128;  // per block

// Most Vec4s of a sample that 32-bit indices and the Philox counter can address.
constexpr int64_t kMaxVec4s = 0xFFFF0000;

struct Blocks {
  int64_t x, y, z;
};

struct BlockIndex {
  uint32_t x, y, z;
  uint32_t blocks_y;
};

// Position of a thread: Vec4 `first` of a sample and, with a stride of kThreads, those after it.
struct Position {
  int64_t sample;
  uint32_t first;

  DDPM_HD uint32_t vec4(int i) const { return first + static_cast<uint32_t>(i) * kThreads; }
};

struct Grid {
  int64_t samples;
  int64_t elements;  // per sample
  uint32_t vec4s;    // per sample

  DDPM_HD bool has(const Position& position, int i) const { return position.vec4(i) < vec4s; }
};

inline int64_t vec4s_of(int64_t elements) {
  return (elements + 3) / 4;
}

inline Grid make_grid(int64_t samples, int64_t elements) {
  return {samples, elements, static_cast<uint32_t>(vec4s_of(elements))};
}

// Blocks within one sample: a thread finds its sample without a division, and the threads of a warp
// access neighbouring Vec4s. For samples with at least kThreads Vec4s.
template <int kVec4s>
struct BlocksOfSamples {
  static constexpr int64_t kMaxY = 65535;

  static Blocks blocks(const Grid& grid) {
    const int64_t per_block = int64_t{kThreads} * kVec4s;
    const int64_t y = grid.samples < kMaxY ? grid.samples : kMaxY;
    return {(grid.vec4s + per_block - 1) / per_block, y, y ? (grid.samples + y - 1) / y : 0};
  }

  static DDPM_HD Position position(const Grid&, const BlockIndex& block, uint32_t thread) {
    const int64_t sample = static_cast<int64_t>(block.z) * block.blocks_y + block.y;
    return {sample, block.x * (kThreads * kVec4s) + thread};
  }
};

// One Vec4 per thread, across sample boundaries. An empty sample has one thread, because
// q_posterior writes a variance for it.
struct Flat {
  static DDPM_HD int64_t threads_of_sample(const Grid& grid) {
    return grid.vec4s > 0 ? grid.vec4s : 1;
  }

  static Blocks blocks(const Grid& grid) {
    return {(grid.samples * threads_of_sample(grid) + kThreads - 1) / kThreads, 1, 1};
  }

  static DDPM_HD Position position(const Grid& grid, const BlockIndex& block, uint32_t thread) {
    const int64_t index = static_cast<int64_t>(block.x) * kThreads + thread;
    const int64_t threads = threads_of_sample(grid);
    const int64_t sample = index / threads;
    return {sample, static_cast<uint32_t>(index - sample * threads)};
  }
};

}  // namespace ddpm
