// The operators on CUDA: one kernel each, on the current stream of the tensors' device.
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "bindings/checksum_op.h"
#include "bindings/network_ops.h"
#include "cuda/launch.h"

namespace ddpm {
namespace {

template <class Launch>
void on_stream(const Tensor& state, const Launch& launch) {
  const int32_t device = state.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launch(stream);
  STD_TORCH_CHECK(error == 0, "CUDA kernel launch failed: ", cuda_error_string(error));
}

template <class Args>
void on_stream(int (*launch)(const Args&, void* stream), const Args& a, const Tensor& state) {
  on_stream(state, [&](void* stream) { return launch(a, stream); });
}

void check_width(std::initializer_list<const View*> views) {
  for (const View* view : views) {
    STD_TORCH_CHECK(view->data == nullptr || view->dtype != DType::f64,
                    "float64 runs in the backends reference and cpu only");
  }
}

struct CudaLaunch {
  static void q_sample(const QSampleArgs& a, const Tensor& x0) {
    check_width({&a.x0, &a.noise});
    on_stream(cuda_q_sample, a, x0);
  }
  static void q_posterior(const QPosteriorArgs& a, const Tensor& x_t) {
    check_width({&a.x0, &a.x_t});
    on_stream(cuda_q_posterior, a, x_t);
  }
  static void reverse_step(const ReverseStepArgs& a, const Tensor& x) {
    check_width({&a.x, &a.source, &a.out, &a.noise, &a.model_input, &a.pred_x0, &a.out2,
                 &a.log_variance, &a.second, &a.history});
    on_stream(cuda_reverse_step, a, x);
  }
  static void philox_normal(const PhiloxNormalArgs& a, const Tensor& out) {
    check_width({&a.out});
    on_stream(cuda_philox_normal, a, out);
  }
  static void group_norm(const GroupNormArgs& a, const Tensor& out) {
    STD_TORCH_CHECK(a.dtype != DType::f64, "float64 runs in the backends reference and cpu only");
    on_stream(cuda_group_norm, a, out);
  }
  static void checksum(const std::vector<ChecksumArgs>& tensors, Checksum* sums,
                       const Tensor& out) {
    on_stream(out, [&](void* stream) {
      return cuda_checksum(tensors.data(), static_cast<int64_t>(tensors.size()), sums, stream);
    });
  }
};

}  // namespace
}  // namespace ddpm

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, library) {
  ddpm::Ops<ddpm::CudaLaunch>::add_to(library);
  ddpm::NetworkOps<ddpm::CudaLaunch>::add_to(library);
  ddpm::ChecksumOp<ddpm::CudaLaunch>::add_to(library);
}
