// The checksum of csrc/core: the CPU kernel and the threads of the CUDA kernel on the host, against
// sums word by word.
#include <cstring>
#include <vector>

#include "check.h"
#include "core/checksum.h"
#include "cuda/checksum/thread.cuh"

namespace ddpm::test {
namespace {

#include "cpu/checksum.h"

bool same(const Checksum& a, const Checksum& b) {
  return a.sum == b.sum && a.product == b.product;
}

Checksum by_word(const ChecksumArgs& a) {
  Checksum checksum{};
  for (int64_t i = 0; i < a.words(); ++i) {
    add_word(checksum, word_at(a.data, a.bytes, i), static_cast<uint32_t>(i));
  }
  return checksum;
}

std::vector<unsigned char> bytes(size_t count) {
  std::vector<unsigned char> made(count);
  uint32_t state = 1;
  for (unsigned char& byte : made) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<unsigned char>(state >> 24);
  }
  return made;
}

constexpr int64_t kSizes[] = {0, 1, 7, 8, 9, 64, 65529, 65536, 65543, 200001};

void words_are_little_endian_and_padded() {
  const unsigned char raw[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  CHECK(word_at(raw, 9, 0) == 0x0807060504030201);
  CHECK(word_at(raw, 9, 1) == 9);
}

void parts_of_the_cpu_kernel_sum_to_the_whole() {
  for (const int64_t size : kSizes) {
    for (const size_t start : {0, 3}) {
      const auto raw = bytes(static_cast<size_t>(size) + start);
      const ChecksumArgs a{raw.data() + start, size};
      for (const int64_t parts : {1, 3}) {
        Checksum total{};
        for (int64_t i = 0; i < parts; ++i) {
          const Checksum part =
              checksum_words(a, a.words() * i / parts, a.words() * (i + 1) / parts);
          total.sum += part.sum;
          total.product += part.product;
        }
        CHECK(same(total, by_word(a)), size, " bytes in ", parts);
      }
    }
  }
}

void threads_of_the_cuda_kernel_sum_to_the_whole() {
  for (const size_t start : {0, 2}) {
    std::vector<std::vector<unsigned char>> raw;
    ChecksumParams p{};
    for (const int64_t size : kSizes) {
      raw.push_back(bytes(static_cast<size_t>(size) + start));
      p.tensors[p.count] = {raw.back().data() + start, size};
      const int64_t blocks = (p.tensors[p.count].words() + kWordsOfBlock - 1) / kWordsOfBlock;
      p.first_block[p.count + 1] = p.first_block[p.count] + static_cast<uint32_t>(blocks);
      ++p.count;
    }
    std::vector<Checksum> total(static_cast<size_t>(p.count));
    for (uint32_t block = 0; block < p.first_block[p.count]; ++block) {
      const int tensor = tensor_of_block(p, block);
      for (uint32_t thread = 0; thread < kChecksumThreads; ++thread) {
        const Checksum own =
            checksum_of_thread(p.tensors[tensor], block - p.first_block[tensor], thread);
        total[static_cast<size_t>(tensor)].sum += own.sum;
        total[static_cast<size_t>(tensor)].product += own.product;
      }
    }
    for (int i = 0; i < p.count; ++i) {
      CHECK(same(total[static_cast<size_t>(i)], by_word(p.tensors[i])), p.tensors[i].bytes);
    }
  }
}

}  // namespace
}  // namespace ddpm::test

int main() {
  using namespace ddpm::test;
  return run(words_are_little_endian_and_padded, parts_of_the_cpu_kernel_sum_to_the_whole,
             threads_of_the_cuda_kernel_sum_to_the_whole);
}
