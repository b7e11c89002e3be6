// Three of six channels, such as an output beside a learned variance: dense pixels out of [pixels,
// 6] by permutations. For the instruction sets that define DDPM_PERMUTES, the floats of a vector.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

#if defined(DDPM_PERMUTES)
constexpr int kTriples = 48;  // elements packed together: sixteen pixels

typedef float Floats __attribute__((vector_size(4 * DDPM_PERMUTES)));

DDPM_HD Floats floats_at(const float* from) {
  Floats values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

#if DDPM_PERMUTES == 16
DDPM_HD void put(float* to, Floats values) {
  __builtin_memcpy(to, &values, sizeof values);
}

// Splits sixteen pixels into output and variance. Sixteen elements of one of them come from at most
// three registers; the third contributes one element, which is first moved into an unused lane.
DDPM_HD void split_learned_variance(const float* from, float* first, float* second) {
  const Floats a = floats_at(from), b = floats_at(from + 16), c = floats_at(from + 32);
  const Floats d = floats_at(from + 48), e = floats_at(from + 64), f = floats_at(from + 80);
  Floats filled;
  // clang-format off
  put(first + 0, __builtin_shufflevector(a, b,
      0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20, 24, 25, 26, 30));
  filled = __builtin_shufflevector(c, b,
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 31);
  put(first + 16, __builtin_shufflevector(filled, d,
      15, 0, 4, 5, 6, 10, 11, 12, 16, 17, 18, 22, 23, 24, 28, 29));
  filled = __builtin_shufflevector(f, d,
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 30, 15);
  put(first + 32, __builtin_shufflevector(e, filled,
      30, 2, 3, 4, 8, 9, 10, 14, 15, 16, 20, 21, 22, 26, 27, 28));
  filled = __builtin_shufflevector(a, c,
      0, 17, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  put(second + 0, __builtin_shufflevector(filled, b,
      3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23, 27, 28, 29, 1));
  filled = __builtin_shufflevector(c, e,
      16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  put(second + 16, __builtin_shufflevector(filled, d,
      2, 3, 7, 8, 9, 13, 14, 15, 19, 20, 21, 25, 26, 27, 31, 0));
  put(second + 32, __builtin_shufflevector(e, f,
      1, 5, 6, 7, 11, 12, 13, 17, 18, 19, 23, 24, 25, 29, 30, 31));
  // clang-format on
}
#endif

// Consecutive elements, starting at channel kChannel of a pixel. Nothing after the last of them is
// read.
template <int kChannel>
DDPM_HD Floats triples_at(const float* from) {
  // clang-format off
#if DDPM_PERMUTES == 16
  const Floats low = floats_at(from), high = floats_at(from + 15);
  if constexpr (kChannel == 0) {
    return __builtin_shufflevector(low, high,
        0, 1, 2, 6, 7, 8, 12, 13, 14, 19, 20, 21, 25, 26, 27, 31);
  } else if constexpr (kChannel == 1) {
    return __builtin_shufflevector(low, high,
        0, 1, 5, 6, 7, 11, 12, 13, 18, 19, 20, 24, 25, 26, 30, 31);
  } else {
    return __builtin_shufflevector(low, high,
        0, 4, 5, 6, 10, 11, 12, 17, 18, 19, 23, 24, 25, 29, 30, 31);
  }
#else
  // In a vector loaded one pixel later, an element is three lanes further on.
  const Floats first = floats_at(from), second = floats_at(from + 3), third = floats_at(from + 6);
  if constexpr (kChannel == 0) {
    const Floats two = __builtin_shufflevector(first, second, 0, 1, 2, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(two, third, 0, 1, 2, 3, 4, 5, 14, 15);
  } else if constexpr (kChannel == 1) {
    const Floats two = __builtin_shufflevector(first, second, 0, 1, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(two, third, 0, 1, 2, 3, 4, 13, 14, 15);
  } else {
    const Floats two = __builtin_shufflevector(first, second, 0, 9, 10, 11, 12, 13, 14, 15);
    const Floats three = __builtin_shufflevector(two, third, 0, 1, 2, 3, 12, 13, 14, 15);
    return __builtin_shufflevector(three, floats_at(from + 9), 0, 1, 2, 3, 4, 5, 6, 15);
  }
#endif
  // clang-format on
}

template <int kDone = 0>
DDPM_HD void pack_triples(const float* from, float* to) {
  if constexpr (kDone < kTriples) {
    const Floats values = triples_at<kDone % 3>(from + kDone / 3 * 6 + kDone % 3);
    __builtin_memcpy(to + kDone, &values, sizeof values);
    pack_triples<kDone + DDPM_PERMUTES>(from, to);
  }
}

#if DDPM_PERMUTES != 16
DDPM_HD void split_learned_variance(const float* from, float* first, float* second) {
  pack_triples(from, first);
  pack_triples(from + 3, second);
}
#endif
#endif
