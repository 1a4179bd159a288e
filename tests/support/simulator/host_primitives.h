// The host versions of csrc/cuda/kernels/primitives.cuh, which includes this file where the compiler is not nvcc. Each
// function does what the PTX ISA says of its instruction, checks conditions that the hardware would not check, and
// counts its accesses. The place of the call in the source is an argument with a default: messages name it, and the
// counters tell instructions apart by it.
#pragma once

#include <math.h>  // not <cmath>: in kernels exp(x) of a float must be the float function

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "counters.h"
#include "number_formats.h"
#include "shared_checker.h"
#include "simulator.h"

#define LOWRANK_OPS_DEVICE inline
#define LOWRANK_OPS_KERNEL(threads, ctas) void
#define LOWRANK_OPS_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace lowrank_ops {

inline int thread_index() {
  return simulator::machine.current->thread;
}
inline int64_t block_index() {
  return simulator::machine.block;
}
inline int block_count() {
  return int(simulator::machine.blocks);
}
inline unsigned char* shared_memory() {
  return simulator::machine.shared;
}

template <Barrier id>
inline void barrier(LOWRANK_OPS_SITE) {
  if (simulator::machine.settings.skip_barrier != int(id)) simulator::cta_barrier(int(id), {file, line});
}
template <Barrier id>
inline void warp_barrier(LOWRANK_OPS_SITE) {
  if (simulator::machine.settings.skip_barrier != int(id))
    simulator::collective(simulator::Primitive::kWarpBarrier, int(id), {file, line});
}

template <typename Value>
inline Value load_shared(const void* address, LOWRANK_OPS_SITE) {
  using namespace simulator;
  constexpr int bytes = sizeof(Value);
  static_assert(std::is_trivially_copyable_v<Value> && bytes <= 16 && (bytes & (bytes - 1)) == 0);
  Fiber& fiber = *machine.current;
  const int64_t offset = shared_offset(address, bytes, Primitive::kLoadShared, {file, line});
  check_read<bytes>(offset, state_of(fiber), Primitive::kLoadShared, {file, line});
  record(fiber, Primitive::kLoadShared, bytes, -1, uintptr_t(offset), {file, line});
  Value value;
  std::memcpy(&value, machine.shared + offset, bytes);
  return value;
}

template <typename Value>
inline void store_shared(void* address, const Value& value, LOWRANK_OPS_SITE) {
  using namespace simulator;
  constexpr int bytes = sizeof(Value);
  static_assert(std::is_trivially_copyable_v<Value> && bytes <= 16 && (bytes & (bytes - 1)) == 0);
  Fiber& fiber = *machine.current;
  const int64_t offset = shared_offset(address, bytes, Primitive::kStoreShared, {file, line});
  const uint32_t state = state_of(fiber);
  check_write<bytes>(offset, state, state, Primitive::kStoreShared, {file, line});
  record(fiber, Primitive::kStoreShared, bytes, -1, uintptr_t(offset), {file, line});
  std::memcpy(machine.shared + offset, &value, bytes);
}

template <typename Value>
inline Value load_global(const void* address, LOWRANK_OPS_SITE) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= 16 &&
                (sizeof(Value) & (sizeof(Value) - 1)) == 0);
  Value value;
  const auto primitive = simulator::Primitive::kLoadGlobal;
  std::memcpy(&value, simulator::read_global(address, sizeof(Value), primitive, {file, line}), sizeof(Value));
  return value;
}
template <typename Value>
inline void store_global(void* address, const Value& value, LOWRANK_OPS_SITE) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= 16 &&
                (sizeof(Value) & (sizeof(Value) - 1)) == 0);
  std::memcpy(simulator::write_global(address, sizeof(Value), {file, line}), &value, sizeof(Value));
}

template <int bytes>
inline void copy_async(void* shared, const void* global, bool valid, LOWRANK_OPS_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simulator::begin_copy(shared, global, bytes, valid, {file, line});
}
// On the host an address in shared memory is a pointer, with the same checks.
using SharedAddress = unsigned char*;
inline SharedAddress shared_address(unsigned char* pointer) {
  return pointer;
}
template <typename Byte>
inline Byte* vectors_behind(Byte* base, uint32_t vectors) {
  return base + int64_t(vectors) * 16;
}
inline void copy_async_if(SharedAddress shared, const void* global, uint32_t valid, LOWRANK_OPS_SITE) {
  simulator::begin_copy(shared, global, 16, valid != 0, {file, line});
}
inline void commit_copies(LOWRANK_OPS_SITE) {
  simulator::Fiber& fiber = *simulator::machine.current;
  fiber.committed++;
  // Every lane records this, whatever it skipped before: it divides the traces into rounds (instructions.h).
  simulator::record(fiber, simulator::Primitive::kCommitCopies, 0, -1, 0, {file, line});
}
template <int pending>
inline void wait_copies() {
  simulator::wait_for_copies(pending);
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row, LOWRANK_OPS_SITE) {
  using namespace simulator;
  const int lane = machine.current->lane;
  Warp& warp = *machine.current->warp;
  warp.row[lane] = row;
  collective(Primitive::kLoadMatrices, -1, {file, line});
  for (int i = 0; i < 4; i++) matrices[i] = warp.matrices[i][lane];
}

namespace simulator {
inline void multiply_add(Primitive kind, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  const int lane = machine.current->lane;
  Warp& warp = *machine.current->warp;
  for (int i = 0; i < 4; i++) warp.a[i][lane] = a[i];
  warp.b[0][lane] = b0;
  warp.b[1][lane] = b1;
  for (int i = 0; i < 4; i++) warp.sum[i / 2][lane][i % 2] = sum[i];
  collective(kind, -1, site);
  for (int i = 0; i < 4; i++) sum[i] = warp.sum[i / 2][lane][i % 2];
}
}  // namespace simulator

inline void multiply_add(BFloat16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         LOWRANK_OPS_SITE) {
  simulator::multiply_add(simulator::Primitive::kMultiplyBFloat16, sum, a, b0, b1, {file, line});
}
inline void multiply_add(Half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LOWRANK_OPS_SITE) {
  simulator::multiply_add(simulator::Primitive::kMultiplyHalf, sum, a, b0, b1, {file, line});
}
inline void multiply_add(Tf32, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LOWRANK_OPS_SITE) {
  for (const uint32_t word : {a[0], a[1], a[2], a[3], b0, b1})
    if (!simulator::is_tf32(word)) simulator::fail({file, line}, "a product of a number that was not rounded to tf32");
  simulator::multiply_add(simulator::Primitive::kMultiplyTf32, sum, a, b0, b1, {file, line});
}

inline uint32_t round_to_tf32(uint32_t bits) {
  return simulator::round_tf32(bits);
}

inline float widen(BFloat16 value) {
  return simulator::bfloat16_to_float(value.bits);
}
inline float widen(Half value) {
  return simulator::half_to_float(value.bits);
}
inline float widen(Tf32 value) {
  return value.value;
}
inline float widen(float value) {
  return value;
}
inline double widen(double value) {
  return value;
}
template <typename Element>
inline void widen_pair(Element, const Packed<Element>& pair, decltype(widen(Element{})) (&wide)[2]) {
  Pair<Element> both;
  std::memcpy(&both, &pair, sizeof both);
  wide[0] = widen(both.value[0]);
  wide[1] = widen(both.value[1]);
}
template <typename Element, typename Sum>
inline Element narrow(Sum value);
template <>
inline BFloat16 narrow<BFloat16, float>(float value) {
  return {simulator::float_to_bfloat16(value)};
}
template <>
inline Half narrow<Half, float>(float value) {
  return {simulator::float_to_half(value)};
}
template <>
inline Tf32 narrow<Tf32, float>(float value) {
  return {value};
}
template <>
inline float narrow<float, float>(float value) {
  return value;
}
template <>
inline double narrow<double, double>(double value) {
  return value;
}
template <typename Element>
inline Words<int(sizeof(Element)) / 2> narrow_pair(float first, float second) {
  const Pair<Element> pair{{narrow<Element, float>(first), narrow<Element, float>(second)}};
  Words<int(sizeof(Element)) / 2> words;
  std::memcpy(&words, &pair, sizeof pair);
  return words;
}
template <typename Element>
inline Words<int(sizeof(Element)) / 2> narrow_pair_relu(float first, float second) {
  return narrow_pair<Element>(first < 0 ? 0 : first, second < 0 ? 0 : second);
}
template <typename Element>
inline Words<int(sizeof(Element)) / 2> at_most_six(Words<int(sizeof(Element)) / 2> words) {
  Pair<Element> pair;
  std::memcpy(&pair, &words, sizeof pair);
  for (Element& value : pair.value)
    if (widen(value) > 6) value = narrow<Element, float>(6);
  std::memcpy(&words, &pair, sizeof pair);
  return words;
}

// Runs the whole grid before it returns. Checks the limits that the hardware has.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t ctas, int threads, int shared_bytes, cudaStream_t,
                   const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  const auto body = [](const void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    call.kernel(call.params);
  };
  if (ctas <= 0 || ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (threads <= 0 || threads > simulator::kMaxThreads || threads % simulator::kLanes != 0)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes < 0 || shared_bytes > simulator::machine.settings.shared_limit) return cudaErrorInvalidValue;
  return simulator::run(ctas, threads, shared_bytes, body, &call) ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename Params>
cudaError_t held_ctas(void (*)(Params), int, int, std::atomic<uint64_t>&, int& ctas) {
  ctas = int(simulator::machine.settings.held_ctas);
  return cudaSuccess;
}

}  // namespace lowrank_ops
