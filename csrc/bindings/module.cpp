// ddpm_fast._C: what does not need torch. Build facts, and the noise for NumPy users.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/philox.h"
#include "core/row.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter,
                               const std::array<uint32_t, 2>& key) {
  const ddpm::Philox4 w =
      ddpm::philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {w.r0, w.r1, w.r2, w.r3};
}

py::array_t<float> philox_normal(int64_t num, int64_t elements, uint64_t seed, uint32_t stream,
                                 int64_t first_sample, const std::string& kernels) {
  if (num < 0 || elements < 0) {
    throw py::value_error("num and elements must be at least 0; got " + std::to_string(num) +
                          " and " + std::to_string(elements));
  }
  if (!ddpm::select_cpu_kernels(kernels.c_str())) {
    throw py::value_error("kernels must be auto or one of those that run here (" +
                          std::string(ddpm::runnable_cpu_kernels()) + "), got " + kernels);
  }
  py::array_t<float> result({num, elements});
  const int64_t words[3] = {static_cast<int64_t>(seed), stream, first_sample};
  ddpm::PhiloxNormalArgs args{};
  args.samples = num;
  args.elements = elements;
  args.rng.words = words;
  args.out.data = result.mutable_data();
  args.out.dtype = ddpm::DType::f32;
  args.out.sample_stride = elements;
  args.out.linear = true;
  {
    const py::gil_scoped_release release;
    ddpm::cpu_kernels().philox_normal(args, 0, num * ddpm::blocks_per_sample(elements));
  }
  ddpm::select_cpu_kernels("auto");
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
  info["cpu_kernels"] = ddpm::runnable_cpu_kernels();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of ddpm_fast, and its noise without torch.";
  module.def("build_info", &build_info,
             "What the extension was built with: compiler, torch, cuda (empty: CPU only), "
             "cuda_architectures, and the cpu_kernels that run on this processor.");
  module.def("row_fields", &row_fields, "The columns of a step table's row, in order.");
  module.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"),
             "Four uint32 words of Philox4x32-10 (Salmon et al. 2011).");
  module.def("philox_normal", &philox_normal, py::arg("num"), py::arg("elements"), py::arg("seed"),
             py::arg("stream"), py::arg("first_sample") = 0, py::arg("kernels") = "auto",
             "float32 [num, elements]: the normals of samples first_sample .. of a seed and "
             "stream, elements in channels-last order; one thread.");
}
