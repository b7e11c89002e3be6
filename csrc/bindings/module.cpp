// The Python module ddpm_fast._C: build information, and Philox for NumPy users. Needs no torch and
// compiles no kernel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/normal.h"
#include "core/philox.h"
#include "core/row.h"
#include "cpu/instruction_sets.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter,
                               const std::array<uint32_t, 2>& key) {
  const ddpm::Philox4 w =
      ddpm::philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {w.r0, w.r1, w.r2, w.r3};
}

// Returns an array [num, count]; values(sample, block) are four consecutive elements of a sample.
template <class T, class Values>
py::array_t<T> fill_samples(int64_t num, int64_t count, const char* count_name, Values values) {
  for (const auto& [name, value] : {std::pair{"num", num}, std::pair{count_name, count}}) {
    if (value < 0) {
      throw py::value_error(std::string(name) + " must be at least 0; got " +
                            std::to_string(value));
    }
  }
  py::array_t<T> result({num, count});
  T* out = result.mutable_data();
  const py::gil_scoped_release release;
  for (int64_t k = 0; k < num; ++k) {
    for (int64_t first = 0; first < count; first += 4) {
      const std::array<T, 4> block =
          values(static_cast<uint64_t>(k), static_cast<uint32_t>(first / 4));
      for (int64_t i = first; i < count && i < first + 4; ++i) {
        *out++ = block[static_cast<size_t>(i - first)];
      }
    }
  }
  return result;
}

py::array_t<uint32_t> philox_words(int64_t num, int64_t words, uint64_t seed, uint32_t stream,
                                   int64_t first_sample) {
  const uint64_t first = static_cast<uint64_t>(first_sample);
  return fill_samples<uint32_t>(num, words, "words", [=](uint64_t k, uint32_t block) {
    const uint64_t sample = first + k;
    return philox(
        {block, stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)},
        {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  });
}

py::array_t<float> philox_normal(int64_t num, int64_t elements, uint64_t seed, uint32_t stream,
                                 int64_t first_sample) {
  const uint64_t first = static_cast<uint64_t>(first_sample);
  return fill_samples<float>(num, elements, "elements", [=](uint64_t k, uint32_t block) {
    const ddpm::Normal4 n = ddpm::normal4(block, stream, first + k, seed);
    return std::array<float, 4>{n.z[0], n.z[1], n.z[2], n.z[3]};
  });
}

std::vector<std::string> row_fields() {
  return {
#define DDPM_NAME(name) #name,
      DDPM_ROW_COLUMNS(DDPM_NAME)
#undef DDPM_NAME
  };
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = DDPM_BUILT_WITH_TORCH;
  info["cuda"] = DDPM_BUILT_WITH_CUDA;
  info["cuda_architectures"] = DDPM_CUDA_ARCHITECTURES;
  info["cpu_kernels"] = ddpm::runnable_instruction_sets();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of ddpm_fast, and its random numbers without torch.";
  module.def("build_info", &build_info,
             "Versions that the extension was built with: compiler, torch, cuda (empty: CPU only), "
             "cuda_architectures; and the cpu_kernels that run on this processor.");
  module.def("row_fields", &row_fields, "The columns of a step table's row, in order.");
  module.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"),
             "Four uint32 of Philox4x32-10 (Salmon et al. 2011) for one counter and key.");
  module.def("philox_words", &philox_words, py::arg("num"), py::arg("words"), py::arg("seed"),
             py::arg("stream"), py::arg("first_sample") = 0,
             "uint32 [num, words]: the random words that philox_normal turns into normals, of the "
             "counters (0, 1, ..; stream; sample) with the seed as key. Runs on one thread.");
  module.def("philox_normal", &philox_normal, py::arg("num"), py::arg("elements"), py::arg("seed"),
             py::arg("stream"), py::arg("first_sample") = 0,
             "float32 [num, elements]: standard normals of the samples from first_sample on, of a "
             "seed and a stream, elements in channels-last order. Runs on one thread.");
}
