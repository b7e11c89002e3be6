// ddpm_fast._C: build information, and the noise for NumPy users. Needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
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

py::array_t<float> philox_normal(int64_t num, int64_t elements, uint64_t seed, uint32_t stream,
                                 int64_t first_sample) {
  if (num < 0 || elements < 0) {
    throw py::value_error("num and elements must be at least 0; got " + std::to_string(num) +
                          " and " + std::to_string(elements));
  }
  py::array_t<float> result({num, elements});
  float* out = result.mutable_data();
  const py::gil_scoped_release release;
  for (int64_t k = 0; k < num; ++k) {
    const uint64_t sample = static_cast<uint64_t>(first_sample) + static_cast<uint64_t>(k);
    for (int64_t first = 0; first < elements; first += 4) {
      const ddpm::Normal4 normals =
          ddpm::normal4(static_cast<uint32_t>(first / 4), stream, sample, seed);
      for (int64_t i = first; i < elements && i < first + 4; ++i) *out++ = normals.z[i - first];
    }
  }
  return result;
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
  module.doc() = "Build information of ddpm_fast, and its noise without torch.";
  module.def("build_info", &build_info,
             "Versions that the extension was built with: compiler, torch, cuda (empty: CPU only), "
             "cuda_architectures; and the cpu_kernels that run on this processor.");
  module.def("row_fields", &row_fields, "The columns of a step table's row, in order.");
  module.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"),
             "Four uint32 words of Philox4x32-10 (Salmon et al. 2011).");
  module.def("philox_normal", &philox_normal, py::arg("num"), py::arg("elements"), py::arg("seed"),
             py::arg("stream"), py::arg("first_sample") = 0,
             "float32 [num, elements]: standard normals of the samples from first_sample on, of a "
             "seed and a stream, elements in channels-last order. Runs on one thread.");
}
