// The instructions that the sm90a kernels need, mostly one per function: mbarriers, TMA (the unit that copies boxes of
// tensors) and wgmma (the products of a warpgroup, 128 threads). Under g++ the same functions come from
// tests/support/simulator/emulator.h, which runs the kernels on a CPU.
//
// Sources: PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "mapa", "barrier.cluster", "Asynchronous Warpgroup
// Level Matrix Instructions".
#pragma once

#include <cstdint>

#include "cuda/kernels/activation.cuh"

#ifndef __CUDACC__
#include "emulator.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#define LOWRANK_OPS_HOPPER __device__ __forceinline__

namespace lowrank_ops::hopper {

// Dynamic shared memory. Swizzled layouts need its address aligned to 1024 bytes.
extern __shared__ __align__(1024) unsigned char shared_memory[];

LOWRANK_OPS_HOPPER uint32_t shared_base() {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared_memory));
  if (address % 1024 != 0) __trap();
  return address;
}

// ---- mbarriers, named by their addresses in shared memory

LOWRANK_OPS_HOPPER void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// To be called after barrier_init, before other threads, other CTAs of the cluster or TMA use the barriers.
LOWRANK_OPS_HOPPER void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
LOWRANK_OPS_HOPPER void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for `bytes` bytes of copies.
LOWRANK_OPS_HOPPER void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is complete. On a fresh barrier parity 0 is its first phase, and waiting for
// parity 1 returns at once.
LOWRANK_OPS_HOPPER void wait_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Arrives at the barrier that lies at this place in the shared memory of a CTA of the cluster, the own one or another.
// It orders no writes of the thread (`.release.cluster` would, by a fence of all memory in every call): it gives back
// what wgmma has read.
LOWRANK_OPS_HOPPER void barrier_arrive(uint32_t barrier, int cta) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(cta)
      : "memory");
}
// The number of this CTA in its cluster.
LOWRANK_OPS_HOPPER int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
// A barrier of all threads of the cluster's CTAs. Arrivals at mbarriers of other CTAs are done before it, too: a CTA
// may end behind it. In a launch without clusters a CTA is a cluster of its own.
LOWRANK_OPS_HOPPER void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// A barrier of the 128 threads of a warpgroup.
LOWRANK_OPS_HOPPER void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// A barrier of the 256 threads of the first two warpgroups.
LOWRANK_OPS_HOPPER void both_groups_barrier() {
  asm volatile("bar.sync 3, 256;" ::: "memory");
}
// Makes this thread's writes to shared memory visible to wgmma and TMA.
LOWRANK_OPS_HOPPER void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA: copies of boxes of a tensor. Loads fill what lies outside of the tensor with zeros; stores leave it out.
// Coordinates a, b, c, ... begin with the innermost axis.

LOWRANK_OPS_HOPPER void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared),
      "l"(map), "r"(barrier), "r"(a), "r"(b)
      : "memory");
}
LOWRANK_OPS_HOPPER void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b, int c,
                                 int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
LOWRANK_OPS_HOPPER void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int a, int b, int c, int d,
                                 int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e)
      : "memory");
}
// The same into several CTAs of the cluster (one bit each), at the same place in the shared memory of each. The bytes
// are counted at the barrier at the same place of each.
LOWRANK_OPS_HOPPER void multicast_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint16_t ctas, int a,
                                      int b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared),
      "l"(map), "r"(barrier), "h"(ctas), "r"(a), "r"(b)
      : "memory");
}
LOWRANK_OPS_HOPPER void multicast_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint16_t ctas, int a,
                                      int b, int c, int d, int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared),
      "l"(map), "r"(barrier), "h"(ctas), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e)
      : "memory");
}
LOWRANK_OPS_HOPPER void store_box(const CUtensorMap* map, uint32_t shared, int a, int b, int c, int d) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
LOWRANK_OPS_HOPPER void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all but at most `pending` groups of this thread's stores have read shared memory.
template <int pending>
LOWRANK_OPS_HOPPER void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
LOWRANK_OPS_HOPPER void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- wgmma

// The descriptor of a matrix with rows of 128 bytes in the 128-byte swizzle. Groups of 8 rows lie `stride` bytes apart.
LOWRANK_OPS_HOPPER uint64_t swizzled(uint32_t start, uint32_t stride) {
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t((stride & 0x3FFFF) >> 4) << 32 |
         uint64_t(1) << 62;
}
// The descriptor of the matrix that lies `bytes` further on. Only the low half changes, by one instruction.
LOWRANK_OPS_HOPPER uint64_t further(uint64_t matrix, int bytes) {
  return (matrix & 0xFFFFFFFF00000000) | (uint32_t(matrix) + uint32_t(bytes / 16));
}

LOWRANK_OPS_HOPPER void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
LOWRANK_OPS_HOPPER void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
LOWRANK_OPS_HOPPER void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving reads and writes of an operand across this point.
template <int count>
LOWRANK_OPS_HOPPER void pin(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int count>
LOWRANK_OPS_HOPPER void pin(uint32_t (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// wgmma m64nNk16: sums [64, N] += A [64, 16] B [16, N], both operands K-major, A from shared memory or from registers.
// Each thread holds N / 2 sums. Warp w holds rows 16 w to 16 w + 15. A lane's sums 4 j and 4 j + 1 are of row lane / 4,
// sums 4 j + 2 and 4 j + 3 of row lane / 4 + 8; in both rows they are columns 8 j + lane % 4 * 2 and the next.
// clang-format off
#define SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS40(i) SUMS32(i), SUMS4(i + 32), SUMS4(i + 36)
#define SUMS52(i) SUMS32(i), SUMS16(i + 32), SUMS4(i + 48)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define SUMS128(i) SUMS64(i), SUMS64(i + 64)
#define SUMS72(i) SUMS32(i), SUMS32(i + 32), SUMS4(i + 64), SUMS4(i + 68)
#define PLACES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PLACES32 PLACES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PLACES40 PLACES32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PLACES52 PLACES40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"
#define PLACES64 PLACES52 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PLACES72 PLACES64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define PLACES128 PLACES72 "," \
  "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119," \
  "%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(N, PLACES, SUMS, P0, P1, P2, P3, P4)                                                                    \
  template <bool half>                                                                                                 \
  LOWRANK_OPS_HOPPER void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b) {                                        \
    if constexpr (half)                                                                                                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" PLACES "}, " P0 ", " P1                  \
                   ", 1, 1, 1, 0, 0;" : SUMS(0) : "l"(a), "l"(b));                                                     \
    else                                                                                                               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, " P0 ", " P1                \
                   ", 1, 1, 1, 0, 0;" : SUMS(0) : "l"(a), "l"(b));                                                     \
  }                                                                                                                    \
  template <bool half>                                                                                                 \
  LOWRANK_OPS_HOPPER void wgmma(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b) {                            \
    if constexpr (half)                                                                                                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" PLACES "}, {" P0 ", " P1 ", " P2         \
                   ", " P3 "}, " P4 ", 1, 1, 1, 0;" : SUMS(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));   \
    else                                                                                                               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, {" P0 ", " P1 ", " P2       \
                   ", " P3 "}, " P4 ", 1, 1, 1, 0;" : SUMS(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));   \
  }
WGMMA(32, PLACES16, SUMS16, "%16", "%17", "%18", "%19", "%20")
WGMMA(64, PLACES32, SUMS32, "%32", "%33", "%34", "%35", "%36")
WGMMA(80, PLACES40, SUMS40, "%40", "%41", "%42", "%43", "%44")
WGMMA(104, PLACES52, SUMS52, "%52", "%53", "%54", "%55", "%56")
WGMMA(128, PLACES64, SUMS64, "%64", "%65", "%66", "%67", "%68")
WGMMA(144, PLACES72, SUMS72, "%72", "%73", "%74", "%75", "%76")
WGMMA(256, PLACES128, SUMS128, "%128", "%129", "%130", "%131", "%132")
#undef WGMMA
// clang-format on

// ---- Between registers and shared memory

// stmatrix: stores 8x8 matrices of 2-byte elements as rows of 16 bytes; lanes 8 i to 8 i + 7 give the addresses of the
// rows of matrix i. From each matrix a lane holds row lane / 4, columns lane % 4 * 2 and the next; with `transposed` it
// holds column lane / 4 and two rows.
template <bool transposed>
LOWRANK_OPS_HOPPER void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
LOWRANK_OPS_HOPPER void store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(a), "r"(b) : "memory");
}

// Two floats rounded to fp16 or bf16, the first in the low half.
template <bool half>
LOWRANK_OPS_HOPPER uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (half)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <bool half>
LOWRANK_OPS_HOPPER float widen(uint16_t bits) {
  float value;
  if constexpr (half)
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  else
    value = __uint_as_float(uint32_t(bits) << 16);
  return value;
}
// The first and the second of two packed elements, widened.
template <bool half>
LOWRANK_OPS_HOPPER float widen_low(uint32_t both) {
  if constexpr (half) return widen<true>(uint16_t(both));
  return __uint_as_float(both << 16);
}
template <bool half>
LOWRANK_OPS_HOPPER float widen_high(uint32_t both) {
  if constexpr (half) return widen<true>(uint16_t(both >> 16));
  return __uint_as_float(both & 0xFFFF0000u);
}
LOWRANK_OPS_HOPPER void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
LOWRANK_OPS_HOPPER void load_shared(uint32_t address, float& a, float& b) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(address));
}

LOWRANK_OPS_HOPPER void load_shared(uint32_t address, float& a, float& b, float& c, float& d) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "r"(address));
}
LOWRANK_OPS_HOPPER uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
LOWRANK_OPS_HOPPER void store_global(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Raises or lowers the number of registers per thread of the calling warpgroup.
template <int count>
LOWRANK_OPS_HOPPER void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
LOWRANK_OPS_HOPPER void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace lowrank_ops::hopper
#endif  // __CUDACC__
