// Selects the instruction set of the kernels.
#include <string.h>

#include <atomic>

#include "cpu/instruction_sets.h"
#include "cpu/kernels.h"

namespace ddpm {

extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

namespace {

// In the order of instruction_sets.
const CpuKernels* const kCompiled[] = {
    &cpu_kernels_baseline,
#if defined(__x86_64__)
    &cpu_kernels_avx2,
    &cpu_kernels_avx512,
#endif
};

// The kernels with that name; for "auto" the widest available; null if there are none.
const CpuKernels* find(const char* name) {
  InstructionSet sets[3];
  for (int i = instruction_sets(sets) - 1; i >= 0; --i) {
    const bool wanted = !strcmp(name, "auto") || !strcmp(name, sets[i].name);
    if (wanted && sets[i].runs_here) return kCompiled[i];
  }
  return nullptr;
}

std::atomic<const CpuKernels*>& selected() {
  static std::atomic<const CpuKernels*> kernels{find("auto")};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  return *selected().load(std::memory_order_relaxed);
}

bool select_cpu_kernels(const char* name) {
  const CpuKernels* kernels = find(name);
  if (kernels) selected().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace ddpm
