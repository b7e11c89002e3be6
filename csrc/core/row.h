// A row of a step table: the coefficients of one step of any solver, the same for every element.
// ddpm_fast/ops/row.py has the equation and the same order of columns.
#pragma once

#include "core/macros.h"

namespace ddpm {

// clang-format off
#define DDPM_ROW_COLUMNS(X)                                                                     \
  X(G0) X(G1) X(P) X(Q) X(clip) X(Hx) X(Hv) X(Ho) X(Yx) X(Yy) X(Yx0) X(Yo) X(Yh1) X(Yh2) X(Yh3) \
  X(Xx) X(Xy) X(Xx0) X(Xo) X(Xh1) X(Xh2) X(Xh3) X(M) X(S) X(Cin) X(Lmin) X(Lmax) X(push)        \
  X(slot) X(ratio)
enum RowColumn : int {
#define DDPM_ENUM(name) kRow_##name,
  DDPM_ROW_COLUMNS(DDPM_ENUM)
#undef DDPM_ENUM
  kRowColumns,
};
// clang-format on

constexpr int kRowWidth = 32;  // a float32 row is one 128-byte line
static_assert(kRowColumns <= kRowWidth);

// Terms that a table uses. A term that no row uses is neither loaded nor computed: 0 * NaN is NaN.
enum RowFlag : int64_t {
  kClip = 1,        // x0 is clipped to [-clip, clip]
  kRawOut = 2,      // Xo: x' depends on the model output (DDIM with the unclipped epsilon)
  kScaleIn = 4,     // Cin: the next model input is scaled
  kGuide = 8,       // G0, G1: guidance by a second model output
  kLearned = 16,    // Lmin, Lmax: a learned variance scales the noise
  kThreshold = 32,  // x0 is clipped to the sample's threshold and divided by it; clip is ignored
  kPast1 = 64,      // Xh1, Yh1: the last pushed value
  kPast2 = 128,     // Xh2, Yh2
  kPast3 = 256,     // Xh3, Yh3
  kPush = 512,      // Hx, Hv: rows push a value to the history
  kPushOut = 1024,  // Ho: the pushed value depends on the model output
  kSecond = 2048,   // Y, Xy: the state has a second tensor
  kKnownFlags = 4095,
};

constexpr int kDeepest = 3;  // maximum depth of the history
constexpr int64_t kPast = kPast1 | kPast2 | kPast3;
constexpr int64_t kRing = kPast | kPush;  // flags that need the history
constexpr int64_t kMultistepTerms = kGuide | kLearned | kThreshold | kRing | kSecond;

// Flags allowed in a functional step, which writes neither a history nor a model input.
constexpr int64_t kFunctionalFlags = kClip | kRawOut | kLearned | kThreshold;

DDPM_HD bool reads_past(int64_t flags, int k) {
  return (flags & (kPast1 << (k - 1))) != 0;
}

// Number of past values that a table reads.
DDPM_HD int history_depth(int64_t flags) {
  for (int k = kDeepest; k > 0; --k) {
    if (reads_past(flags, k)) return k;
  }
  return 0;
}

template <class R>
struct Row {
#define DDPM_FIELD(name) R name;
  DDPM_ROW_COLUMNS(DDPM_FIELD)
#undef DDPM_FIELD

  DDPM_HD R history_coef(int k) const { return k == 1 ? Xh1 : k == 2 ? Xh2 : Xh3; }
  DDPM_HD R history_coef_second(int k) const { return k == 1 ? Yh1 : k == 2 ? Yh2 : Yh3; }
};

template <class R>
DDPM_HD Row<R> load_row(const R* rows, int64_t index) {
  const R* r = rows + index * kRowWidth;
  return {
#define DDPM_LOAD(name) r[kRow_##name],
      DDPM_ROW_COLUMNS(DDPM_LOAD)
#undef DDPM_LOAD
  };
}

// The slot of h_k; for k = 0 the slot that a push writes. Always in [0, depth), whatever a row
// contains.
template <class R>
DDPM_HD int past_slot(const Row<R>& row, int k, int depth) {
  const int column = row.slot >= R(2) ? 2 : row.slot >= R(1) ? 1 : 0;
  const int slot = (column < depth ? column : depth - 1) - k;
  return slot < 0 ? slot + depth : slot;
}

}  // namespace ddpm
