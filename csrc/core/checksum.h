// Checksum of the bytes of a tensor, which tells whether it was written.
//
// Over the 64-bit words w_i of the bytes (little-endian, the last one padded with zeros):
//   sum     = sum_i w_i                                                         mod 2^64
//   product = sum_i ((low_i + kLow i) mod 2^32) ((high_i + kHigh i) mod 2^32)   mod 2^64
// low_i and high_i are the halves of w_i. The sum changes with any one word; the product (NH of
// Black et al. 1999, with multiples of odd constants as keys) depends on the order of the words.
// Both may be summed in any order.
#pragma once

#include "core/macros.h"

namespace ddpm {

struct Checksum {
  uint64_t sum, product;
};

constexpr uint32_t kLowKey = 0x9E3779B1, kHighKey = 0x85EBCA77;

DDPM_HD void add_word(Checksum& checksum, uint64_t word, uint32_t index) {
  const uint32_t low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
  checksum.sum += word;
  checksum.product += mul_wide(low + kLowKey * index, high + kHighKey * index);
}

// Word `index` of `bytes` bytes, at any alignment.
DDPM_HD uint64_t word_at(const void* data, int64_t bytes, int64_t index) {
  const unsigned char* first = static_cast<const unsigned char*>(data) + 8 * index;
  const int64_t rest = bytes - 8 * index;
  uint64_t word = 0;
  for (int i = 0; i < 8 && i < rest; ++i) word |= static_cast<uint64_t>(first[i]) << (8 * i);
  return word;
}

}  // namespace ddpm
