// Blocks of normals: the arithmetic of core/normal.h over arrays, so that it vectorises.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

constexpr int kLanes = 64;  // Philox blocks generated together

// Fills normals[0 .. 4 * kLanes) from `kLanes` Philox blocks, starting at `block`.
inline void make_lanes(float* normals, uint32_t block, uint32_t stream, uint64_t sample,
                       uint64_t seed) {
  alignas(64) uint32_t random_bits[4][kLanes];
  alignas(64) float z[4][kLanes];
  const uint32_t sample_low = static_cast<uint32_t>(sample);
  const uint32_t sample_high = static_cast<uint32_t>(sample >> 32);
  const uint32_t key_low = static_cast<uint32_t>(seed);
  const uint32_t key_high = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < kLanes; ++i) {
    const Philox4 w = philox4x32_10(block + static_cast<uint32_t>(i), stream, sample_low,
                                    sample_high, key_low, key_high);
    random_bits[0][i] = w.r0;
    random_bits[1][i] = w.r1;
    random_bits[2][i] = w.r2;
    random_bits[3][i] = w.r3;
  }
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < kLanes; ++i) {
      const NormalPair p = box_muller(random_bits[pair][i], random_bits[pair + 1][i]);
      z[pair][i] = p.z0;
      z[pair + 1][i] = p.z1;
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) normals[4 * i + j] = z[j][i];
  }
}

// Fills normals[0 .. count) with elements first .. first + count - 1 of a sample. first must be a
// multiple of 4; the buffer has kBlock floats, of which those after count may be overwritten.
inline void make_normals(float* normals, int64_t first, int64_t count, uint32_t stream,
                         uint64_t sample, uint64_t seed) {
  uint32_t block = static_cast<uint32_t>(first / 4);
  for (int64_t done = 0; done < count; done += 4 * kLanes, block += kLanes) {
    make_lanes(normals + done, block, stream, sample, seed);
  }
}

// Converts the normals to the dtype of the arithmetic; `scratch` is used for float64.
inline const float* generated_block(const float* normals, int64_t, float*) {
  return normals;
}
inline const double* generated_block(const float* normals, int64_t count, double* scratch) {
  for (int64_t i = 0; i < count; ++i) scratch[i] = normals[i];
  return scratch;
}
