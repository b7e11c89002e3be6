// The row of a table for a timestep.
#pragma once

#include "core/macros.h"

namespace ddpm {

// Clamps t to the rows of the table.
DDPM_HD int64_t row_of(int64_t t, int64_t num_timesteps) {
  t = t < num_timesteps ? t : num_timesteps - 1;
  return t > 0 ? t : 0;
}

}  // namespace ddpm
