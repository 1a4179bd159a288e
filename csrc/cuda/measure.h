// Timing for the policy "measure".
#pragma once

#include <functional>

#include "cuda/device.h"

namespace lowrank_ops {

// Seconds of GPU time that `run` takes on a stream of the current device: calls back to back between two events, the
// best of a few such rounds, after a warm-up. Waits for the GPU: never to be called while a graph is captured.
double gpu_seconds(cudaStream_t stream, const std::function<void()>& run);

}  // namespace lowrank_ops
