// Which of the compiled instruction sets runs.
#include <string.h>

#include <atomic>

#include "cpu/kernels.h"

namespace ddpm {

extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool runs;
};

// Narrowest first.
int candidates(Candidate* list) {
  int count = 0;
  list[count++] = {&cpu_kernels_baseline, true};
#if defined(__x86_64__)
  list[count++] = {&cpu_kernels_avx2, __builtin_cpu_supports("x86-64-v3") != 0};
  list[count++] = {&cpu_kernels_avx512, __builtin_cpu_supports("x86-64-v4") != 0};
#endif
  return count;
}

const CpuKernels* find(const char* name) {
  Candidate list[3];
  const int count = candidates(list);
  for (int i = count - 1; i >= 0; --i) {
    const bool wanted = !strcmp(name, "auto") || !strcmp(name, list[i].kernels->name);
    if (wanted && list[i].runs) return list[i].kernels;
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

const char* runnable_cpu_kernels() {
  static char names[64];
  static const bool filled = [] {
    Candidate list[3];
    const int count = candidates(list);
    for (int i = 0; i < count; ++i) {
      if (!list[i].runs) continue;
      if (names[0]) strcat(names, " ");
      strcat(names, list[i].kernels->name);
    }
    return true;
  }();
  (void)filled;
  return names;
}

}  // namespace ddpm
