// The GPU that a call runs on: its properties for the planner, its current stream, CUDA's errors in words.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <string>

#include "ops/gpu_device.h"

namespace lowrank_ops {

constexpr int kMostDevices = 64;

// Read from the driver at the first call for a device, never at import: that would cost every process a CUDA start-up.
const GpuCaps& gpu_caps(c10::Device device);

// Torch's current stream of a device. Through c10's virtual interface, so that this code needs no CUDA build of torch.
cudaStream_t current_stream(c10::Device device);

// Whether the stream records its work into a CUDA graph: nobody may wait for the stream then.
bool is_capturing(cudaStream_t stream);

// "cudaErrorInvalidValue (invalid argument)"
std::string describe(cudaError_t error);

}  // namespace lowrank_ops
