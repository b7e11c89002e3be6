// Inputs and outputs of a reverse step for one block: noise, state before the step, results.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

// Noise of a block, null if the step has none. `normals` receives generated noise.
template <class R>
const R* step_noise(const ReverseStepArgs& a, const Block& b, int64_t index, float* normals,
                    R* scratch) {
  if (a.rng.state) {
    make_normals(normals, b.first, b.count,
                 static_cast<uint32_t>(a.rng.state[1]) + static_cast<uint32_t>(index),
                 static_cast<uint64_t>(a.rng.state[2]) + static_cast<uint64_t>(b.sample),
                 static_cast<uint64_t>(a.rng.state[0]));
    return generated_block(normals, b.count, scratch);
  }
  return a.noise.data ? read_block(a.noise, b.sample, b.first, b.count, scratch) : nullptr;
}

// State before the step. The state after it goes to target_block of x, with the same scratch.
template <class R>
const R* state_block(const ReverseStepArgs& a, const Block& b, R* scratch) {
  return read_block(a.source.data ? a.source : a.x, b.sample, b.first, b.count, scratch);
}

// Result of a functional step for a sample whose step is outside the table.
template <class R>
void write_nan(const ReverseStepArgs& a, const Block& b) {
  R nan[kBlock];
  for (R& value : nan) value = static_cast<R>(__builtin_nanf(""));
  scatter(a.x, b.sample, b.first, b.count, nan);
  if (a.pred_x0.data) scatter(a.pred_x0, b.sample, b.first, b.count, nan);
}

// Writes x' and the next model input.
template <class R>
void write_state(const ReverseStepArgs& a, const Block& b, const Row<R>& row, const R* x,
                 R* scratch) {
  write_block(a.x, b.sample, b.first, b.count, x);
  if (!a.model_input.data) return;
  const R* input = x;
  if (a.flags & kScaleIn) {
    for (int64_t i = 0; i < b.count; ++i) scratch[i] = row.Cin * x[i];
    input = scratch;
  }
  scatter(a.model_input, b.sample, b.first, b.count, input);
}
