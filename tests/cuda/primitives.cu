// Runs the kernels of tests/support/simulator/primitive_kernels.cuh on a GPU, for test_cuda_kernels.py. Input and output
// are in host memory.
#include "primitive_kernels.cuh"

extern "C" int run_primitive(const char* name, const void* in, int64_t in_bytes, void* out, int64_t out_bytes,
                             const int64_t* arguments) {
  lowrank_ops::PrimitiveParams params{};
  for (int i = 0; i < 6; i++) params.argument[i] = arguments[i];
  void *device_in = nullptr, *device_out = nullptr;
  const auto run = [&]() -> cudaError_t {
    if (const cudaError_t error = cudaMalloc(&device_in, size_t(in_bytes))) return error;
    if (const cudaError_t error = cudaMalloc(&device_out, size_t(out_bytes))) return error;
    if (const cudaError_t error = cudaMemcpy(device_in, in, size_t(in_bytes), cudaMemcpyHostToDevice)) return error;
    if (const cudaError_t error = cudaMemcpy(device_out, out, size_t(out_bytes), cudaMemcpyHostToDevice)) return error;
    params.in = device_in;
    params.out = device_out;
    if (const cudaError_t error = lowrank_ops::launch_primitive(name, params, nullptr)) return error;
    return cudaMemcpy(out, device_out, size_t(out_bytes), cudaMemcpyDeviceToHost);
  };
  const cudaError_t error = run();
  cudaFree(device_in);
  cudaFree(device_out);
  return int(error);
}
