// Instruction sets that the CPU kernels are compiled for. Header only, so that the Python module
// ddpm_fast._C needs no kernel.
#pragma once

#include <string>

namespace ddpm {

struct InstructionSet {
  const char* name;
  bool runs_here;
};

// Fills `sets`, narrowest first, and returns their number.
inline int instruction_sets(InstructionSet (&sets)[3]) {
  int count = 0;
  sets[count++] = {"baseline", true};
#if defined(__x86_64__)
  sets[count++] = {"avx2", __builtin_cpu_supports("x86-64-v3") != 0};
  sets[count++] = {"avx512", __builtin_cpu_supports("x86-64-v4") != 0};
#endif
  return count;
}

// Names of the sets that this processor has, separated by spaces.
inline std::string runnable_instruction_sets() {
  InstructionSet sets[3];
  const int count = instruction_sets(sets);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (!sets[i].runs_here) continue;
    if (!names.empty()) names += ' ';
    names += sets[i].name;
  }
  return names;
}

}  // namespace ddpm
