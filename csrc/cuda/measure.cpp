#include "cuda/measure.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

namespace lowrank_ops {
namespace {

void check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "lowrank_ops: timing under policy 'measure' failed: ", describe(error),
              ". An error of earlier work on this GPU can show here: CUDA_LAUNCH_BLOCKING=1 finds where");
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream)); }
  double seconds_until(const Event& later) const {
    float milliseconds = 0;
    check(cudaEventSynchronize(later.event_));
    check(cudaEventElapsedTime(&milliseconds, event_, later.event_));
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

double gpu_seconds(cudaStream_t stream, const std::function<void()>& run) {
  constexpr int kWarmUps = 3, kRounds = 5, kCalls = 5;
  for (int i = 0; i < kWarmUps; ++i) run();
  const Event first, last;
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    first.record(stream);
    for (int i = 0; i < kCalls; ++i) run();
    last.record(stream);
    best = std::min(best, first.seconds_until(last) / kCalls);
  }
  return best;
}

}  // namespace lowrank_ops
