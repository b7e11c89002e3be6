// What each kernel is told. No torch type: the launchers take these, on the CPU and on CUDA alike.
#pragma once

#include "core/tensor_view.h"

namespace ddpm {

// Where a kernel makes its noise: three int64 on the tensors' device, so that a captured CUDA graph
// can be replayed for another chunk. Sample n of the batch is sample first_sample + n of the seed.
struct Rng {
  const int64_t* state;  // seed, stream, first_sample; null where noise is an input
};

struct QSampleArgs {
  int64_t samples, elements;
  View x0, noise, x_t;  // noise is read, or written where rng is set
  const int64_t* t;
  int64_t t_stride;
  const void* coefs;  // [num_timesteps, 2] of the arithmetic's type
  int64_t num_timesteps;
  Rng rng;
};

struct QPosteriorArgs {
  int64_t samples, elements;
  View x0, x_t, mean;
  const int64_t* t;
  int64_t t_stride;
  const void* coefs;  // [num_timesteps, 4]
  int64_t num_timesteps;
  void* variance;  // [samples] of the arithmetic's type
  void* log_variance;
};

struct ReverseStepArgs {
  int64_t samples, elements;
  View x, out;
  View noise;        // data is null where the step uses no noise, or makes it
  View model_input;  // data is null where it is not wanted
  View pred_x0;      // data is null where it is not wanted
  const void* rows;  // [num_rows, kRowWidth]
  int64_t num_rows;
  const int64_t* step;  // row of each sample; outside [0, num_rows) the sample is left alone, or
                        // with a source is NaN in x and pred_x0
  int64_t step_stride;
  int64_t flags;  // RowFlag: data of what follows is null where its flag is not set
  Rng rng;        // the row's noise is of stream state[1] + row
  View out2;
  View log_variance;
  View second;   // y
  View history;  // slot 0 of the ring
  int64_t slot_stride, depth;
  const void* threshold;  // of the arithmetic's type, one for each sample
  int64_t threshold_stride;
  // The state before the step; data is null where that is x itself. With one the flags are some of
  // kFunctionalFlags, and there is neither rng nor model_input.
  View source;
};

struct PhiloxNormalArgs {
  int64_t samples, elements;
  View out;
  Rng rng;
};

// A tensor [N, C, H, W]; strides in elements. data is null where it is not given.
struct Map {
  void* data;
  int64_t sample, channel, row, column;
};

// A table [rows, ...] of the arithmetic's type, one row of it for each sample; null: not given.
struct SampleTable {
  const void* data;
  int64_t stride, rows;
};

struct GroupNormArgs {
  int64_t samples, height, width;
  int64_t first, second;  // channels of x and of x2
  int64_t groups;
  DType dtype;       // of the maps
  DType parameters;  // of weight and bias
  Map out, x, x2, residual, total;
  SampleTable vector;      // [rows, C]
  SampleTable modulation;  // [rows, 2 C]: scales, then shifts
  const int64_t* row;      // of each sample; null: row 0. Outside [0, rows) the sample is NaN
  int64_t row_stride;
  const void* weight;
  const void* bias;
  double eps;
  bool silu;

  DDPM_HD int64_t channels() const { return first + second; }
  DDPM_HD int64_t pixels() const { return height * width; }
  DDPM_HD int64_t group_size() const { return channels() / groups; }
};

}  // namespace ddpm
