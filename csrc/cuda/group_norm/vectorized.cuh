// GroupNorm of channels-last maps in 16-byte vectors: the phases of one thread.
//
// A block, or a cluster of blocks that exchange their totals, holds a slab (whole groups of one
// image) in registers: one read, one write. The variance is computed from the differences to the
// mean. No CUDA header is included: the kernels run these phases, and so do the host tests, where
// an Exec iterates over the threads (see phases.cuh).
#pragma once

#include "cuda/common/vectorized.cuh"
#include "cuda/group_norm/params.cuh"

namespace ddpm {

// kSum: the thread holds the sum (keeps_sum). Otherwise it holds x as loaded, and adds the vector
// at each use.
template <class T, bool kSum, int kHeld, bool kStream>
struct VectorizedThread {
  using Type = T;
  static constexpr int kValues = Packed<T>::kValues;    // per vector
  static constexpr int kPerWord = Packed<T>::kPerWord;  // values per 32-bit word
  static constexpr int kSlots = kSum ? kValues : 4;     // registers per vector
  // The shift is folded into the offset, which is then rounded at the magnitude of mean /
  // deviation. As in PyTorch, this is below the last bit of 16-bit types unless a group is constant
  // up to about 2^-12.
  static constexpr bool kFolds = sizeof(T) == 2;
  static_assert(!kStream || kSum);

  uint32_t held[kHeld][kSlots];
  float part[kValues];  // sums of channels, later of units
  float sum;
  NormPosition position;
  float* shared;
  uint32_t column, first_pixel;
  int vectors;  // of this thread, in all chunks

  // `position` and `shared` are set.
  DDPM_HD void begin(const NormParams& p) {
    const NormPosition& at = position;
    const uint32_t row = at.thread / p.plan.columns;
    column = at.thread - row * p.plan.columns;
    const uint32_t from = at.rank * p.plan.share;
    const uint32_t end = from + p.plan.share < p.pixels ? from + p.plan.share : p.pixels;
    first_pixel = from + row;
    vectors = 0;
    if (row < p.plan.rows && first_pixel < end) {
      vectors = static_cast<int>((end - first_pixel + p.plan.rows - 1) / p.plan.rows);
    }
  }

  DDPM_HD NormShared layout(const NormParams& p) const { return {p.plan, p.group_size}; }
  DDPM_HD int64_t channel(const NormParams& p) const {  // first of the vector
    return static_cast<int64_t>(position.slab) * p.plan.slab + column * kValues;
  }
  DDPM_HD bool has(int chunk, int i) const { return chunk * kHeld + i < vectors; }
  DDPM_HD int chunks() const { return kStream ? (vectors + kHeld - 1) / kHeld : 1; }
  // Address of the chunk's vectors, and the distance between them.
  struct Vectors {
    char* at;
    int64_t step;
    DDPM_HD Vector16& operator[](int i) const {
      return *reinterpret_cast<Vector16*>(at + i * step);
    }
  };
  DDPM_HD Vectors vectors_in(const NormParams& p, const VectorizedMap& map, int64_t from_channel,
                             int chunk) const {
    const int64_t step = p.plan.rows * map.pixel_bytes;
    return {map.data + position.sample * map.sample_bytes + first_pixel * map.pixel_bytes +
                from_channel * static_cast<int64_t>(sizeof(T)) + chunk * kHeld * step,
            step};
  }

  DDPM_HD void load(const NormParams& p, int chunk) {
    const int64_t at = channel(p);
    const Vectors from =
        at < p.first ? vectors_in(p, p.x, at, chunk) : vectors_in(p, p.x2, at - p.first, chunk);
    Bits bits[kHeld] = {};
    DDPM_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (has(chunk, i)) bits[i] = unpacked(from[i]);
    }
    if constexpr (!kSum) {
      DDPM_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        DDPM_UNROLL
        for (int w = 0; w < 4; ++w) held[i][w] = bits[i].w[w];
      }
    } else {
      Bits residual_bits[kHeld] = {};
      if (p.residual.data != nullptr) {
        const Vectors residual = vectors_in(p, p.residual, at, chunk);
        DDPM_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          if (has(chunk, i)) residual_bits[i] = unpacked(residual[i]);
        }
      }
      DDPM_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        DDPM_UNROLL
        for (int w = 0; w < 4; ++w) {
          float a[kPerWord], b[kPerWord];
          Packed<T>::unpack(bits[i].w[w], a);
          Packed<T>::unpack(residual_bits[i].w[w], b);
          DDPM_UNROLL
          for (int j = 0; j < kPerWord; ++j) {
            const float h = p.residual.data != nullptr ? a[j] + b[j] : a[j];
            held[i][w * kPerWord + j] = bits_of(h);
          }
        }
      }
    }
  }

  // Prefetches weight and bias into the L2 cache, while the previous kernel is still running. They
  // must not be read yet: that kernel may write them.
  DDPM_HD void prefetch(const NormParams& p) const {
#if defined(__CUDA_ARCH__)
    const int64_t at = static_cast<int64_t>(position.slab) * p.plan.slab + position.thread;
    if (position.thread >= p.plan.slab) return;
    const int64_t byte = at * (p.wide_parameters ? 4 : static_cast<int64_t>(sizeof(T)));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.weight) + byte));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.bias) + byte));
#else
    (void)p;
#endif
  }

  // Stages the constants of the slab's channels in shared memory.
  DDPM_HD void stage(const NormParams& p) const {
    const NormShared s = layout(p);
    const int64_t row_of_table = p.row == nullptr ? 0 : p.row[position.sample * p.row_stride];
    for (uint32_t c = position.thread; c < p.plan.slab; c += p.plan.threads) {
      const int64_t at = static_cast<int64_t>(position.slab) * p.plan.slab + c;
      const Affine<float> affine = affine_of<T>(p, row_of_table, at);
      shared[s.gain + c] = affine.gain;
      shared[s.offset + c] = affine.offset;
      shared[s.vector + c] = vector_of(p, row_of_table, at);
    }
  }

  // Word w of vector i: with kSum the sum, otherwise x.
  DDPM_HD void word(int i, int w, float (&v)[kPerWord]) const {
    if constexpr (kSum) {
      DDPM_UNROLL
      for (int j = 0; j < kPerWord; ++j) v[j] = float_of(held[i][w * kPerWord + j]);
    } else {
      Packed<T>::unpack(held[i][w], v);
    }
  }

  DDPM_HD void constants(const float* from, int w, float (&v)[kPerWord]) const {
    struct __attribute__((may_alias, aligned(4 * kPerWord))) Loaded {
      float v[kPerWord];
    };
    const auto loaded = *reinterpret_cast<const Loaded*>(from + column * kValues + w * kPerWord);
    DDPM_UNROLL
    for (int j = 0; j < kPerWord; ++j) v[j] = loaded.v[j];
  }

  DDPM_HD void add_vector(const NormParams& p, int chunk) {
    if (p.vector.data == nullptr) return;
    DDPM_UNROLL
    for (int w = 0; w < 4; ++w) {
      float vector[kPerWord];
      constants(shared + layout(p).vector, w, vector);
      DDPM_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (!has(chunk, i)) continue;
        DDPM_UNROLL
        for (int j = 0; j < kPerWord; ++j) {
          uint32_t& slot = held[i][w * kPerWord + j];
          slot = bits_of(float_of(slot) + vector[j]);
        }
      }
    }
  }

  DDPM_HD void store_total(const NormParams& p, int chunk) const {
    const Vectors to = vectors_in(p, p.total, channel(p), chunk);
    DDPM_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (!has(chunk, i)) continue;
      Vector16 packed;
      DDPM_UNROLL
      for (int w = 0; w < 4; ++w) {
        float v[kPerWord];
        word(i, w, v);
        packed.w[w] = Packed<T>::pack(v);
      }
      to[i] = packed;
    }
  }

  DDPM_HD void sums(const NormParams& p) {
    DDPM_UNROLL
    for (float& v : part) v = 0.0f;
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if constexpr (kStream) load(p, chunk);
      if constexpr (kSum) add_vector(p, chunk);
      const float count = static_cast<float>(vectors < kHeld ? vectors : kHeld);
      DDPM_UNROLL
      for (int w = 0; w < 4; ++w) {
        float total[kPerWord] = {};
        DDPM_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          float v[kPerWord];
          word(i, w, v);
          DDPM_UNROLL
          for (int j = 0; j < kPerWord; ++j) total[j] += v[j];
        }
        if constexpr (!kSum) {
          float vector[kPerWord];
          constants(shared + layout(p).vector, w, vector);
          DDPM_UNROLL
          for (int j = 0; j < kPerWord; ++j) total[j] = fma(count, vector[j], total[j]);
        }
        DDPM_UNROLL
        for (int j = 0; j < kPerWord; ++j) part[w * kPerWord + j] += total[j];
      }
      if constexpr (kSum && !kStream) {
        if (p.total.data != nullptr) store_total(p, chunk);
      }
    }
    fold(p);
  }

  DDPM_HD void squares(const NormParams& p) {
    DDPM_UNROLL
    for (float& v : part) v = 0.0f;
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if constexpr (kStream) {
        load(p, chunk);
        add_vector(p, chunk);
      }
      DDPM_UNROLL
      for (int w = 0; w < 4; ++w) {
        float shift[kPerWord], total[kPerWord] = {};
        constants(shared + layout(p).shift, w, shift);
        DDPM_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          float v[kPerWord];
          word(i, w, v);
          DDPM_UNROLL
          for (int j = 0; j < kPerWord; ++j) {
            const float difference = has(chunk, i) ? v[j] + shift[j] : 0.0f;
            total[j] = fma(difference, difference, total[j]);
          }
        }
        DDPM_UNROLL
        for (int j = 0; j < kPerWord; ++j) part[w * kPerWord + j] += total[j];
      }
    }
    fold(p);
  }

  // Adds the channel sums of a vector up to sums of its units.
  DDPM_HD void fold(const NormParams& p) {
    DDPM_UNROLL
    for (uint32_t unit = 1, count = kValues; count > 1; unit *= 2, count /= 2) {
      if (p.plan.unit <= unit) continue;
      DDPM_UNROLL
      for (uint32_t j = 0; j < count / 2; ++j) part[j] = part[2 * j] + part[2 * j + 1];
    }
  }
  DDPM_HD uint32_t units_of_vector(const NormParams& p) const { return kValues / p.plan.unit; }

  DDPM_HD void store_parts(const NormParams& p) const {
    const uint32_t lane = position.thread % 32;
    const uint32_t row = first_pixel - position.rank * p.plan.share;
    const bool writes = p.plan.shuffled ? lane < p.plan.columns : row < p.plan.rows;
    if (!writes) return;
    const NormShared s = layout(p);
    const uint32_t writer = p.plan.shuffled ? position.thread / 32 : row;
    const uint32_t units = units_of_vector(p);
    float* to = shared + s.partials + writer * s.partial_stride() + column * units;
    DDPM_UNROLL
    for (uint32_t k = 0; k < kValues; ++k) {
      if (k < units) to[k] = part[k];
    }
  }

  // The groups are distributed over the warps, in several rounds.
  DDPM_HD static uint32_t rounds(const NormParams& p) {
    const uint32_t warps = p.plan.threads / 32, groups = p.plan.slab / p.group_size;
    return (groups + warps - 1) / warps;
  }
  DDPM_HD uint32_t group(const NormParams& p, uint32_t round) const {
    return round * (p.plan.threads / 32) + position.thread / 32;
  }

  DDPM_HD void gather(const NormParams& p, uint32_t round) {
    const NormShared s = layout(p);
    const uint32_t units = p.group_size / p.plan.unit;
    sum = 0.0f;
    if (group(p, round) >= s.groups) return;
    const float* from = shared + s.partials + group(p, round) * units;
    for (uint32_t at = position.thread % 32; at < p.plan.writers * units; at += 32) {
      const uint32_t writer = at / units;
      sum += from[writer * s.partial_stride() + (at - writer * units)];
    }
  }

  // Writes to the block of the cluster that owns `memory`.
  DDPM_HD void send(const NormParams& p, uint32_t round, uint32_t pass, float* memory) const {
    const NormShared s = layout(p);
    if (group(p, round) >= s.groups) return;
    memory[s.total(pass, p.plan.cluster(), position.rank, group(p, round))] = sum;
  }
  DDPM_HD void receive(const NormParams& p, uint32_t round, uint32_t pass) {
    const NormShared s = layout(p);
    if (group(p, round) >= s.groups) return;
    sum = 0.0f;
    for (uint32_t rank = 0; rank < p.plan.cluster(); ++rank) {
      sum += shared[s.total(pass, p.plan.cluster(), rank, group(p, round))];
    }
  }

  // Derives the constants of the channels from the group's total: the shift after the first pass,
  // the gain after the second.
  DDPM_HD void finish(const NormParams& p, uint32_t round, uint32_t pass) const {
    const NormShared s = layout(p);
    if (group(p, round) >= s.groups) return;
    const float count = static_cast<float>(p.group_size) * static_cast<float>(p.pixels);
    const float mean = sum / count;
    const float scale = pass == 0 ? 0.0f : reciprocal_sqrt(mean + p.eps);
    const uint32_t first = group(p, round) * p.group_size;
    for (uint32_t c = first + position.thread % 32; c < first + p.group_size; c += 32) {
      if (pass == 0) {
        shared[s.shift + c] = kSum ? -mean : shared[s.vector + c] - mean;
      } else {
        const float gain = shared[s.gain + c] * scale;
        shared[s.gain + c] = gain;
        if constexpr (kFolds) {
          shared[s.offset + c] = fma(shared[s.shift + c], gain, shared[s.offset + c]);
        }
      }
    }
  }

  template <bool kSilu>
  DDPM_HD void apply(const NormParams& p, int chunk) {
    const NormShared s = layout(p);
    DDPM_UNROLL
    for (int w = 0; w < 4; ++w) {
      float shift[kPerWord] = {}, gain[kPerWord], offset[kPerWord];
      if constexpr (!kFolds) constants(shared + s.shift, w, shift);
      constants(shared + s.gain, w, gain);
      constants(shared + s.offset, w, offset);
      DDPM_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        float v[kPerWord];
        word(i, w, v);
        DDPM_UNROLL
        for (int j = 0; j < kPerWord; ++j) {
          const float difference = kFolds ? v[j] : v[j] + shift[j];
          const float y = fma(difference, gain[j], offset[j]);
          v[j] = kSilu ? silu(y) : y;
        }
        held[i][w] = Packed<T>::pack(v);  // reuses the register of the input
      }
    }
    const Vectors to = vectors_in(p, p.out, channel(p), chunk);
    DDPM_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (!has(chunk, i)) continue;
      to[i] = {{held[i][0], held[i][1], held[i][2], held[i][3]}};
    }
  }

  DDPM_HD void apply(const NormParams& p) {
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if constexpr (kStream) {
        load(p, chunk);
        add_vector(p, chunk);
        // Only now: total may alias x or the residual, which every pass reads.
        if (p.total.data != nullptr) store_total(p, chunk);
      }
      p.silu ? apply<true>(p, chunk) : apply<false>(p, chunk);
    }
  }
};

}  // namespace ddpm
