// Checksums of many tensors in one launch: the work of one thread.
//
// The blocks of a launch are divided among the tensors. A thread takes every kThreads-th pair of
// words of its block's range, so that a warp reads consecutive memory, 16 bytes a thread.
#pragma once

#include "core/args.h"
#include "core/checksum.h"
#include "cuda/common/grid.cuh"

namespace ddpm {

constexpr int kChecksumThreads = 256;
constexpr int kPairs = 8;  // of a thread
constexpr int64_t kWordsOfBlock = int64_t{2} * kPairs * kChecksumThreads;
constexpr int kMaxTensors = 128;  // of a launch, whose parameters are at most 4 KiB

struct ChecksumParams {
  ChecksumArgs tensors[kMaxTensors];
  uint32_t first_block[kMaxTensors + 1];  // of each tensor; the last is the number of blocks
  int32_t count;
  Checksum* sums;
};

// The tensor of a block: the last one whose first block is not after it.
DDPM_HD int tensor_of_block(const ChecksumParams& p, uint32_t block) {
  int low = 0, high = p.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct WordPair {
  uint64_t first, second;
};

// From an address that is a multiple of 16.
DDPM_HD WordPair load_pair(const void* data, int64_t index) {
  const uint64_t* from = static_cast<const uint64_t*>(data) + index;
#if defined(__CUDA_ARCH__)
  const ulonglong2 both = *reinterpret_cast<const ulonglong2*>(from);
  return {both.x, both.y};
#else
  return {from[0], from[1]};
#endif
}

DDPM_HD Checksum checksum_of_thread(const ChecksumArgs& tensor, uint32_t block, uint32_t thread) {
  constexpr int64_t kStride = int64_t{2} * kChecksumThreads;
  Checksum checksum{};
  const int64_t begin = block * kWordsOfBlock, first = begin + int64_t{2} * thread;
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  if (aligned && 8 * (begin + kWordsOfBlock) <= tensor.bytes) {
    WordPair pairs[kPairs];  // all loads before the first use
    DDPM_UNROLL
    for (int i = 0; i < kPairs; ++i) pairs[i] = load_pair(tensor.data, first + kStride * i);
    DDPM_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t index = static_cast<uint32_t>(first + kStride * i);
      add_word(checksum, pairs[i].first, index);
      add_word(checksum, pairs[i].second, index + 1);
    }
    return checksum;
  }
  for (int64_t index = first; index < begin + kWordsOfBlock; index += kStride) {
    for (int64_t i = index; i < index + 2 && i < tensor.words(); ++i) {
      add_word(checksum, word_at(tensor.data, tensor.bytes, i), static_cast<uint32_t>(i));
    }
  }
  return checksum;
}

}  // namespace ddpm
