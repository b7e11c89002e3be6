// The row of a step table: what one step of any solver does to every element.
// The equation, and the same order of columns, are in ddpm_fast/row.py.
#pragma once

#include "core/macros.h"

namespace ddpm {

// clang-format off
#define DDPM_ROW_COLUMNS(X)                                                                     \
  X(G0) X(G1) X(P) X(Q) X(clip) X(Hx) X(Hv) X(Ho) X(Yx) X(Yy) X(Yx0) X(Yo) X(Yh1) X(Yh2) X(Yh3) \
  X(Xx) X(Xy) X(Xx0) X(Xo) X(Xh1) X(Xh2) X(Xh3) X(M) X(S) X(Cin) X(Lmin) X(Lmax) X(push)
enum RowColumn : int {
#define DDPM_ENUM(name) kRow_##name,
  DDPM_ROW_COLUMNS(DDPM_ENUM)
#undef DDPM_ENUM
  kRowColumns,
};
// clang-format on

constexpr int kRowWidth = 32;  // a float32 row is one 128-byte line
static_assert(kRowColumns <= kRowWidth);

// What a table uses. A term that no row uses is neither loaded nor computed: 0 * NaN is NaN.
enum RowFlag : int64_t {
  kClip = 1,     // x0 is clipped to [-clip, clip]
  kRawOut = 2,   // Xo: the model's output enters x' directly (DDIM with the raw epsilon)
  kScaleIn = 4,  // Cin: the model's next input is scaled
  kKnownFlags = kClip | kRawOut | kScaleIn,
};

// The columns that the specialisations built so far read.
template <class R>
struct Row {
  R P, Q, clip, Xx, Xx0, Xo, S, Cin;
};

template <class R>
DDPM_HD Row<R> load_row(const R* rows, int64_t index) {
  const R* r = rows + index * kRowWidth;
  return {r[kRow_P],   r[kRow_Q],  r[kRow_clip], r[kRow_Xx],
          r[kRow_Xx0], r[kRow_Xo], r[kRow_S],    r[kRow_Cin]};
}

}  // namespace ddpm
