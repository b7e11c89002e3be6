// Arguments of the kernels, shared by the CPU and the CUDA launchers. No torch type.
#pragma once

#include "core/tensor_view.h"

namespace ddpm {

// State of the Philox generator: three int64 on the device of the tensors, so that a captured CUDA
// graph can be replayed for other samples. Sample n of the batch is sample first_sample + n of the
// seed.
struct Rng {
  const int64_t* state;  // seed, stream, first_sample; null if the noise is an input
};

struct QSampleArgs {
  int64_t samples, elements;
  View x0, noise, x_t;  // noise is an input, or an output if rng is set
  const int64_t* t;
  int64_t t_stride;
  const void* coefs;  // [num_timesteps, 2], float64 for float64 tensors, otherwise float32
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
  void* variance;  // [samples], dtype of coefs
  void* log_variance;
};

struct ReverseStepArgs {
  int64_t samples, elements;
  View x, out;
  View noise;        // data is null if the step has no noise or generates it
  View model_input;  // data is null if not requested
  View pred_x0;      // data is null if not requested
  const void* rows;  // [num_rows, kRowWidth]
  int64_t num_rows;
  // Row of each sample. Outside [0, num_rows) the sample is unchanged, or NaN in x and pred_x0 if
  // there is a source.
  const int64_t* step;
  int64_t step_stride;
  int64_t flags;  // RowFlag; the tensors below have null data if their flag is not set
  Rng rng;        // row r uses the noise of stream state[1] + r
  View out2;
  View log_variance;
  View second;   // y
  View history;  // slot 0 of the ring buffer
  int64_t slot_stride, depth;
  const void* threshold;  // dtype of rows, one value per sample
  int64_t threshold_stride;
  // State before the step; data is null if the step updates x in place. With a source only
  // kFunctionalFlags may be set, and there is neither rng nor model_input.
  View source;
};

struct PhiloxNormalArgs {
  int64_t samples, elements;
  View out;
  Rng rng;
};

struct ChecksumArgs {
  const void* data;
  int64_t bytes;

  DDPM_HD int64_t words() const { return (bytes + 7) / 8; }
};

// A tensor [N, C, H, W]; strides in elements. data is null if the tensor is absent.
struct Map {
  void* data;
  int64_t sample, channel, row, column;
};

// A table [rows, ...] in the dtype of the arithmetic; a sample uses one row. data is null if
// absent.
struct SampleTable {
  const void* data;
  int64_t stride, rows;
};

struct GroupNormArgs {
  int64_t samples, height, width;
  int64_t first, second;  // channels of x and of x2
  int64_t groups;
  DType dtype;       // of the five maps
  DType parameters;  // of weight and bias
  Map out, x, x2, residual, total;
  SampleTable vector;      // [rows, C]
  SampleTable modulation;  // [rows, 2 C]: scales, then shifts
  const int64_t* row;      // row of each sample; null: row 0. Outside [0, rows) the sample is NaN
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
