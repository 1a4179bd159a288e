// Device side of the tests: shared memory, mbarriers, clusters, cp.async. Most functions are one instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hopper {

#define DEVICE __device__ __forceinline__

// Dynamic shared memory.
extern __shared__ __align__(1024) unsigned char shared_memory[];

DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}
// The address of the dynamic shared memory; swizzled layouts need it aligned to 1024 bytes.
DEVICE uint32_t shared_base() {
  const uint32_t address = shared_address(shared_memory);
  if (address % 1024 != 0) __trap();
  return address;
}

// The tile of the tests is a part of a 3x3 convolution (9 taps) of bf16 data from 64 channels to 64: 8x8 output pixels,
// which read 10x10 input pixels (the halo). "Hidden" names the input, "factor" the 64x64 weights of one tap.
constexpr int kHalo = 10, kPixels = kHalo * kHalo, kTile = 64, kTaps = 9;
constexpr int kPlane = kPixels * 16;     // bytes of 8 channels of all input pixels (without swizzle)
constexpr int kHiddenBytes = 13 * 1024;  // bytes of the input, rounded up
constexpr int kFactorBytes = kTile * kTile * 2;

// Makes this thread's writes to shared memory visible to wgmma and TMA.
DEVICE void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// mbarriers. All functions take the address of the barrier in shared memory.
DEVICE void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// To be called after barrier_init, before other threads, CTAs of the cluster or TMA use the barriers.
DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_proxy();
}
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the barrier at the same address in the CTA of this rank in the cluster.
DEVICE void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives, and makes the phase wait for `bytes` bytes of copies.
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for a short time for the phase of this parity. Returns whether it is complete.
DEVICE bool try_phase(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// Waits until the phase of this parity is complete (0 is the first phase). Traps if that never happens.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  for (int tries = 0;; ++tries) {
    if (try_phase(barrier, parity)) return;
    if (tries > (1 << 22)) __trap();
  }
}

// Waits for all threads of the cluster.
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same without ordering accesses to memory.
DEVICE void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// cp.async of 16 bytes.
DEVICE void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

DEVICE void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
// All threads of the CTA copy `vectors` x 16 bytes to shared memory.
DEVICE void fill_shared(uint32_t address, const uint4* source, int vectors) {
  for (int i = int(threadIdx.x); i < vectors; i += int(blockDim.x)) store_shared(address + i * 16, source[i]);
}

}  // namespace hopper
