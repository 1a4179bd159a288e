// Kernels of one CTA that use the primitives correctly; the output of each shows what the primitive did. g++ compiles
// them for the simulator and nvcc for a GPU, so that the two can be compared bit by bit.
#pragma once

#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

struct PrimitiveParams {
  const void* in;
  void* out;
  int64_t argument[6];
};

// Load and store one word of a tensor of words.
LOWRANK_OPS_DEVICE uint32_t word_at(const void* data, int64_t index) {
  return load_global<uint32_t>(static_cast<const uint32_t*>(data) + index);
}
LOWRANK_OPS_DEVICE void put_word(void* data, int64_t index, uint32_t word) {
  store_global(static_cast<uint32_t*>(data) + index, word);
}
LOWRANK_OPS_DEVICE float as_float(uint32_t word) {
  union {
    uint32_t word;
    float value;
  } both{word};
  return both.value;
}
LOWRANK_OPS_DEVICE uint32_t as_word(float value) {
  union {
    float value;
    uint32_t word;
  } both{value};
  return both.word;
}

// One warp. in: A [16, 8 words], B [8, 8 words] (K contiguous), C [16, 8] floats. out: C + A B^T. The fragments are
// loaded from global memory word by word, as the PTX ISA's figures show, so that the result does not depend on
// load_matrices.
template <typename Element>
LOWRANK_OPS_KERNEL(32, 1)
multiply_kernel(const PrimitiveParams p) {
  const int lane = thread_index(), group = lane / 4, t = lane % 4;
  const int64_t a_at = 0, b_at = 16 * 8, c_at = b_at + 8 * 8;
  const uint32_t a[4] = {word_at(p.in, a_at + group * 8 + t), word_at(p.in, a_at + (group + 8) * 8 + t),
                         word_at(p.in, a_at + group * 8 + t + 4), word_at(p.in, a_at + (group + 8) * 8 + t + 4)};
  const uint32_t b[2] = {word_at(p.in, b_at + group * 8 + t), word_at(p.in, b_at + group * 8 + t + 4)};
  float sum[4];
  for (int i = 0; i < 4; i++) sum[i] = as_float(word_at(p.in, c_at + (group + i / 2 * 8) * 8 + 2 * t + i % 2));
  multiply_add(Element{}, sum, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) put_word(p.out, (group + i / 2 * 8) * 8 + 2 * t + i % 2, as_word(sum[i]));
}

// One warp. in: 32 rows of 4 words; shared memory holds them 80 bytes apart. out: [lane, 4] as load_matrices returns
// them. `lean`: rows are given by 32-bit addresses.
template <bool lean>
LOWRANK_OPS_KERNEL(32, 1)
matrices_kernel(const PrimitiveParams p) {
  const int lane = thread_index();
  unsigned char* const row = shared_memory() + lane * 80;
  copy_async<16>(row, static_cast<const uint32_t*>(p.in) + lane * 4, true);
  commit_copies();
  wait_copies<0>();
  warp_barrier<Barrier::kStagingWritten>();
  uint32_t matrices[4];
  if constexpr (lean)
    load_matrices(matrices, shared_address(shared_memory()) + lane * 80);
  else
    load_matrices(matrices, row);
  for (int i = 0; i < 4; i++) put_word(p.out, lane * 4 + i, matrices[i]);
}

// Copies of `bytes` bytes in two groups; those of threads whose number is a multiple of argument[0] are not valid.
// Before, shared memory holds other values. Threads read what their neighbour copied. out: words. `lean`: by
// copy_async_if, from addresses of vectors_behind.
template <int bytes, bool lean>
LOWRANK_OPS_KERNEL(64, 1)
copy_kernel(const PrimitiveParams p) {
  constexpr int threads = 64, words = bytes / 4;
  const int thread = thread_index(), neighbour = (thread + 37) % threads;
  unsigned char* const shared = shared_memory();
  for (int i = 0; i < 2 * words; i++) store_shared(shared + (thread * 2 * words + i) * 4, uint32_t(0xdeadbeef));
  for (int group = 0; group < 2; group++) {
    const int place = (2 * thread + group) * words;
    if constexpr (lean)
      copy_async_if(shared_address(shared) + place * 4,
                    vectors_behind(static_cast<const unsigned char*>(p.in), uint32_t(place / 4)),
                    thread % p.argument[0] != 0 ? 1u << thread % 32 : 0);
    else
      copy_async<bytes>(shared + place * 4, static_cast<const uint32_t*>(p.in) + place, thread % p.argument[0] != 0);
    commit_copies();
  }
  for (int group = 0; group < 2; group++) {
    if (group == 0)
      wait_copies<1>();
    else
      wait_copies<0>();
    barrier<Barrier::kChunk>();
    for (int i = 0; i < words; i++) {
      const int place = (2 * neighbour + group) * words + i;
      put_word(p.out, place, load_shared<uint32_t>(shared + place * 4));
    }
  }
}

// The first word of a number and its negative, clamped to 0 and 6.
template <typename Element>
LOWRANK_OPS_DEVICE uint32_t relu6(float value) {
  return at_most_six<Element>(narrow_pair_relu<Element>(value, -value)).word[0];
}

// Converts argument[0] words: out[i] = f(in[i]), where argument[1] selects f: 0 fp32 -> bf16 (bits), 1 fp32 -> fp16, 2
// fp32 -> tf32, 3 bf16 -> fp32, 4 fp16 -> fp32, 5 fp32 -> two bf16, the number and its negative, 6 the same with fp16,
// 7 fp32 clamped to 0 and 6, 8 and 9 like 5 and 6 and then clamped to 0 and 6, 10 and 11 like 5 and 6 with relu.
LOWRANK_OPS_KERNEL(128, 1)
convert_kernel(const PrimitiveParams p) {
  for (int64_t i = thread_index(); i < p.argument[0]; i += 128) {
    const uint32_t word = word_at(p.in, i);
    uint32_t result = 0;
    if (p.argument[1] == 0) result = narrow<BFloat16, float>(as_float(word)).bits;
    if (p.argument[1] == 1) result = narrow<Half, float>(as_float(word)).bits;
    if (p.argument[1] == 2) result = round_to_tf32(word);
    if (p.argument[1] == 3) result = as_word(widen(BFloat16{uint16_t(word)}));
    if (p.argument[1] == 4) result = as_word(widen(Half{uint16_t(word)}));
    if (p.argument[1] == 5) result = narrow_pair<BFloat16>(as_float(word), -as_float(word)).word[0];
    if (p.argument[1] == 6) result = narrow_pair<Half>(as_float(word), -as_float(word)).word[0];
    if (p.argument[1] == 7) result = relu6<Tf32>(as_float(word));
    if (p.argument[1] == 8) result = relu6<BFloat16>(as_float(word));
    if (p.argument[1] == 9) result = relu6<Half>(as_float(word));
    if (p.argument[1] == 10) result = narrow_pair_relu<BFloat16>(as_float(word), -as_float(word)).word[0];
    if (p.argument[1] == 11) result = narrow_pair_relu<Half>(as_float(word), -as_float(word)).word[0];
    put_word(p.out, i, result);
  }
}

// Launches a kernel by its name. cudaErrorInvalidValue: there is none of that name.
inline cudaError_t launch_primitive(const char* name, const PrimitiveParams& params, cudaStream_t stream) {
  const auto named = [name](const char* other) {
    int i = 0;
    while (name[i] != 0 && name[i] == other[i]) i++;
    return name[i] == other[i];
  };
  if (named("multiply_bf16")) return launch(multiply_kernel<BFloat16>, 1, 32, 0, stream, params);
  if (named("multiply_fp16")) return launch(multiply_kernel<Half>, 1, 32, 0, stream, params);
  if (named("multiply_tf32")) return launch(multiply_kernel<Tf32>, 1, 32, 0, stream, params);
  if (named("matrices")) return launch(matrices_kernel<false>, 1, 32, 32 * 80, stream, params);
  if (named("copy_4")) return launch(copy_kernel<4, false>, 1, 64, 128 * 4, stream, params);
  if (named("copy_8")) return launch(copy_kernel<8, false>, 1, 64, 128 * 8, stream, params);
  if (named("copy_16")) return launch(copy_kernel<16, false>, 1, 64, 128 * 16, stream, params);
  if (named("matrices_lean")) return launch(matrices_kernel<true>, 1, 32, 32 * 80, stream, params);
  if (named("copy_lean")) return launch(copy_kernel<16, true>, 1, 64, 128 * 16, stream, params);
  if (named("convert")) return launch(convert_kernel, 1, 128, 0, stream, params);
  return cudaErrorInvalidValue;
}

}  // namespace lowrank_ops
