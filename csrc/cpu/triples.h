// Three channels of six, such as the halves of an output with a variance: dense pixels out of
// [pixels, 6] by permutations, for the instruction sets that define DDPM_PERMUTES, the floats of a
// vector.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

#if defined(DDPM_PERMUTES)
constexpr int kTriples = 48;  // elements that are packed together: sixteen pixels

typedef float Floats __attribute__((vector_size(4 * DDPM_PERMUTES)));

DDPM_HD Floats floats_at(const float* from) {
  Floats values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

#if DDPM_PERMUTES == 16
// Where element `i` of a half lies, counted from register kFirst.
template <int kOffset, int kFirst>
constexpr int place_of(int i) {
  return i / 3 * 6 + i % 3 + kOffset - 16 * kFirst;
}

// Those from kDone on that lie in registers kFirst and kFirst + 1.
template <int kOffset, int kFirst, int kDone, int... kLanes>
DDPM_HD Floats from_two(const Floats* six, std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(six[kFirst], six[kFirst + 1],
                                 (place_of<kOffset, kFirst>(kDone + kLanes) & 31)...);
}

// The rest of them, from the register after those.
template <int kOffset, int kThird, int kDone, int... kLanes>
DDPM_HD Floats from_third(Floats two, Floats third, std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(two, third,
                                 (place_of<kOffset, kThird>(kDone + kLanes) < 0
                                      ? kLanes
                                      : 16 + place_of<kOffset, kThird>(kDone + kLanes))...);
}

// One half of sixteen pixels that lie in six registers.
template <int kOffset, int kDone = 0>
DDPM_HD void half_of_six(const Floats* six, float* to) {
  if constexpr (kDone < kTriples) {
    constexpr auto kLanes = std::make_integer_sequence<int, 16>{};
    constexpr int kFirst = place_of<kOffset, 0>(kDone) / 16;
    constexpr int kLast = place_of<kOffset, 0>(kDone + 15) / 16;
    Floats values = from_two<kOffset, kFirst, kDone>(six, kLanes);
    if constexpr (kLast > kFirst + 1) {
      values = from_third<kOffset, kLast, kDone>(values, six[kLast], kLanes);
    }
    __builtin_memcpy(to + kDone, &values, sizeof values);
    half_of_six<kOffset, kDone + 16>(six, to);
  }
}

DDPM_HD void pack_halves(const float* from, float* first, float* second) {
  const Floats six[6] = {floats_at(from),      floats_at(from + 16), floats_at(from + 32),
                         floats_at(from + 48), floats_at(from + 64), floats_at(from + 80)};
  half_of_six<0>(six, first);
  half_of_six<3>(six, second);
}
#endif

// Consecutive elements of a half, from channel kChannel of a pixel on. Nothing behind the last of
// them is read.
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
  // A pixel further on, an element lies three further than its place.
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
DDPM_HD void pack_halves(const float* from, float* first, float* second) {
  pack_triples(from, first);
  pack_triples(from + 3, second);
}
#endif
#endif
