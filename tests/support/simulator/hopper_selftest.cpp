// A kernel for the emulator's own tests (tests/simulator/test_clusters.py): two CTAs of a cluster load half of a matrix
// each, into both, and give it back. It can make mistakes that the emulator must see.
#include "cuda/kernels/hopper.cuh"
#include "module.h"

namespace lowrank_ops::hopper {
namespace {

// In the order of Mistake in tests/simulator/test_clusters.py.
enum Mistake {
  kNone,
  kOwnMask,           // the copies reach the own CTA alone
  kLargeMask,         // the mask names a CTA that does not exist
  kEmptyMask,         // the mask names none
  kNoInitFence,       // no fence behind the initialization of the mbarriers
  kNoFirstBarrier,    // no barrier of the cluster behind it
  kLargeRank,         // an arrival at a CTA that does not exist
  kNoLastBarrier,     // a CTA ends before the other arrives at its mbarrier
  kOneAtLastBarrier,  // only one CTA comes to the last barrier
  kHalfExpected,      // an mbarrier expects half of the bytes
  kOrdinaryAccess,    // an ordinary access to the other CTA's shared memory
};

constexpr int kThreads = 32, kRows = 64, kRowBytes = 128, kBytes = kRows * kRowBytes;

struct Params {
  CUtensorMap map;  // [64 rows][64 channels], boxes of 32 rows
  uint32_t* out;    // the matrix as it lies in shared memory of CTA 0, then of CTA 1
  Mistake mistake;
};

void load_half(const Params& p, uint32_t matrix, uint32_t full) {
  const int rank = cluster_rank();
  const uint16_t mask = p.mistake == kOwnMask     ? uint16_t(1 << rank)
                        : p.mistake == kLargeMask ? 7
                        : p.mistake == kEmptyMask ? 0
                                                  : 3;
  barrier_expect(full, p.mistake == kHalfExpected ? kBytes / 2 : kBytes);
  multicast_box(matrix + uint32_t(rank * kBytes / 2), &p.map, full, mask, 0, rank * kRows / 2);
}

void exchange_kernel(const Params p) {
  const uint32_t base = shared_base(), full = base, empty = base + 8, matrix = base + 1024;
  const int rank = cluster_rank(), lane = threadIdx.x;
  if (lane == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 2);
    if (p.mistake != kNoInitFence) barrier_init_done();
  }
  if (p.mistake == kNoFirstBarrier)
    __syncthreads();
  else
    cluster_barrier();
  if (lane == 0) load_half(p, matrix, full);
  wait_phase(full, 0);
  const uint32_t from = p.mistake == kOrdinaryAccess ? matrix ^ 1u << kRankShift : matrix;
  for (uint32_t i = uint32_t(lane); i < kBytes / 4; i += kThreads)
    p.out[uint32_t(rank) * kBytes / 4 + i] = load_shared_word(from + i * 4);
  const bool late = p.mistake == kNoLastBarrier && rank == 1;
  while (late && ctas[0].running > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (lane < 2) barrier_arrive(empty, p.mistake == kLargeRank ? lane + 1 : lane);
  if (p.mistake == kNoLastBarrier) return;
  wait_phase(empty, 0);
  if (p.mistake != kOneAtLastBarrier || rank == 0) cluster_barrier();
}

}  // namespace
}  // namespace lowrank_ops::hopper

// `in`: 64x64 elements of 2 bytes. 0: there was no fault; hopper_fault describes it.
LOWRANK_OPS_EXPORT int hopper_selftest(int64_t in, int64_t out, int64_t mistake) {
  using namespace lowrank_ops::hopper;
  Params params{};
  params.map = {
      reinterpret_cast<unsigned char*>(in), 2, {64, kRows, 1, 1, 1}, {2, kRowBytes}, {64, kRows / 2, 1, 1, 1}};
  params.out = reinterpret_cast<uint32_t*>(out);
  params.mistake = Mistake(mistake);
  return run_ctas(exchange_kernel, 2, kThreads, 1024 + kBytes, params, 2) ? 0 : 1;
}
