// Where the noise of a body comes from.
#pragma once

#include "core/normal.h"
#include "cuda/common/vectorized.cuh"

namespace ddpm {

enum class Noise { none, input, generated };

struct NoiseKey {
  uint64_t seed, stream, first_sample;
};

DDPM_HD NoiseKey load_key(const int64_t* rng) {
  return {static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1]),
          static_cast<uint64_t>(rng[2])};
}

// The normals of a thread's Vec4s, of the stream `streams_on` after the key's.
template <int kN>
DDPM_HD void generate_noise(const NoiseKey& key, int64_t streams_on, const Position& position,
                            Vec4 (&noise)[kN]) {
  const uint32_t stream = static_cast<uint32_t>(key.stream + static_cast<uint64_t>(streams_on));
  const uint64_t sample = key.first_sample + static_cast<uint64_t>(position.sample);
  DDPM_UNROLL
  for (int i = 0; i < kN; ++i) {
    const Normal4 normals = normal4(position.vec4(i), stream, sample, key.seed);
    DDPM_UNROLL
    for (int j = 0; j < 4; ++j) noise[i].v[j] = normals.z[j];
  }
}

}  // namespace ddpm
