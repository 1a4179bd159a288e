// What the blocks use of the hardware beyond ../*.cuh, mostly one instruction a function. With -DEMULATE the same
// functions come from emulator.h, which runs the kernels on the host.
#pragma once

#ifdef EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../device.cuh"
#include "../tensor_cores.cuh"
#include "../tma.cuh"

namespace hopper {

// A matrix of rows of 128 bytes in the 128-byte swizzle; `stride` bytes lie between groups of 8 rows.
DEVICE uint64_t swizzled(uint32_t start, uint32_t stride) {
  return descriptor(start, 16, stride, kSwizzle128);
}
// The same matrix `bytes` further on.
DEVICE uint64_t further(uint64_t matrix, int bytes) {
  return advance(matrix, bytes / 16);
}

// The shapes of wgmma that ../tensor_cores.cuh lacks.
// clang-format off
#define SUMS40(i) SUMS32(i), SUMS4(i + 32), SUMS4(i + 36)
#define SUMS52(i) SUMS32(i), SUMS16(i + 32), SUMS4(i + 48)
#define PLACES40 PLACES32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PLACES52 PLACES40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"
WGMMA(80, PLACES40, SUMS40, "%40", "%41", "%42", "%43", "%44")
WGMMA(104, PLACES52, SUMS52, "%52", "%53", "%54", "%55", "%56")
// clang-format on

// Keeps the registers of an operand from reuse up to this point.
template <int count>
DEVICE void pin(uint32_t (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Waits for the phase of this parity to complete (0 is the first phase; 1 is complete at once on a fresh barrier). A
// wait without end becomes an error after some 20 ms.
DEVICE void wait_phase(uint32_t barrier, uint32_t parity) {
  if (try_phase(barrier, parity)) return;
  const long long start = clock64();
  while (!try_phase(barrier, parity))
    if (clock64() - start > 40000000) __trap();
}
// Among the 128 threads of a warpgroup.
DEVICE void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// Of the 256 threads of two warpgroups; not in one kernel with the above.
DEVICE void both_barrier() {
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

DEVICE void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared),
      "l"(map), "r"(barrier), "r"(a), "r"(b)
      : "memory");
}
DEVICE void tma_prefetch_4d(const CUtensorMap* map, int c, int x, int y, int n) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c), "r"(x), "r"(y),
               "r"(n)
               : "memory");
}
DEVICE void tma_store_4d(const CUtensorMap* map, uint32_t shared, int c, int x, int y, int n) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared), "r"(c), "r"(x), "r"(y), "r"(n)
               : "memory");
}
DEVICE void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most `pending` of this thread's stores have not yet read shared memory.
template <int pending>
DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
DEVICE void tma_store_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// 8x8 matrices of bf16 to rows of 16 bytes; lanes 8 i to 8 i + 7 give the rows of matrix i. A lane holds row lane / 4,
// columns lane % 4 * 2 and + 1 of each matrix, and with `transposed` column lane / 4 and two rows.
template <bool transposed>
DEVICE void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
DEVICE void store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(a), "r"(b) : "memory");
}

// Two floats as bf16, the first in the low half.
DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE float word_as_float(uint32_t word) {
  return __uint_as_float(word);
}
DEVICE void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
DEVICE void load_shared(uint32_t address, float& a, float& b) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(address));
}
DEVICE void load_shared(uint32_t address, float& a, float& b, float& c, float& d) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "r"(address));
}
DEVICE uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
DEVICE void store_global(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// A warpgroup's share of the registers, per thread.
template <int count>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
DEVICE uint32_t now() {
  uint32_t time;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(time)::"memory");
  return time;
}

// A map of a bf16 tensor, the innermost dimension contiguous, for boxes of 64 elements there in the 128-byte swizzle;
// strides in elements, of all dimensions but the innermost.
inline CUtensorMap tensor_map(const char* name, const void* start, std::vector<uint64_t> sizes,
                              std::vector<uint64_t> strides, std::vector<uint32_t> box) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
  for (uint64_t& stride : strides) stride *= 2;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(sizes.size()), const_cast<void*>(start), sizes.data(),
             strides.data(), box.data(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("cuTensorMapEncodeTiled ") + name + ": CUresult " +
                             std::to_string(int(result)));
  return map;
}

}  // namespace hopper
#endif  // EMULATE
