// A reverse step: one fused loop for a plain step, several loops per part for one with multistep
// terms.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

#include "cpu/reverse_step_io.h"
#include "cpu/reverse_step_learned.h"
#include "cpu/reverse_step_terms.h"

template <class R>
struct StepBlock {
  const R* x;
  const R* out;
  const R* noise;
  R* next;  // may be x
  R* pred_x0;
  int64_t count;
};

template <bool kClips, bool kUsesOut, bool kNoisy, bool kStoresX0, class R>
void step_block(const StepBlock<R>& b, const Row<R>& row) {
#pragma GCC ivdep
#pragma GCC unroll 4
  for (int64_t i = 0; i < b.count; ++i) {
    const R x = b.x[i];
    const R out = b.out[i];
    R x0 = predict_x0(x, out, row);
    if constexpr (kClips) x0 = clip(x0, row.clip);
    if constexpr (kStoresX0) b.pred_x0[i] = x0;
    R next = step_mean<kUsesOut>(x, x0, out, row);
    if constexpr (kNoisy) next = add_noise(next, b.noise[i], row);
    b.next[i] = next;
  }
}

template <bool... kFlags, class R>
void choose_step(const StepBlock<R>& b, const Row<R>& row) {
  step_block<kFlags...>(b, row);
}
template <bool... kFlags, class R, class... Remaining>
void choose_step(const StepBlock<R>& b, const Row<R>& row, bool next, Remaining... remainder) {
  next ? choose_step<kFlags..., true>(b, row, remainder...)
       : choose_step<kFlags..., false>(b, row, remainder...);
}

template <class R>
void plain_step(const ReverseStepArgs& a, const Block& b, int64_t index) {
  alignas(64) R x_scratch[kBlock], out_scratch[kBlock], noise_scratch[kBlock], x0_scratch[kBlock];
  alignas(64) float normals[kBlock];
  const Row<R> row = load_row(static_cast<const R*>(a.rows), index);
  StepBlock<R> block{};
  block.count = b.count;
  block.out = read_block(a.out, b.sample, b.first, b.count, out_scratch);
  block.x = state_block(a, b, x_scratch);
  block.next = target_block(a.x, b.sample, b.first, x_scratch);
  block.noise = step_noise(a, b, index, normals, noise_scratch);
  if (a.pred_x0.data) block.pred_x0 = target_block(a.pred_x0, b.sample, b.first, x0_scratch);
  choose_step(block, row, (a.flags & kClip) != 0, (a.flags & kRawOut) != 0, block.noise != nullptr,
              a.pred_x0.data != nullptr);
  if (a.pred_x0.data) write_block(a.pred_x0, b.sample, b.first, b.count, block.pred_x0);
  write_state(a, b, row, block.next, out_scratch);
}

template <class R>
void step_in_parts(const ReverseStepArgs& a, const Block& block, int64_t index) {
  StepScratch<R> scratch;
  StepPart<R> part(a, scratch);
  for (int64_t done = 0; done < block.count; done += kPart) {
    const int64_t left = block.count - done;
    part.run({block.sample, block.first + done, left < kPart ? left : kPart}, index);
  }
}

template <class R>
void reverse_step_blocks(const ReverseStepArgs& a, int64_t begin, int64_t end) {
  const int64_t per_sample = blocks_per_sample(a.elements);
  auto step = a.flags & kMultistepTerms ? step_in_parts<R> : plain_step<R>;
  if constexpr (sizeof(R) == 4) {
    if (is_learned_step(a)) step = learned_step;
  }
  for (int64_t work = begin; work < end; ++work) {
    const Block b = block_at(work, per_sample, a.elements);
    const int64_t index = a.step[b.sample * a.step_stride];
    if (index >= 0 && index < a.num_rows) {
      step(a, b, index);
    } else if (a.source.data) {
      write_nan<R>(a, b);
    }
  }
}
