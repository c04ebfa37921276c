// Where torch wants kernels to run, for the .cu files.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

// Weak, so that the library also loads where torch was built without CUDA: nobody calls it there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace samplewise {

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Raises where a launch was refused; does not wait for the kernels.
inline void check_launches() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "samplewise: a kernel was not launched: ", cudaGetErrorString(error));
}

}  // namespace samplewise
