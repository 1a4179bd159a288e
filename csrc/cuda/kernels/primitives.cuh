// All instructions that the simt and sm80 kernels need, as functions. Under nvcc they are PTX; under g++ they are the
// host versions in tests/support/simulator/host_primitives.h, which run the same kernels on a CPU and check them.
// Kernels touch shared and global memory through these functions only, so that nothing escapes the checks.
//
// Sources: PTX ISA 8.x, sections "Warp-level matrix instructions" (mma, ldmatrix) and "cp.async".
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/kernels/launch.h"
#include "plan/geometry.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lowrank_ops {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Tf32 {  // stored as fp32, rounded to tf32 where it is multiplied
  float value;
};

// 4, 8 or 16 bytes that move together.
template <int words>
struct alignas(4 * words) Words {
  uint32_t word[words];
};

// Two neighbouring elements.
template <typename Element>
struct alignas(2 * sizeof(Element)) Pair {
  Element value[2];
};

// The type that two neighbouring elements are loaded and stored as: 16-bit elements as one word.
template <typename Element, bool narrow = sizeof(Element) == 2>
struct PackedPair {
  using Type = Pair<Element>;
};
template <typename Element>
struct PackedPair<Element, true> {
  using Type = Words<1>;
};
template <typename Element>
using Packed = typename PackedPair<Element>::Type;

// Every place in a kernel where threads of a CTA (or lanes of a warp) wait for each other has a number, so that a test
// can leave out each of them in turn.
enum class Barrier : int {
  kTables,          // the tables of offsets are written before copies read them
  kChunk,           // a chunk has arrived for all threads; its predecessor's slot is free again
  kHiddenRead,      // Tucker: all warps have read the first hidden tile before the second overwrites it
  kHiddenWritten,   // CP, and persistent kernels: the hidden tile (and the tables) is written before stage 2 reads it
  kSecondWritten,   // persistent kernels: the second hidden tile is written before stage 3 reads it
  kDepthwise,       // CP: the height factor is done before the width factor begins
  kStagingWritten,  // warp: a staged tile of output is written before other lanes read it
  kStagingRead,     // warp: it was read before the next one overwrites it
  kCount
};

}  // namespace lowrank_ops

#ifndef __CUDACC__
#include "host_primitives.h"  // tests/support/simulator
#else

namespace lowrank_ops {

#define LOWRANK_OPS_DEVICE __device__ __forceinline__
#define LOWRANK_OPS_KERNEL(threads, ctas) __global__ void __launch_bounds__(threads, ctas)

LOWRANK_OPS_DEVICE int thread_index() {
  return int(threadIdx.x);
}
LOWRANK_OPS_DEVICE int64_t block_index() {
  return int64_t(blockIdx.x);
}
LOWRANK_OPS_DEVICE int block_count() {
  return int(gridDim.x);
}
// The CTA's dynamic shared memory, aligned to 128 bytes.
LOWRANK_OPS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

template <Barrier>
LOWRANK_OPS_DEVICE void barrier() {
  __syncthreads();
}
template <Barrier>
LOWRANK_OPS_DEVICE void warp_barrier() {
  __syncwarp();
}

// Value is any type of 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <typename Value>
LOWRANK_OPS_DEVICE Value load_shared(const void* address) {
  return *static_cast<const Value*>(address);
}
template <typename Value>
LOWRANK_OPS_DEVICE void store_shared(void* address, const Value& value) {
  *static_cast<Value*>(address) = value;
}
template <typename Value>
LOWRANK_OPS_DEVICE Value load_global(const void* address) {
  return *static_cast<const Value*>(address);
}
template <typename Value>
LOWRANK_OPS_DEVICE void store_global(void* address, const Value& value) {
  *static_cast<Value*>(address) = value;
}

// An address in shared memory as instructions take it, in 32 bits: adding to it costs one instruction, adding a
// constant none.
using SharedAddress = uint32_t;
LOWRANK_OPS_DEVICE SharedAddress shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Copies 4, 8 or 16 bytes from global to shared memory asynchronously. Not `valid`: writes zeros and reads nothing.
template <int bytes>
LOWRANK_OPS_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(size)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global),
                 "n"(bytes), "r"(size)
                 : "memory");
}
// The address `vectors` times 16 bytes behind `base`. In assembly, so that it stays one instruction in loops, too.
template <typename Byte>  // const or not
LOWRANK_OPS_DEVICE Byte* vectors_behind(Byte* base, uint32_t vectors) {
  Byte* sum;
  asm("mad.wide.u32 %0, %1, 16, %2;\n" : "=l"(sum) : "r"(vectors), "l"(base));
  return sum;
}

// Copies 16 bytes asynchronously; where `valid` is 0 it writes zeros and reads nothing (cp.async's `ignore-src`, a
// predicate). It does not order other memory accesses: commit_copies and wait_copies do.
LOWRANK_OPS_DEVICE void copy_async_if(SharedAddress shared, const void* global, uint32_t valid) {
  asm volatile(
      "{\n.reg .pred ignored;\nsetp.eq.u32 ignored, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignored;\n}\n" ::"r"(shared),
      "l"(global), "r"(valid));
}
LOWRANK_OPS_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most `pending` of this thread's committed groups of copies are under way.
template <int pending>
LOWRANK_OPS_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// ldmatrix: loads four 8x8 matrices of 16-bit elements (8x4 of 32 bits). Lane i gives the address of row i % 8 of
// matrix i / 8 (16 bytes, aligned). From each matrix it gets the 32 bits at row lane / 4, word lane % 4.
LOWRANK_OPS_DEVICE void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same from a 32-bit address. It does not order other memory accesses: the barriers around it do.
LOWRANK_OPS_DEVICE void load_matrices(uint32_t (&matrices)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row));
}

// mma: sum [16, 8] += a [16, K] x b [K, 8], K = 16 (bf16, fp16) or 8 (tf32), fp32 sums. Each lane holds four sums: rows
// lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and the next.
LOWRANK_OPS_DEVICE void multiply_add(BFloat16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LOWRANK_OPS_DEVICE void multiply_add(Half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LOWRANK_OPS_DEVICE void multiply_add(Tf32, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// cvt.rna.tf32.f32: to the nearest tf32, ties away from zero.
LOWRANK_OPS_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// Conversions between elements and sums; narrowing rounds to nearest even.
LOWRANK_OPS_DEVICE float widen(BFloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}
LOWRANK_OPS_DEVICE float widen(Half value) {
  return __half2float(__ushort_as_half(value.bits));
}
LOWRANK_OPS_DEVICE float widen(Tf32 value) {
  return value.value;
}
LOWRANK_OPS_DEVICE float widen(float value) {
  return value;
}
LOWRANK_OPS_DEVICE double widen(double value) {
  return value;
}
// Widens two neighbouring elements that were loaded together.
LOWRANK_OPS_DEVICE void widen_pair(BFloat16, const Words<1>& pair, float (&wide)[2]) {
  wide[0] = __uint_as_float(pair.word[0] << 16);
  wide[1] = __uint_as_float(pair.word[0] & 0xffff0000);
}
LOWRANK_OPS_DEVICE void widen_pair(Half, const Words<1>& pair, float (&wide)[2]) {
  wide[0] = widen(Half{uint16_t(pair.word[0])});
  wide[1] = widen(Half{uint16_t(pair.word[0] >> 16)});
}
template <typename Element>  // of 4 or 8 bytes
LOWRANK_OPS_DEVICE void widen_pair(Element, const Pair<Element>& pair, decltype(widen(Element{})) (&wide)[2]) {
  wide[0] = widen(pair.value[0]);
  wide[1] = widen(pair.value[1]);
}
template <typename Element, typename Sum>
LOWRANK_OPS_DEVICE Element narrow(Sum value);
template <>
LOWRANK_OPS_DEVICE BFloat16 narrow<BFloat16, float>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
LOWRANK_OPS_DEVICE Half narrow<Half, float>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
LOWRANK_OPS_DEVICE Tf32 narrow<Tf32, float>(float value) {
  return {value};
}
template <>
LOWRANK_OPS_DEVICE float narrow<float, float>(float value) {
  return value;
}
template <>
LOWRANK_OPS_DEVICE double narrow<double, double>(double value) {
  return value;
}
// Rounds two neighbouring elements, in their order in memory: one instruction for 16-bit elements (sm_80 and later).
template <typename Element>
LOWRANK_OPS_DEVICE Words<int(sizeof(Element)) / 2> narrow_pair(float first, float second);
template <>
LOWRANK_OPS_DEVICE Words<1> narrow_pair<BFloat16>(float first, float second) {
  Words<1> pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair.word[0]) : "f"(second), "f"(first));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<1> narrow_pair<Half>(float first, float second) {
  Words<1> pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair.word[0]) : "f"(second), "f"(first));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<2> narrow_pair<Tf32>(float first, float second) {
  return {{__float_as_uint(first), __float_as_uint(second)}};
}
// Like narrow_pair, with zeros for negative values; a NaN stays a NaN.
template <typename Element>
LOWRANK_OPS_DEVICE Words<int(sizeof(Element)) / 2> narrow_pair_relu(float first, float second);
template <>
LOWRANK_OPS_DEVICE Words<1> narrow_pair_relu<BFloat16>(float first, float second) {
  Words<1> pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair.word[0]) : "f"(second), "f"(first));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<1> narrow_pair_relu<Half>(float first, float second) {
  Words<1> pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;\n" : "=r"(pair.word[0]) : "f"(second), "f"(first));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<2> narrow_pair_relu<Tf32>(float first, float second) {
  asm("max.NaN.f32 %0, %0, 0f00000000;\nmax.NaN.f32 %1, %1, 0f00000000;\n" : "+f"(first), "+f"(second));
  return narrow_pair<Tf32>(first, second);
}

// Two neighbouring elements, those above 6 replaced by 6; a NaN stays a NaN.
template <typename Element>
LOWRANK_OPS_DEVICE Words<int(sizeof(Element)) / 2> at_most_six(Words<int(sizeof(Element)) / 2> pair);
template <>
LOWRANK_OPS_DEVICE Words<1> at_most_six<BFloat16>(Words<1> pair) {
  asm("min.NaN.bf16x2 %0, %0, %1;\n" : "+r"(pair.word[0]) : "r"(0x40c040c0));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<1> at_most_six<Half>(Words<1> pair) {
  asm("min.NaN.f16x2 %0, %0, %1;\n" : "+r"(pair.word[0]) : "r"(0x46004600));
  return pair;
}
template <>
LOWRANK_OPS_DEVICE Words<2> at_most_six<Tf32>(Words<2> pair) {
  for (uint32_t& word : pair.word) asm("min.NaN.f32 %0, %0, 0f40c00000;\n" : "+r"(word));
  return pair;
}

// CUDA wants shared memory above 48 KB to be allowed for each kernel.
template <typename Params>
cudaError_t allow_shared(void (*kernel)(Params), int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes);
}

// Puts one kernel onto a stream, in clusters of `cluster` CTAs.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t ctas, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params, int cluster = 1) {
  if (ctas <= 0 || ctas > INT32_MAX || ctas % cluster != 0) return cudaErrorInvalidConfiguration;
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<Params*>(&params)};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(ctas));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim.x = unsigned(cluster);
  clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  config.attrs = &clusters;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

// How many CTAs of the kernel the present GPU holds at a time, at least one. `last`, one per kernel, keeps the answer
// for the next call: device, bytes of shared memory and CTAs in 8, 24 and 32 bits.
template <typename Params>
cudaError_t held_ctas(void (*kernel)(Params), int threads, int shared_bytes, std::atomic<uint64_t>& last, int& ctas) {
  int device = 0, multiprocessors = 0, of_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t key = uint64_t(device) << 24 | uint64_t(shared_bytes), known = last;
  ctas = int(uint32_t(known));
  if (error == cudaSuccess && known >> 32 == key && ctas > 0) return error;
  if (error == cudaSuccess) error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, reinterpret_cast<const void*>(kernel), threads,
                                                          size_t(shared_bytes));
  ctas = most(multiprocessors * of_each, 1);
  if (error == cudaSuccess) last = key << 32 | uint64_t(ctas);
  return error;
}

}  // namespace lowrank_ops
#endif
